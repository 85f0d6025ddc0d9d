"""The trainings of `shared_training` in one process and in float64, by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional

from support.shared_training import Case, batches, flat, model, optimizer_of


def global_loss(case: Case, module: nn.Module, world: int, x: Tensor, y: Tensor) -> Callable[..., Tensor]:
    """The mean over ranks and micro-batches of the losses, as a function of the weights."""
    names = [name for name, _ in module.named_parameters()]

    def loss(*weights: Tensor) -> Tensor:
        losses = []
        for xs, ys in zip(x.chunk(world), y.chunk(world), strict=True):
            for xp, yp in zip(xs.chunk(case.parts), ys.chunk(case.parts), strict=True):
                buffers = {name: b.clone() for name, b in module.named_buffers()}
                out = functional_call(module, {**dict(zip(names, weights, strict=True)), **buffers}, (xp,))
                losses.append(functional.cross_entropy(out, yp))
        return torch.stack(losses).mean() * (world if case.wrapper.endswith("sum") else 1)

    return loss


def brute_force(case: Case, world: int) -> dict[str, np.ndarray]:
    """Every column, from a training in one process and in float64, with dense Hessians."""
    module = model(case.model, torch.float64)
    parameters = list(module.parameters())
    optimizer = optimizer_of(case.optimizer, parameters)
    first = flat(parameters)
    history: list[dict[str, Any]] = []
    for x, y in batches(torch.float64):
        loss = global_loss(case, module, world, x, y)
        optimizer.zero_grad()
        loss(*parameters).backward()
        for parameter in parameters if case.wrapper == "fsdp unused" else ():
            if parameter.grad is None:  # which an optimizer would skip; FSDP2 gives it zeros there
                parameter.grad = torch.zeros_like(parameter)
        if case.clip:
            nn.utils.clip_grad_norm_(parameters, 0.1)
        g = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        found = {"w": flat(parameters), "g": g, **second_order(loss, parameters, g)}
        for rank, share in enumerate(zip(x.chunk(world), y.chunk(world), strict=True)):
            own = torch.autograd.grad(
                global_loss(case, module, 1, *share)(*parameters), parameters, materialize_grads=True
            )
            found[f"g of {rank}"] = flat(own)
        history.append(found)
        optimizer.step()
    return columns(case, history, {"final": flat(parameters), "first": first}, module)


def second_order(loss: Callable[..., Tensor], parameters: list[Tensor], g: Tensor) -> dict[str, Any]:
    sizes = [p.numel() for p in parameters]

    def of(vector: Tensor) -> Tensor:
        pieces = zip(vector.split(sizes), parameters, strict=True)
        return loss(*(piece.view(p.shape) for piece, p in pieces))

    w = flat(parameters)
    matrix = jacrev(grad(of))(w).detach()
    there = w - 0.1 * g  # optimizer_of's rate
    return {
        "Hg": matrix @ g,
        "sharpness": float(torch.linalg.eigvalsh(matrix)[-1]),
        "turned": (grad(of)(w) - grad(of)(there)) / 0.1,
        "gap": float(of(there) - of(w) + 0.1 * grad(of)(w) @ g),
        "loss": float(of(w)),
    }


def columns(
    case: Case, history: list[dict[str, Any]], references: dict[str, Tensor], module: nn.Module
) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {}

    def add(name: str, value: Any) -> None:
        found.setdefault(name, []).append(float(value))

    slices, start = {}, 0
    for name, p in module.named_parameters():
        slices[name], start = slice(start, start + p.numel()), start + p.numel()
    for point in history:
        vectors = {"w": point["w"], "g": point["g"], "Hg": point["Hg"]}
        shared = ("g.g", "w.g", "w.w", "g.Hg", "Hg.Hg")
        for reference, star in references.items():
            vectors["d"] = point["w"] - star
            path = "" if reference == "final" else f"references/{reference}/"
            for product in (*(shared if not path else ()), "g.d", "w.d", "d.d"):
                a, b = (vectors[v] for v in product.split("."))
                add(f"{path}inner_products/{product}", a @ b)
                for name in slices if not path and case.per_parameter else ():
                    add(f"parameters/{name}/{product}", a[slices[name]] @ b[slices[name]])
        d = point["w"] - references["final"]
        for rank, g in enumerate(point[key] for key in point if key.startswith("g of")):
            for product, value in (("g.g", g @ g), ("w.g", point["w"] @ g), ("g.d", g @ d)):
                add(f"ranks/{rank}/{product}", value)
        add("steps/sharpness", point["sharpness"])
        add("steps/secant_residual", point["turned"].norm() / point["g"].norm())
        add("steps/linear_decrease_gap", point["gap"])
        add("loss", point["loss"])
    return {name: np.array(values) for name, values in found.items()}
