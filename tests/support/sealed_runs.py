"""Sealed files in the documented layout, written with plain h5py: readers are tested without the writer.

The runs are real: torch trains, every weight vector and gradient is stored, and the inner products are
float64 NumPy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from geomprobe.trace.schema import VERSIONS


@dataclass
class History:
    """Every weight vector [T + 1, n], gradient [T, n] and loss [T] of a run."""

    weights: np.ndarray
    gradients: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    manifest: dict[str, Any]
    slices: dict[str, slice] = field(default_factory=dict)


def train(
    steps=60,
    lr=0.05,
    dtype=torch.float32,
    optimizer="SGD",
    momentum=0.0,
    weight_decay=0.0,
    decay=1.0,
    target=None,
    offset=0.0,
    seed=0,
):
    """A small regression net, trained on minibatches; ``offset`` moves all weights away from 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(offset)
    settings = {"lr": lr, "weight_decay": weight_decay}
    if optimizer == "SGD":
        settings["momentum"] = momentum
    opt = getattr(torch.optim, optimizer)(model.parameters(), **settings)
    x = torch.randn(64, 6, dtype=dtype)
    y = torch.sin(x.sum(1, keepdim=True)) if target is None else target(x)
    weights, gradients, losses, rates = [], [], [], []
    for step in range(steps):
        batch = torch.randint(0, 64, (8,))
        opt.zero_grad()
        loss = ((model(x[batch]) - y[batch]) ** 2).mean()
        loss.backward()
        weights.append(_flat(p.detach() for p in model.parameters()))
        gradients.append(_flat(p.grad for p in model.parameters()))
        losses.append(loss.item())
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        opt.param_groups[0]["lr"] = lr * decay ** (step + 1)
    weights.append(_flat(p.detach() for p in model.parameters()))
    names, ends = zip(*((n, p.numel()) for n, p in model.named_parameters()), strict=True)
    stops = np.cumsum(ends)
    slices = {n: slice(stop - size, stop) for n, stop, size in zip(names, stops, ends, strict=True)}
    group = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "nesterov": False,
        "maximize": False,
    }
    manifest = manifest_of(optimizer, [group], str(dtype).removeprefix("torch."), list(names), int(stops[-1]), seed)
    return History(np.array(weights), np.array(gradients), np.array(losses), np.array(rates), manifest, slices)


def _flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).numpy()


def manifest_of(optimizer, groups, dtype, names, size, seed):
    return {
        "geomprobe": "0.1.0",
        "seed": seed,
        "strict": True,
        "recording": {"argv": ["--seed", str(seed)]},
        "script": {
            "kind": "script",
            "path": "train.py",
            "argv": ["--lr", "0.05"],
            "cwd": "/home/her",
            "sha256": "ab",
        },
        "software": {"python": "3.11.7", "torch": "2.15.0", "numpy": "2.4.0"},
        "hardware": {"device": "cpu"},
        "flags": {"num_threads": 2, "deterministic_algorithms": True},
        "optimizer": {"class": optimizer, "groups": groups},
        "model": {"class": "Sequential", "dtype": dtype, "num_parameters": size, "parameters": names},
        "measure": {"every": 1, "per_parameter": False},
        "host": {"name": "desk"},
    }


def products(weights, gradients, star):
    """The inner products of each row, as float64 columns."""
    d = weights - star
    return {
        "g.g": _dot(gradients, gradients),
        "w.g": _dot(weights, gradients),
        "w.w": _dot(weights, weights),
        "g.d": _dot(gradients, d),
        "w.d": _dot(weights, d),
        "d.d": _dot(d, d),
    }


def _dot(a, b):
    return np.einsum("ti,ti->t", a, b)


def derived(p):
    """RSI and its relatives, from the inner products, by the formulas as NWT prints them."""
    with np.errstate(all="ignore"):
        grad_norm, distance = np.sqrt(p["g.g"]), np.sqrt(p["d.d"])
        rsi, eb = p["g.d"] / p["d.d"], grad_norm / distance
        return {
            "distance": distance,
            "grad_dot_offset": p["g.d"],
            "rsi": rsi,
            "eb": eb,
            "cosine": p["g.d"] / (grad_norm * distance),
            "lolr": p["g.d"] / p["g.g"],
        }


def certificate(steps, equal=None, weights_equal=True, first=None):
    counts = {
        "steps_recorded": steps,
        "steps_compared": steps,
        "steps_equal": steps if equal is None else equal,
    }
    return {
        **counts,
        "final_weights_equal": weights_equal,
        "components": ["rng", "weights"],
        "first_difference": first,
    }


