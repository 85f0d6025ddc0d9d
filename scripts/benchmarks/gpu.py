"""Proves on a GPU what the documents say of GPUs, and prints a row for each claim: found, expected, held or not.

    sh scripts/benchmarks/gpu.sh [--device cpu] [--seconds 480] [--only tests bits cost launches read]

Each training runs in a process of its own, so that one that hangs or dies costs its own time only. With
``--device cpu`` everything is smaller, and what only a GPU can show has no verdict. The exit code is 1 where a claim
does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lanes
import launches
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import geomprobe
from geomprobe.kernels.fused_read import FusedRead
from geomprobe.report.table import table


class Row(NamedTuple):
    """A claim; ``held`` is None where there is no verdict."""

    name: str
    found: str
    expected: str = ""
    held: bool | None = None


# ---- the same bits, columns

VARIANTS = ["float32", "bfloat16 autocast", "GradScaler", "torch.compile", "fused AdamW", "channels_last"]
STEPS = 8


def convolutions() -> nn.Module:
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3)
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 6 * 6, 10))


class Training:
    """A small training of one variant, which keeps each step's weights and gradients where it is asked to."""

    def __init__(self, variant: str, device: str) -> None:
        self.variant, self.device = variant, device
        self.path: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def __call__(self) -> None:
        variant, device = self.variant, self.device
        layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
        model = convolutions().to(device, memory_format=layout)
        self.optimizer = optimizer = optimizer_of(variant)(model.parameters())
        scaler = torch.amp.GradScaler(device, init_scale=8.0) if variant == "GradScaler" else None
        half = torch.float16 if device == "cuda" and scaler else torch.bfloat16
        call = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
        call = call if variant == "torch.compile" else model
        self.path = []
        hook = optimizer.register_step_pre_hook(lambda *_: self._keep())
        probe = geomprobe.attach(model, optimizer, **({"scaler": scaler} if scaler else {}))
        data = [(torch.randn(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(STEPS)]
        for x, y in probe.batches(data):
            x, y = x.to(device, memory_format=layout), y.to(device)
            optimizer.zero_grad()
            with torch.autocast(device, half, enabled=variant in ("bfloat16 autocast", "GradScaler")):
                loss = functional.cross_entropy(call(x).float(), y)
            probe.backward(loss if scaler is None else scaler.scale(loss))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        hook.remove()
        self.left = [p.detach().cpu().clone() for p in model.parameters()]

    def _keep(self) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        w = torch.cat([p.detach().double().flatten() for p in parameters]).cpu().numpy()
        g = torch.cat([p.grad.double().flatten() for p in parameters]).cpu().numpy()
        self.path.append((w, g))


def optimizer_of(variant: str) -> Callable[[Any], torch.optim.Optimizer]:
    if variant == "fused AdamW":
        return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def bits(device: str, variant: str, folder: Path) -> Iterator[Row]:
    """The bits of the plain, the recorded and the replayed run, and the columns against float64."""
    train, hg = Training(variant, device), variant == "float32"
    lanes.seed_everything(0)
    with lanes.strict_mode(True):
        train()
    plain, path = train.left, train.path
    geomprobe.record(train, folder / "run", seed=0).close()
    recorded = train.left
    trace = geomprobe.replay(train, folder / "run", curvature_every=int(hg))
    same = [all(map(torch.equal, plain, other)) for other in (recorded, train.left)]
    equal = trace.certificate["steps_equal"]
    held = all(same) and equal == STEPS and trace.status == "complete"
    found = f"recorded equal: {same[0]}, replayed equal: {same[1]}, {equal} of {STEPS} steps"
    yield Row(f"bits, {variant}", found, "all equal", held)
    final = np.concatenate([p.double().flatten().numpy() for p in plain])
    errors = []
    for step, (w, g) in enumerate(path):
        d = w - final
        norms = np.linalg.norm(g), np.linalg.norm(d)
        oracle = {"grad_norm": norms[0], "distance": norms[1], "cosine": g @ d / (norms[0] * norms[1])}
        errors += [float(abs(trace[name][step] - value) / max(1.0, abs(value))) for name, value in oracle.items()]
    worst = max(errors)
    yield Row(f"columns, {variant}", f"worst error {worst:.0e}", "below 1e-12", worst < 1e-12)


# ---- what a step costs, and asks of a device


def steps_of(name: str, device: str) -> Iterator[None]:
    """A step of a large training at each next()."""
    lanes.seed_everything(0)
    small = device == "cpu"
    model: nn.Module
    if name == "resnet50":
        import torchvision

        model = (torchvision.models.resnet18 if small else torchvision.models.resnet50)(num_classes=1000)
        size, side = (2, 32) if small else (64, 224)
        x, y = torch.randn(size, 3, side, side), torch.randint(1000, (size,))
        optimizer: Any = torch.optim.SGD(model.to(device).parameters(), lr=0.01, momentum=0.9)
    else:
        from workloads.gpt import GPT

        model = GPT(100) if small else GPT(50257, features=768, heads=12, layers=12, context=1024)
        x = torch.randint(100, (16, 2) if small else (512, 8))
        y = torch.randint(100, x.shape)
        optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=1e-4, fused=not small)
    x, y = x.to(device), y.flatten().to(device)
    probe = geomprobe.attach(model, optimizer)
    for a, b in probe.batches([(x, y)] * (WARM_UP + ROUNDS[device] + 1)):
        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            loss = functional.cross_entropy(model(a).flatten(0, -2), b)
        optimizer.zero_grad()
        probe.backward(loss)
        optimizer.step()
        yield


WARM_UP = 6
ROUNDS = {"cuda": 20, "cpu": 3}
RATIOS = {"record": 1.04, "replay": 1.08, "replay with Hg": None}


def cost(device: str, name: str, folder: Path) -> Iterator[Row]:
    """Time, memory and launches of each lane against the plain one, step by step in turns."""
    cuda = device == "cuda"
    of: dict[str, lanes.Lane] = {}
    peaks = {}

    def training() -> Iterator[None]:
        return steps_of(name, device)

    with lanes.strict_mode(True):
        for lane in ("plain", *RATIOS):
            run = folder / lane.replace(" ", "-")
            before = torch.cuda.memory_allocated() if cuda else 0
            if lane == "plain":
                of[lane] = lanes.Lane(training())
            elif lane == "record":
                of[lane] = lanes.Lane(training(), lanes.recording(run, "never"))
            else:
                every = int(lane == "replay with Hg")
                of[lane] = lanes.Lane(training(), lanes.replaying(run, training, curvature_every=every))
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM_UP):
                of[lane]()
            peaks[lane] = (torch.cuda.max_memory_allocated() if cuda else 0) - before
        wait = torch.cuda.synchronize if cuda else None
        times = lanes.take_turns(of, ROUNDS[device], 0, before=wait, after=wait)
        asked = {lane: _profiled(step) for lane, step in of.items()} if cuda else {}
        for each in of.values():
            each.finish()
    label = name if cuda else {"resnet50": "resnet18"}.get(name, "small gpt")
    yield Row(f"{label}, plain step", f"{1e3 * lanes.typical(times['plain']):.1f} ms")
    units = sum(p.numel() * p.element_size() for p in _parameters(name)) if cuda else 1
    for lane, allowed in RATIOS.items():
        found = lanes.ratio(times[lane], times["plain"])
        held = found <= allowed if cuda and allowed else None
        yield Row(f"{label}, {lane}, time to plain", f"{found:.3f}", f"at most {allowed}" if allowed else "", held)
        if cuda:
            extra = (peaks[lane] - peaks["plain"]) / units
            yield Row(f"{label}, {lane}, extra memory", f"{extra:.2f} P", "", None)
            launched, waited = (a - b for a, b in zip(asked[lane], asked["plain"], strict=True))
            held = launched <= 20 and waited <= 0 if allowed else None
            yield Row(
                f"{name}, {lane}, launches and waits", f"{launched:+}, {waited:+}", "+20, 0" if allowed else "", held
            )


