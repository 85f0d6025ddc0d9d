"""Which optimizers of a script without `attach` make one path: those that train the same model."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from geomprobe.errors import UsageError
from geomprobe.probe.parameters import ModelDiscovery, described, holds

MOST = 64
"""How many optimizers that step the manifest names at most."""


class OptimizerPaths:
    """The optimizers that a script has made so far, and the paths that they make.

    Optimizers belong to one path where they hold parameters of one model, or the same parameters. One that never steps
    does no harm. `Session` owns it, and asks it at the first step of a script without `attach`.

    Args:
        models: that were called so far.
        chosen: of which optimizer the path is wanted: its class, its model's class, or its number in the order in
            which they were made; ``"first"``, or None where there is only one path, for the one that steps first.
    """

    def __init__(self, models: ModelDiscovery, chosen: str | None = None) -> None:
        self._models, self._chosen = models, chosen
        self._made: list[ref[Optimizer]] = []
        self._stepped: dict[int, None] = {}

    def add(self, optimizer: Optimizer) -> None:
        """An optimizer was made."""
        self._made.append(ref(optimizer))

    def stepping(self, optimizer: Optimizer) -> None:
        """An optimizer steps. Of a script that makes one in each step, the first `MOST` are noted."""
        if len(self._stepped) < MOST:
            self._stepped.setdefault(self._number(optimizer))

    def described(self, path: Sequence[Optimizer]) -> dict[str, Any]:
        """For the manifest: the name of a path, and the numbers of its optimizers; -1 for one that was copied."""
        models = {id(model): type(_unwrapped(model)).__name__ for each in path for model in self._models.of(each)}
        name = "_".join(models.values()) or type(path[0]).__name__
        measured = [self._number(each) for each in path]
        return {"name": re.sub(r"\W", "_", name), "measured": measured}

    @property
    def stepped(self) -> list[int]:
        """The numbers of the optimizers that have stepped so far, beside those of the path that is measured, in order.

        Of the latter, only the one that stepped first is among them.
        """
        return list(self._stepped)

    def of(self, optimizer: Optimizer) -> list[Optimizer]:
        """The optimizers on the path of one that steps: this one, and the others in the order in which they were made.

        A wrapper that has the groups of another optimizer is not one more.
        """
        if len(self._alive) > 1:
            gc.collect()  # one that the script has thrown away must not be there in one pass, and gone in the other
        return self._path(optimizer)

    def is_chosen(self, optimizer: Optimizer) -> bool:
        """Whether the path of an optimizer that steps is the one that is wanted.

        Raises:
            UsageError: the choice is true of optimizers on several paths.
        """
        if self._chosen in (None, "first"):
            return True
        named = [each for number, each in self._alive.items() if self._is_named(number, each)]
        path = self._path(optimizer)
        inside = [any(each is one for one in path) for each in named]
        if any(inside) and not all(inside):
            raise UsageError(
                f"--optimizer {self._chosen} is true of optimizers that train different models.{self.listed()} Choose "
                "one by its number."
            )
        return any(inside)

    def listed(self) -> str:
        """The optimizers that there are, as a sentence after another; empty where there are none."""
        lines = []
        for number, each in self._alive.items():
            models = [type(_unwrapped(module)).__name__ for module in self._models.of(each)]
            lines.append(f"{number}: {described(each)}" + (f" of {', '.join(models)}" if models else ""))
        return f" There are {'; '.join(lines)}." if lines else ""

    def _number(self, optimizer: Optimizer) -> int:
        return next((number for number, made in enumerate(self._made) if made() is optimizer), -1)

    @property
    def _alive(self) -> dict[int, Optimizer]:
        """Those that the script still has, by their numbers."""
        return {number: each for number, made in enumerate(self._made) if (each := made()) is not None}

    def _path(self, optimizer: Optimizer) -> list[Optimizer]:
        path, left = [optimizer], [each for each in self._alive.values() if each is not optimizer]
        groups = {id(group) for group in optimizer.param_groups}
        while near := [each for each in left if any(self._share(each, one) for one in path)]:
            for each in near:
                own = {id(group) for group in each.param_groups}
                path += [] if own & groups else [each]
                groups |= own
            left = [each for each in left if not any(each is one for one in near)]
        order = {id(each): number for number, each in self._alive.items()}
        return [optimizer, *sorted(path[1:], key=lambda each: order[id(each)])]

    def _share(self, a: Optimizer, b: Optimizer) -> bool:
        """Whether two optimizers train a part of the same model, or the same parameter."""
        if any(holds(b, (p for group in a.param_groups for p in group["params"]))):
            return True
        return any(any(holds(b, module.parameters())) for module in self._models.of(a))

    def _is_named(self, number: int, optimizer: Optimizer) -> bool:
        if self._chosen is not None and self._chosen.isdecimal():
            return number == int(self._chosen)
        models = (type(_unwrapped(module)).__name__ for module in self._models.of(optimizer))
        return self._chosen in (type(optimizer).__name__, *models)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The script's own module, in what `torch.compile` or a data-parallel wrapper made of it."""
    while isinstance(inner := getattr(module, "_orig_mod", None) or getattr(module, "module", None), nn.Module):
        module = inner
    return module
