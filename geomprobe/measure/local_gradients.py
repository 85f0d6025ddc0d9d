"""This process's own gradient, caught in the backward pass before it is averaged with the others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class LocalGradients:
    """Sums what backward passes send to the leaves of a graph, before anything else sees it.

    Attributes:
        of: the sum by leaf, in memory of its own.

    >>> import torch
    >>> w, own = torch.ones(2, requires_grad=True), LocalGradients()
    >>> own.watch([w])
    >>> (3 * w).sum().backward()
    >>> own.unwatch()
    >>> own.of[w]
    tensor([3., 3.])
    """

    def __init__(self) -> None:
        self.of: dict[Tensor, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, leaves: Sequence[Tensor], scale: Tensor | None = None) -> None:
        """Before a backward pass. The leaves' own hooks run first.

        Args:
            leaves: the tensors to watch, until `unwatch`.
            scale: what the loss was multiplied by.
        """
        hooks = ((leaf, self._adding(leaf, scale)) for leaf in leaves if leaf.requires_grad)
        self._handles += [leaf.register_hook(hook) for leaf, hook in hooks]

    def unwatch(self) -> None:
        """After the backward pass."""
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        """Forget all of it."""
        self.of = {}

    def _adding(self, leaf: Tensor, scale: Tensor | None) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            # A copy: the gradient's memory may become leaf.grad, and be averaged in place.
            dense = dense.clone() if scale is None else dense / scale
            self.of[leaf] = self.of[leaf] + dense if leaf in self.of else dense

        return hook
