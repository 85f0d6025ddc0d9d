"""Loops composed from random pieces, with the same witness: whatever the pieces do, each cell is right or absent."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss, smooth_l1_loss

from behavior.zoo.witness import ALL_OF_LOSS, Loop, Loss, Witness, batches, elsewhere, examine, mlp, sgd

Zero = Callable[[nn.Module, torch.optim.Optimizer], object]


def each(change: Callable[[nn.Parameter], object]) -> Zero:
    return lambda model, optimizer: [change(p) for p in model.parameters() if p.grad is not None]


ZEROS: dict[str, Zero] = {
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad(set_to_none=False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "p.grad = None": each(lambda p: setattr(p, "grad", None)),
    "p.grad.zero_()": each(lambda p: p.grad.zero_()),
    "p.grad.data.zero_()": each(lambda p: p.grad.data.zero_()),
    "p.grad = zeros_like(p)": each(lambda p: setattr(p, "grad", torch.zeros_like(p))),
}
BY_HAND = {"p.grad.zero_()", "p.grad.data.zero_()", "p.grad = zeros_like(p)"}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "momentum": lambda model: sgd(model, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, foreach=False),
}


@dataclass(frozen=True)
class Recipe:
    """What a loop is composed of; the first value that is named for each is the plainest."""

    attach: bool = True
    optimizer: str = "SGD"
    parts: int = 1
    divided: str = "no"  # in the loss, by hand
    backward: str = "probe"  # loss, mixed, weights, list, assigned
    zero: str = "optimizer.zero_grad()"
    zeroed: str = "before"  # after, every second step
    detour: str = "none"  # zeroed, put back, copied back, moved weights
    between: str = "optimizer.zero_grad()"
    clip: str = "none"  # norm, value, by hand
    hook: str = "none"  # log, clamp
    scaler: bool = False
    overflow: bool = False
    freeze: bool = False
    evaluate: bool = False

    @property
    def absent(self) -> frozenset[str]:
        """What may be absent where a piece changes gradients by hand."""
        hand = (
            self.divided == "by hand"
            or self.backward in ("mixed", "weights", "list", "assigned")
            or (self.detour == "zeroed" and self.between in BY_HAND)
            or self.detour in ("put back", "copied back", "moved weights")
            or self.clip == "by hand"
            or self.hook == "clamp"
            or (self.zero in BY_HAND and (self.freeze or self.overflow))
        )
        return ALL_OF_LOSS if hand else frozenset()

    def run(self, witness: Witness) -> None:
        Composed(self, witness).run()


class Composed:
    """One run of a recipe. ``terms`` says what the gradient is of: factor, loss, and before which step it was taken."""

    def __init__(self, recipe: Recipe, witness: Witness) -> None:
        self.recipe, self.witness = recipe, witness
        self.model = mlp()
        self.optimizer = OPTIMIZERS[recipe.optimizer](self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, enabled=recipe.scaler)
        self.probe = witness.watch(self.model, self.optimizer, recipe.attach, scaler=self.scaler)
        self.terms: list[tuple[float, Loss, int]] = []
        self.step = self.passes = 0
        self.elsewhere = False
        self.log: list[float] = []
        if recipe.hook != "none":
            for p in self.model.parameters():
                p.register_hook(self._hook)

    def run(self) -> None:
        recipe, data = self.recipe, batches(4)
        for epoch in self.probe.epochs(2):
            for x, y in data[2 * epoch : 2 * epoch + 2]:
                if recipe.freeze and self.step == 2:
                    self.model[0].requires_grad_(False)
                if recipe.zeroed == "before" or (recipe.zeroed == "every second step" and self.step % 2 == 0):
                    self.zero(recipe.zero)
                self.gradients(x, y)
                self.update(epoch if recipe.attach else float("nan"))
                if recipe.zeroed == "after":
                    self.zero(recipe.zero)
                self.step += 1

    def gradients(self, x: Tensor, y: Tensor) -> None:
        if self.recipe.detour == "zeroed":  # an attack, or a pass for a log
            self.backward(lambda: smooth_l1_loss(self.model(x), 2 * y), first=True)
            self.zero(self.recipe.between)
        old = [p.detach().clone() for p in self.model.parameters()]
        if self.recipe.detour == "moved weights":
            for p in self.model.parameters():
                p.data.mul_(1.1)
        count = self.recipe.parts
        share = 1 / count if self.recipe.divided == "in the loss" else 1.0
        for xs, ys in zip(x.chunk(count), y.chunk(count), strict=True):
            self.backward(lambda xs=xs, ys=ys: share * mse_loss(self.model(xs), ys))
        if self.recipe.detour == "moved weights":
            self.put_back(old)
        if self.recipe.detour in ("put back", "copied back"):
            self.log_pass(x, y)
        if self.recipe.divided == "by hand":
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad /= count
            self.terms = [(factor / count, loss, step) for factor, loss, step in self.terms]

    def backward(self, loss: Loss, first: bool = False) -> None:
        """One backward pass, by the recipe's call, and its term."""
        self.passes += 1
        way = self.recipe.backward
        if way == "assigned" and not first:
            self.assign(loss)
            return
        value = self.scaler.scale(loss() * self.overflowing)
        factor = 1.0
        if way == "probe" or (way == "mixed" and self.passes % 2):
            self.probe.backward(value)
        elif way == "weights":
            factor = 0.5
            value.backward(gradient=torch.tensor(factor, dtype=torch.float64))
        elif way == "list":
            factor = 2.0
            again = self.scaler.scale(loss() * self.overflowing)
            torch.autograd.backward([value, again])
        else:
            value.backward()
        self.terms.append((factor, loss, self.step))

    def assign(self, loss: Loss) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.scaler.scale(loss() * self.overflowing), trained)
        for p, g in zip(trained, found, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        self.terms.append((1.0, loss, self.step))

    def log_pass(self, x: Tensor, y: Tensor) -> None:
        kept = [p.grad for p in self.model.parameters()]
        if self.recipe.detour == "copied back":
            kept = [None if g is None else g.clone() for g in kept]
            self.model.zero_grad(set_to_none=False)
        else:
            self.model.zero_grad()
        smooth_l1_loss(self.model(x), 2 * y).backward()
        for p, g in zip(self.model.parameters(), kept, strict=True):
            if self.recipe.detour == "copied back" and g is not None:
                p.grad.copy_(g)
            else:
                p.grad = g

    def put_back(self, old: list[Tensor]) -> None:
        """Put the weights back. The step's terms were taken where the weights were, and stay there."""
        offsets = [p.detach() - o for p, o in zip(self.model.parameters(), old, strict=True)]
        for p, o in zip(self.model.parameters(), old, strict=True):
            p.data.copy_(o)
        self.terms = [
            (factor, elsewhere(self.model, offsets, lambda _, loss=loss: loss()) if step == self.step else loss, step)
            for factor, loss, step in self.terms
        ]

    def update(self, epoch: float) -> None:
        recipe, scale = self.recipe, self.scaler.get_scale()
        if recipe.clip != "none" and recipe.scaler:
            self.scaler.unscale_(self.optimizer)
            scale = 1.0
        if recipe.clip == "norm":
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.2)
        elif recipe.clip == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), 0.05)
        elif recipe.clip == "by hand":
            each(lambda p: p.grad.data.clamp_(-0.05, 0.05))(self.model, self.optimizer)
        if recipe.evaluate:
            with torch.no_grad():
                self.log.append(self.model(batches(1)[0][0]).sum().item())
        terms = list(self.terms)
        stale = any(step != self.step for _, _, step in terms)
        self.witness.truth(
            None if stale else lambda: sum(factor * loss() for factor, loss, _ in terms),
            epoch=epoch,
            hessian=recipe.detour != "moved weights",
            changed=recipe.clip != "none" or recipe.hook == "clamp",
            scale=scale,
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def zero(self, way: str) -> None:
        ZEROS[way](self.model, self.optimizer)
        self.terms = []

    @property
    def overflowing(self) -> float:
        return float("inf") if self.recipe.overflow and self.recipe.scaler and self.step == 1 else 1.0

    def _hook(self, gradient: Tensor) -> Tensor | None:
        if self.recipe.hook == "clamp":
            return gradient.clamp(-0.05, 0.05)
        self.log.append(gradient.norm().item())
        return None


def recipes() -> st.SearchStrategy[Recipe]:
    choices: dict[str, Any] = {
        "optimizer": OPTIMIZERS,
        "parts": (1, 2, 3),
        "divided": ("no", "in the loss", "by hand"),
        "backward": ("probe", "loss", "mixed", "weights", "list", "assigned"),
        "zero": ZEROS,
        "zeroed": ("before", "after", "every second step"),
        "detour": ("none", "zeroed", "put back", "copied back", "moved weights"),
        "between": ZEROS,
        "clip": ("none", "norm", "value", "by hand"),
        "hook": ("none", "log", "clamp"),
    }
    flags = {name: st.booleans() for name in ("attach", "scaler", "overflow", "freeze", "evaluate")}
    return st.builds(Recipe, **{name: st.sampled_from(list(of)) for name, of in choices.items()}, **flags)


def judged(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        verdict = examine(Loop("composed", "composed", str(recipe), recipe.run, recipe.absent), Path(folder) / "run")
    assert not verdict.wrong, "\n".join([str(recipe), *verdict.wrong])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(recipes())
@example(Recipe(hook="log", freeze=True))
@example(Recipe(scaler=True, overflow=True, zero="model.zero_grad(set_to_none=False)"))
@example(Recipe(scaler=True, overflow=True, zero="p.grad.zero_()", zeroed="after", clip="norm"))
def test_composed_loop(recipe: Recipe) -> None:
    judged(recipe)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, database=None, print_blob=True)
@given(recipes())
def test_many_composed_loops(recipe: Recipe) -> None:
    judged(recipe)