def _parameters(name: str) -> list[Tensor]:
    with torch.device("meta"):
        model, _, _ = launches.MODELS["resnet50" if name == "resnet50" else "gpt2-small"]()
    return list(model.parameters())


def _profiled(step: Callable[[], None]) -> tuple[int, int]:
    """Kernels and copies that a step launches, and host synchronizations, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
    names = [event.name for event in seen.events()]
    launched = sum(
        name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemset")) for name in names
    )
    waited = sum(name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for name in names)
    return launched, waited


def counted(device: str, name: str, folder: Path) -> Iterator[Row]:
    """Launches and waits as they are counted without a GPU."""
    make = launches.MODELS[name]
    if device == "cpu":
        small = {"resnet50": launches.mlp, "gpt2-small": lambda: launches.gpt2_small(100, 48, 2)}
        make, name = small[name], {"resnet50": "mlp"}.get(name, "small gpt")
    work = launches.counted(make, launches.OPTIMIZERS["AdamW"], ["plain", *launches.TARGET])
    for lane, (most, allowed) in launches.TARGET.items():
        launched, waits = launches.beyond(work[lane], work["plain"])
        yield Row(f"counted launches, {name}, {lane}", f"{launched:+}", f"at most +{most}", launched <= most)
        yield Row(f"counted waits, {name}, {lane}", f"{waits}", f"{allowed}", waits <= allowed)


def read(device: str, name: str, folder: Path) -> Iterator[Row]:
    """The one read of w, w* and g, against a copy of as many bytes; and digests that are equal on host and device."""
    cuda = device == "cuda"
    size = 2**26 if cuda else 2**20
    w, star, g = (torch.randn(size, device=device) for _ in range(3))
    other = torch.empty_like(w)
    fused = FusedRead([w], {"final": [star]})
    wait = torch.cuda.synchronize if cuda else None
    times = lanes.take_turns(
        {"copy": lambda: other.copy_(w), "read": lambda: fused.read([g])}, 20, 3, before=wait, after=wait
    )
    copied, taken = (lanes.typical(times[each]) for each in ("copy", "read"))
    yield Row("a copy", f"{8 * size / copied / 1e9:.0f} GB/s")
    over = taken / copied / 1.5
    yield Row(
        "the read, over its bytes at that rate",
        f"{over:.2f} ({fused.backend})",
        "at most 1.3",
        over <= 1.3 if cuda else None,
    )
    found, on_host = fused.read([g]), FusedRead([w.cpu()], {"final": [star.cpu()]}, backend="torch").read([g.cpu()])
    same = all(torch.equal(a.cpu(), b) for a, b in zip(found[:2], on_host[:2], strict=True))
    yield Row("digests, device and host", f"equal: {same}", "equal", same)
    assert found.sums is not None
    assert on_host.sums is not None
    scale = float(found.sums.abs().max())
    error = float((found.sums.cpu() - on_host.sums).abs().max()) / scale
    yield Row("inner products, device and host", f"error {error:.0e}", "below 1e-12", error < 1e-12)


def tests(device: str, name: str, folder: Path) -> Iterator[Row]:
    """The tests that need a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit"], capture_output=True, text=True
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    yield Row("tests marked gpu", last, "all pass", done.returncode == 0 and (device == "cpu" or "passed" in last))


