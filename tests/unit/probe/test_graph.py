"""Walks over the graph of a loss."""

from __future__ import annotations

import torch

from geomprobe.probe.graph import graph_nodes, leaves_of


def test_leaves_are_those_that_a_backward_pass_fills() -> None:
    a, b, frozen = (torch.ones(2, requires_grad=True) for _ in range(3))
    loss = (a * b * frozen + a).sum()
    frozen.requires_grad_(False)
    assert {id(leaf) for leaf in leaves_of(loss)} == {id(a), id(b)}
    assert leaves_of(torch.ones(())) == []


def test_each_node_is_found_once() -> None:
    w = torch.ones(1, requires_grad=True)
    h = w * 2
    nodes = graph_nodes((h * h + h).sum())
    assert len(nodes) == len(set(nodes))
    assert sum(node.name() == "torch::autograd::AccumulateGrad" for node in nodes) == 1
