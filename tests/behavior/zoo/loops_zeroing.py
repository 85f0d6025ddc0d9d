"""Loops that throw gradients away in their own ways."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import torch
from torch.nn.functional import mse_loss

from behavior.zoo.witness import ALL_OF_LOSS, Witness, batches, loader, loop, mlp, sgd


@loop("zeroing", "zero_grad before each backward pass, epochs named")
def zero_grad(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    probe = witness.watch(model, optimizer)
    data = loader()
    for epoch in probe.epochs(2):
        for x, y in data:
            optimizer.zero_grad()
            probe.backward(mse_loss(model(x), y))
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()


@loop("zeroing", "model.zero_grad(set_to_none=False), no attach, epochs of a loader")
def model_zero_grad_in_place(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    witness.watch(model, optimizer, attach=False)
    data = loader(count=2)
    for epoch in range(2):
        for x, y in data:
            model.zero_grad(set_to_none=False)
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()


@loop("zeroing", "p.grad.zero_() by hand before each backward pass")
def zeroed_by_hand(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "p.grad = None by hand after each step")
def set_to_none_by_hand(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    witness.watch(model, optimizer)
    for x, y in batches():
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        for p in model.parameters():
            p.grad = None


@loop("zeroing", "FGSM: a backward pass for the attack, p.grad.zero_() by hand, and one to train on", ALL_OF_LOSS)
def fgsm_zeroed_by_hand(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        mse_loss(model(x), y).backward()
        bad = (x + 0.1 * x.grad.sign()).detach()
        for p in model.parameters():
            p.grad.zero_()
        mse_loss(model(bad), y).backward()
        witness.truth(lambda: mse_loss(model(bad), y))
        optimizer.step()