SECTIONS: dict[str, tuple[Callable[[str, str, Path], Iterator[Row]], list[str]]] = {
    "tests": (tests, [""]),
    "read": (read, [""]),
    "bits": (bits, VARIANTS),
    "launches": (counted, ["resnet50", "gpt2-small"]),
    "cost": (cost, ["resnet50", "gpt2-small"]),
}


def in_process(device: str, section: str, name: str, seconds: float) -> list[Row]:
    """The rows of one part, from a process of its own; one row that says what went wrong, if it did."""
    command = [sys.executable, __file__, "--device", device, "--part", section, name]
    title = f"{section} {name}".strip()
    if seconds < 10:
        return [Row(title, "no time left", "", False)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Row(title, f"not done after {seconds:.0f} s", "", False)]
    rows = [Row(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode:
        rows.append(Row(title, (done.stderr.strip().splitlines() or ["?"])[-1][:160], "", False))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. Try `sh scripts/benchmarks/gpu.sh --device cpu`.")
    if arguments.part:
        section, name = arguments.part
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            rows = list(SECTIONS[section][0](arguments.device, name, Path(folder)))
        print(*map(json.dumps, rows), sep="\n")
        return
    began, found = time.monotonic(), []
    for section in arguments.only:
        for name in SECTIONS[section][1]:
            left = arguments.seconds - (time.monotonic() - began)
            for row in in_process(arguments.device, section, name, min(left, 180)):
                found.append(row)
                print(f"[{time.monotonic() - began:4.0f} s] {row.name}: {row.found}", file=sys.stderr)
    verdict = {True: "held", False: "NOT HELD", None: "-"}
    print(lanes.machine())
    print(table(["claim", "found", "expected", ""], [[r.name, r.found, r.expected, verdict[r.held]] for r in found]))
    sys.exit(any(row.held is False for row in found))


if __name__ == "__main__":
    main()
