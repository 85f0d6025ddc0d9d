"""Walks over a loss's autograd graph; nothing in it is run."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


def graph_nodes(loss: Tensor) -> list[Node]:
    """Every node of the graph of ``loss``, a tensor that requires grad, each once."""
    root = get_gradient_edge(loss).node
    seen, pending, found = {root}, [root], []
    while pending:
        node = pending.pop()
        found.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return found


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors whose ``.grad`` a backward pass of ``loss`` would fill.

    >>> import torch
    >>> weight = torch.ones(3, requires_grad=True)
    >>> leaves_of((weight**2).sum())[0] is weight
    True
    """
    if not loss.requires_grad:
        return []
    named = "torch::autograd::AccumulateGrad"
    leaves = [node.variable for node in graph_nodes(loss) if node.name() == named]  # type: ignore[attr-defined]
    return [leaf for leaf in leaves if leaf.requires_grad]  # one frozen after the forward pass gets no gradient
