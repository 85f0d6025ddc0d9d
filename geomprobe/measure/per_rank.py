"""Each process's own gradient, before it is averaged with the others'.

What a gradient of a smaller minibatch would have measured is then seen within one run: NWT's question of how
RSI and EB depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from geomprobe.distributed.layout import Layout
from geomprobe.errors import UsageError
from geomprobe.measure.inner_products import InnerProducts

OWN_PRODUCTS = ("g.g", "w.g", "g.d")


class LocalGradients:
    """Sums what backward passes send to the leaves of a graph, before anything else sees it.

    Attributes:
        of: the sum by leaf, in memory of its own.

    >>> import torch
    >>> w, own = torch.ones(2, requires_grad=True), LocalGradients()
    >>> with own.watching([w]):
    ...     (3 * w).sum().backward()
    >>> own.of[w]
    tensor([3., 3.])
    """

    def __init__(self) -> None:
        self.of: dict[Tensor, Tensor] = {}

    @contextmanager
    def watching(self, leaves: Sequence[Tensor], scale: Tensor | None = None) -> Iterator[None]:
        """Around a backward pass. The hooks of the leaves that there are run first.

        Args:
            leaves: the tensors to watch.
            scale: what the loss was multiplied by.
        """
        with ExitStack() as stack:
            for leaf in leaves:
                if leaf.requires_grad:
                    stack.callback(leaf.register_hook(self._adding(leaf, scale)).remove)
            yield

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


class PerRankProducts:
    """Inner products of each rank's own gradient under DDP: ``g.g``, ``w.g`` and, of the final iterate, ``g.d``.

    Args:
        parameters: the weights, the same on every rank.
        layout: of the ranks.

    Attributes:
        columns: the rank and the product of each value in a row, over all ranks.

    Raises:
        UsageError: the training does not run under DDP.

    >>> import torch
    >>> PerRankProducts([torch.ones(1)], Layout("DDP", world_size=2)).columns[-1]
    (1, 'g.d')
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout) -> None:
        if layout.kind != "DDP":
            raise UsageError(
                f"Gradients of each rank were asked for, and this training is laid out as {layout.kind}: only under "
                "DDP does a rank have a whole gradient of its own. Leave the option out."
            )
        self._parameters = list(parameters)
        self._own = LocalGradients()
        self.columns = [(rank, product) for rank in range(layout.world_size) for product in OWN_PRODUCTS]

    def open(self, final: Sequence[Tensor]) -> None:
        """Make ready to measure against the final iterate."""
        self._products = InnerProducts(self._parameters, {"final": final})

    @contextmanager
    def watching(self, scale: Tensor | None) -> Iterator[None]:
        """Around a backward pass of a loss that was multiplied by ``scale``."""
        with self._own.watching(self._parameters, scale):
            yield

    def measure(self) -> Tensor:
        """This rank's values, of the backward passes since the last `discard`: the sum over micro-batches."""
        own = [self._own.of.get(parameter) for parameter in self._parameters]
        measured = self._products.measure(own)
        return measured[[self._products.names.index(name) for name in OWN_PRODUCTS]]

    def discard(self) -> None:
        """Forget the backward passes so far."""
        self._own.clear()