def write_trace(
    path: Path,
    history: History,
    *,
    status="complete",
    rows=None,
    epoch_length=20,
    every=1,
    per_parameter=False,
    references=None,
    cert=None,
    same=None,
):
    """``trace.h5`` of a history: its first ``rows`` rows, measured at each ``every``-th step."""
    rows = len(history.loss) if rows is None else rows
    w, g = history.weights[:rows], history.gradients[:rows]
    manifest = {**history.manifest, "measure": {"every": every, "per_parameter": per_parameter}}
    p = products(w, g, history.weights[-1])
    columns = derived(p)
    steps = {
        "step": np.arange(rows, dtype=float),
        "epoch": np.floor(np.arange(rows) / epoch_length) if epoch_length else np.full(rows, np.nan),
        "loss": history.loss[:rows],
        "lr": history.lr[:rows],
        "grad_norm": np.sqrt(p["g.g"]),
        **columns,
        "clr": history.loss[:rows] / p["g.g"],
    }
    for name in ("hg_norm", "g_hg", "corridor_residual", "relative_residual", "flow_drift"):
        steps[name] = np.full(rows, np.nan)
    skipped = np.arange(rows) % every != 0
    for table in (p, steps):
        for name in table:
            if name not in ("step", "epoch", "loss", "lr"):
                table[name] = np.where(skipped, np.nan, table[name])
    if same is not None:
        steps["same"] = np.asarray(same, float)
    with h5py.File(path, "w") as file:
        file.attrs.update(
            schema="geomprobe-trace", schema_version=VERSIONS["geomprobe-trace"], status=status, num_steps=rows
        )
        file.attrs.update(num_parameters=w.shape[1], manifest=json.dumps(manifest))
        _write(file, "steps", steps)
        _write(file, "inner_products", p)
        for i, group in enumerate(history.manifest["optimizer"]["groups"]):
            constant = {k: np.full(rows, float(group.get(k, 0))) for k in ("weight_decay", "momentum")}
            _write(file, f"groups/{i}", {"lr": history.lr[:rows], **constant})
        for name in columns:
            file[f"references/final/{name}"] = file[f"steps/{name}"]
        for name in ("g.d", "w.d", "d.d"):
            file[f"references/final/inner_products/{name}"] = file[f"inner_products/{name}"]
        for name, star in (references or {}).items():
            q = products(w, g, star)
            _write(file, f"references/{name}", derived(q))
            _write(file, f"references/{name}/inner_products", {k: q[k] for k in ("g.d", "w.d", "d.d")})
        if per_parameter:
            for name, part in history.slices.items():
                q = products(w[:, part], g[:, part], history.weights[-1, part])
                _write(file, f"parameters/{name}", q)
        _certify(file, certificate(rows) if cert is None and status == "complete" else cert)
    return path


def _write(file, group, columns):
    for name, values in columns.items():
        file.create_dataset(f"{group}/{name}", data=np.asarray(values, float))


def _certify(file, cert):
    if not cert:
        return
    group = file.create_group("certificate")
    for name, value in cert.items():
        if value is not None:
            group.attrs[name] = json.dumps(value) if isinstance(value, list | dict) else value


def tamper(path: Path, name: str, change, row=slice(None)):
    """Replace a column's values at some rows by a function of them."""
    with h5py.File(path, "r+") as file:
        values = file[name][...]
        values[row] = change(values[row])
        file[name][...] = values


def rederive(path: Path):
    """Make the derived columns follow from tampered inner products, so that only an identity can tell."""
    with h5py.File(path, "r+") as file:
        p = {name: column[...] for name, column in file["inner_products"].items()}
        columns = {**derived(p), "grad_norm": np.sqrt(p["g.g"]), "clr": file["steps/loss"][...] / p["g.g"]}
        for name, values in columns.items():
            file[f"steps/{name}"][...] = values


def write_record(path: Path, history: History, *, status="complete", salt=0, epoch_length=20, manifest=None):
    """``record.h5`` of a history: fingerprints are digests of the rows' bits."""
    steps = len(history.loss)
    fingerprints = {
        "weights": ({n: _digest(history.weights[:-1, s]) for n, s in history.slices.items()}),
        "loss": {"loss": history.loss.view(np.int64)},
        "rng": {"torch": np.arange(steps) * 1000003 + salt, "python": np.full(steps, 7)},
        "batch": {},
        "optimizer": {},
        "hyperparameters": {"lr": history.lr.view(np.int64)},
        "buffers": {},
        "gradient": {n: _digest(history.gradients[:, s]) for n, s in history.slices.items()},
    }
    with h5py.File(path, "w") as file:
        file.attrs.update(
            schema="geomprobe-record", schema_version=VERSIONS["geomprobe-record"], status=status, num_steps=steps
        )
        file.attrs.update(num_parameters=history.weights.shape[1])
        file.attrs["manifest"] = json.dumps(history.manifest if manifest is None else manifest)
        _write(file, "steps", {
            "step": np.arange(steps),
            "epoch": np.floor(np.arange(steps) / epoch_length),
            "loss": history.loss,
            "lr": history.lr,
        })  # fmt: skip
        for component, tensors in fingerprints.items():
            file[f"fingerprints/{component}"] = np.array(list(tensors.values()), np.int64).reshape(-1, steps).T
            names = np.array([name.encode() for name in tensors], h5py.string_dtype("utf-8", 40))
            file.create_dataset(f"fingerprints/{component}_names", data=names)
        if status == "complete":
            for name, part in history.slices.items():
                file[f"references/final/{name}"] = history.weights[-1, part].astype(np.float32)
                file[f"references/final/{name}"].attrs["torch_dtype"] = "float32"
    return path


def _digest(rows):
    return np.array([hash(row.tobytes()) for row in rows], np.int64)


def write_run(folder: Path, history: History, *, trace=True, **options):
    """A run folder with a record and, unless told otherwise, a trace."""
    folder.mkdir(parents=True)
    write_record(folder / "record.h5", history)
    if trace:
        write_trace(folder / "trace.h5", history, **options)
    return folder
