"""Loops whose gradient is of several backward passes, or is made by hand after them."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.nn.functional import mse_loss, smooth_l1_loss

from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loader, loop, mlp, parts, sgd, simple


@loop("accumulation", "two micro-batches, each loss divided by their number")
def micro_batches(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    data = loader(3)
    for epoch in probe.epochs(1):
        for x, y in data:
            optimizer.zero_grad()
            for xs, ys in parts(x, y):
                probe.backward(mse_loss(model(xs), ys) / 2)
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()


@loop("accumulation", "three micro-batches, losses not divided, no attach")
def micro_batches_summed(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False, lr=0.02)
    for x, y in batches():
        optimizer.zero_grad()
        for xs, ys in parts(x, y, 3):
            mse_loss(model(xs), ys).backward()
        witness.truth(lambda: 3 * mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "unequal parts, each weighted by its share")
def unequal_parts(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        for xs, ys in zip(x.split([1, 2, 3]), y.split([1, 2, 3]), strict=True):
            loss = mse_loss(model(xs), ys) * len(xs) / len(x)
            loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "a step at each second batch of a loader, and one for the incomplete rest")
def incomplete_rest(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    data = loader(5)
    for epoch in probe.epochs(1):
        kept = []
        for i, (x, y) in enumerate(data):
            probe.backward(mse_loss(model(x), y) / 2)
            kept.append((x, y))
            if i % 2 == 1 or i == len(data) - 1:
                witness.truth(lambda: sum(mse_loss(model(x), y) for x, y in kept) / 2, epoch=epoch)
                optimizer.step()
                optimizer.zero_grad()
                kept = []


@loop("accumulation", "gradients left over from the first epoch's incomplete rest go into the second")
def leftovers_of_an_epoch(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    data, kept = loader(3), []
    for epoch in range(2):
        for i, (x, y) in enumerate(data):
            mse_loss(model(x), y).backward()
            kept.append((x, y))
            if i % 2 == 1:
                witness.truth(lambda: sum(mse_loss(model(x), y) for x, y in kept), epoch=epoch)
                optimizer.step()
                optimizer.zero_grad()
                kept = []


def divided_by_hand(witness: Witness, divide: Callable[[nn.Parameter], object], attach: bool = True) -> None:
    model, optimizer, _ = simple(witness, attach)
    for x, y in batches():
        optimizer.zero_grad()
        for xs, ys in parts(x, y):
            mse_loss(model(xs), ys).backward()
        for p in model.parameters():
            divide(p)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


def divide(p: nn.Parameter) -> None:
    p.grad /= 2


@loop("accumulation", "two micro-batches, p.grad /= 2 afterwards", ALL_OF_LOSS)
def divided_in_place(witness: Witness) -> None:
    divided_by_hand(witness, divide)


@loop("accumulation", "two micro-batches, p.grad.data.div_(2) afterwards", ALL_OF_LOSS)
def divided_data(witness: Witness) -> None:
    divided_by_hand(witness, lambda p: p.grad.data.div_(2))


@loop("accumulation", "two micro-batches, p.grad = p.grad / 2 afterwards", ALL_OF_LOSS)
def divided_into_new(witness: Witness) -> None:
    divided_by_hand(witness, lambda p: setattr(p, "grad", p.grad / 2))


@loop("accumulation", "two micro-batches, torch._foreach_mul_(grads, 0.5) afterwards, no attach", ALL_OF_LOSS)
def divided_foreach(witness: Witness) -> None:
    divided_by_hand(witness, lambda p: torch._foreach_mul_([p.grad], 0.5), attach=False)


@loop("accumulation", "gradients divided by the number of tokens, known only after all micro-batches", ALL_OF_LOSS)
def divided_by_tokens(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        tokens = torch.zeros((), dtype=torch.float64)
        for xs, ys in parts(x, y):
            mask = (ys > -0.5).double()
            smooth_l1_loss(model(xs) * mask, ys * mask, reduction="sum").backward()
            tokens += mask.sum()
        for p in model.parameters():
            p.grad.div_(tokens)
        mask = (y > -0.5).double()
        witness.truth(lambda: smooth_l1_loss(model(x) * mask, y * mask, reduction="sum") / tokens)
        optimizer.step()


@loop("accumulation", "one loss taken backward twice, with retain_graph", HG)
def backward_twice(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        witness.truth(lambda: 2 * mse_loss(model(x), y))
        optimizer.step()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = mlp(3, 4), mlp(4, 1), mlp(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.left(h), self.right(h)


def two_tasks(witness: Witness, backward: Callable[[Tensor, Tensor], None], weights: tuple[float, float] = (1, 1)):
    model = TwoHeads()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        left, right = model(x)
        return mse_loss(left, y), smooth_l1_loss(right, -y)

    for x, y in batches():
        optimizer.zero_grad()
        backward(*losses(x, y))
        witness.truth(lambda: sum(c * loss for c, loss in zip(weights, losses(x, y), strict=True)))
        optimizer.step()


@loop("accumulation", "two tasks, a backward pass each, with retain_graph", HG)
def two_tasks_apart(witness: Witness) -> None:
    def of_both(left: Tensor, right: Tensor) -> None:
        left.backward(retain_graph=True)
        right.backward()

    two_tasks(witness, of_both)


@loop("accumulation", "two tasks' losses summed with weights")
def two_tasks_summed(witness: Witness) -> None:
    two_tasks(witness, lambda left, right: (0.3 * left + 2 * right).backward(), (0.3, 2))


@loop("accumulation", "torch.autograd.backward of two losses", ALL_OF_LOSS)
def backward_of_list(witness: Witness) -> None:
    two_tasks(witness, lambda left, right: torch.autograd.backward([left, right]))


@loop("accumulation", "torch.autograd.backward of two losses with weights", ALL_OF_LOSS)
def backward_of_weighted_list(witness: Witness) -> None:
    weights = [torch.tensor(0.3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)]
    two_tasks(witness, lambda left, right: torch.autograd.backward([left, right], weights), (0.3, 2))


@loop("accumulation", "loss.backward(gradient=0.3) for each task", ALL_OF_LOSS)
def backward_with_weight(witness: Witness) -> None:
    def of_both(left: Tensor, right: Tensor) -> None:
        left.backward(torch.tensor(0.3, dtype=torch.float64), retain_graph=True)
        right.backward(gradient=torch.tensor(2.0, dtype=torch.float64))

    two_tasks(witness, of_both, (0.3, 2))


@loop("accumulation", "loss.backward(torch.ones_like(loss))", HG)
def backward_with_one(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        probe.backward(loss, gradient=torch.ones_like(loss))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "a loss per sample, taken backward with gradient=ones", ALL_OF_LOSS)
def vector_loss(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, lr=0.02)
    for x, y in batches():
        optimizer.zero_grad()
        losses = mse_loss(model(x), y, reduction="none").squeeze(1)
        losses.backward(torch.ones_like(losses))
        witness.truth(lambda: mse_loss(model(x), y, reduction="sum"))
        optimizer.step()


@loop("accumulation", "a loss per sample, taken backward with importance weights", ALL_OF_LOSS)
def weighted_vector_loss(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    weights = torch.linspace(0, 0.5, 6, dtype=torch.float64)
    for x, y in batches():
        optimizer.zero_grad()
        torch.autograd.backward(mse_loss(model(x), y, reduction="none").squeeze(1), weights)
        witness.truth(lambda: weights @ mse_loss(model(x), y, reduction="none").squeeze(1))
        optimizer.step()


@loop("accumulation", "the output's own gradient given by hand: out.backward(dloss_dout)", ALL_OF_LOSS)
def output_backward(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        out = model(x)
        out.backward(2 * (out - y).detach() / len(x))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "split learning: the head's backward pass, then the body's with the cut's gradient", ALL_OF_LOSS)
def split_learning(witness: Witness) -> None:
    body, head = mlp(3, 4), mlp(4, 1)
    model = nn.Sequential(body, nn.Tanh(), head)
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        sent = body(x).tanh()
        received = sent.detach().requires_grad_()
        mse_loss(head(received), y).backward()
        sent.backward(received.grad)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "large batch in two stages (GradCache): gradients of the outputs first", ALL_OF_LOSS)
def gradient_cache(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.no_grad():
            outputs = torch.cat([model(xs) for xs in x.chunk(2)])
        outputs.requires_grad_()
        (outputs - y).square().mean().backward()
        for xs, slope in zip(x.chunk(2), outputs.grad.chunk(2), strict=True):
            (model(xs) * slope).sum().backward()
        witness.truth(lambda: (model(x) * outputs.grad).sum())  # what was taken backward into the weights
        optimizer.step()


@loop("accumulation", "loss.backward(inputs=[...]) for the head only")
def backward_of_inputs(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    head = list(model[-1].parameters())
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward(inputs=head)
        witness.truth(lambda: mse_loss(model[-1](model[:-1](x).detach()), y), hessian=False)
        optimizer.step()


# Gradients made, or changed, by hand


@loop("accumulation", "torch.autograd.grad, and p.grad assigned by hand", ALL_OF_LOSS)
def assigned_by_hand(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        grads = torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "torch.func.grad, and p.grad assigned by hand", ALL_OF_LOSS)
def assigned_from_func(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)

    def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(torch.func.functional_call(model, values, (x,)), y)

    for x, y in batches():
        grads = torch.func.grad(loss_of)({n: p.detach() for n, p in model.named_parameters()}, x, y)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "a loss for the log taken backward first, then p.grad assigned by hand", ALL_OF_LOSS)
def assigned_after_backward(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        smooth_l1_loss(model(x), y).backward()
        grads = torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad.copy_(g)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


def around_a_log(witness: Witness, log: Callable[[nn.Module, Callable[[], None]], None], attach: bool = True) -> None:
    """The training pass, then a pass for a log that leaves its gradients as they were, by the script's own means."""
    model, optimizer, _ = simple(witness, attach)
    (other_x, other_y), *data = batches(5)
    for x, y in data:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        log(model, lambda: mse_loss(model(other_x), other_y).backward())
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "gradients cloned, zeroed, another pass for a log, and copied back", ALL_OF_LOSS)
def saved_and_copied_back(witness: Witness) -> None:
    def log(model: nn.Module, backward: Callable[[], None]) -> None:
        saved = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=False)
        backward()
        for p, g in zip(model.parameters(), saved, strict=True):
            p.grad.copy_(g)

    around_a_log(witness, log)


@loop("accumulation", "p.grad taken off, another pass for a log, and the same tensors put back", ALL_OF_LOSS)
def taken_off_and_put_back(witness: Witness) -> None:
    def log(model: nn.Module, backward: Callable[[], None]) -> None:
        saved = [p.grad for p in model.parameters()]
        model.zero_grad()
        backward()
        for p, g in zip(model.parameters(), saved, strict=True):
            p.grad = g

    around_a_log(witness, log, attach=False)


@loop("accumulation", "another pass's gradients subtracted again after a log", ALL_OF_LOSS)
def added_and_subtracted(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    (other_x, other_y), *data = batches(5)
    for x, y in data:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        mse_loss(model(other_x), other_y).backward()
        for p, g in zip(model.parameters(), before, strict=True):
            p.grad.sub_(p.grad - g)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "SVRG: minus the gradient at a snapshot, plus its full gradient", ALL_OF_LOSS)
def svrg(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    old, data = copy.deepcopy(model), batches()

    def slopes(at: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(mse_loss(at(x), y), list(at.parameters()))

    full = slopes(old, torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    for x, y in data:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for p, a, b in zip(model.parameters(), slopes(old, x, y), full, strict=True):
            p.grad.add_(b - a)
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("accumulation", "PCGrad: each task's gradient projected, their sum assigned", ALL_OF_LOSS)
def pcgrad(witness: Witness) -> None:
    model = TwoHeads()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        found = []
        for out, target in zip(model(x), (y, -y), strict=True):
            optimizer.zero_grad()
            mse_loss(out, target).backward(retain_graph=True)
            found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        for p, a, b in zip(model.parameters(), *found, strict=True):
            if a is not None and b is not None and (dot := (a * b).sum()) < 0:
                a = a - dot * b / b.square().sum()
            p.grad = a if b is None else b if a is None else a + b
        witness.truth(None)
        optimizer.step()


@loop("accumulation", "gradients copied from a worker's copy of the model (A3C)", ALL_OF_LOSS)
def copied_from_worker(witness: Witness) -> None:
    shared = mlp()
    optimizer = sgd(shared)
    witness.watch(shared, optimizer)
    worker = copy.deepcopy(shared)
    for x, y in batches():
        worker.load_state_dict(shared.state_dict())
        optimizer.zero_grad()
        worker.zero_grad()
        mse_loss(worker(x), y).backward()
        for p, q in zip(worker.parameters(), shared.parameters(), strict=True):
            q._grad = p.grad
        witness.truth(lambda: mse_loss(shared(x), y))
        optimizer.step()


@loop("accumulation", "a master copy of the weights gets the float32 model's gradients", ALL_OF_LOSS)
def master_copy(witness: Witness) -> None:
    model = mlp().float()
    master = nn.ParameterList([nn.Parameter(p.detach().double()) for p in model.parameters()])
    optimizer = sgd(master)
    witness.watch(master, optimizer)
    for x, y in batches():
        model.zero_grad()
        loss = mse_loss(model(x.float()), y.float())
        loss.backward()
        for p, q in zip(model.parameters(), master, strict=True):
            q.grad = p.grad.double()
        kept = loss.detach()
        witness.truth(lambda: kept + 0.0 * sum(q.sum() for q in master), changed=True, hessian=False)
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(model.parameters(), master, strict=True):
                p.copy_(q)


def after_backward(witness: Witness, change: Callable[[nn.Module], None], attach: bool = True) -> None:
    """A loop that changes the gradient after the backward pass."""
    model, optimizer, _ = simple(witness, attach)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        change(model)
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


def each_gradient(change: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for p in model.parameters():
            if (new := change(p.grad)) is not None:
                p.grad = new

    return run


@loop("accumulation", "grokfast: p.grad + lambda * EMA of the gradients", ALL_OF_LOSS)
def grokfast(witness: Witness) -> None:
    averages: dict[str, Tensor] = {}

    def change(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            averages[name] = averages.get(name, p.grad.detach().clone()) * 0.9 + p.grad.detach() * 0.1
            p.grad.data = p.grad.data + averages[name] * 2.0

    after_backward(witness, change)


@loop("accumulation", "noise added to the gradients (DP-SGD, Langevin)", ALL_OF_LOSS)
def noisy_gradients(witness: Witness) -> None:
    after_backward(witness, each_gradient(lambda g: g.add_(torch.randn_like(g), alpha=0.1)))


@loop("accumulation", "gradient centralization: minus the mean of each row", ALL_OF_LOSS)
def centralized_gradients(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        for p in model.parameters():
            if p.dim() > 1:
                p.grad.add_(-p.grad.mean(dim=1, keepdim=True))

    after_backward(witness, change, attach=False)


@loop("accumulation", "weight decay added to the gradient by hand", ALL_OF_LOSS)
def decay_in_gradient(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad.add_(p.detach(), alpha=0.01)

    after_backward(witness, change)


@loop("accumulation", "each p.grad replaced by a clone", ALL_OF_LOSS)
def cloned_gradients(witness: Witness) -> None:
    after_backward(witness, each_gradient(lambda g: g.clone()))


@loop("accumulation", "sign of the gradients (signSGD by hand)", ALL_OF_LOSS)
def signs_of_gradients(witness: Witness) -> None:
    after_backward(witness, each_gradient(lambda g: g.sign()))


@loop("accumulation", "ascent: p.grad.neg_()", ALL_OF_LOSS)
def negative_gradients(witness: Witness) -> None:
    after_backward(witness, each_gradient(lambda g: g.neg_()), attach=False)


@loop("accumulation", "ascent: p.grad.data.neg_(), which leaves no version", ALL_OF_LOSS)
def negative_gradient_data(witness: Witness) -> None:
    after_backward(witness, lambda model: [p.grad.data.neg_() for p in model.parameters()])


@loop("accumulation", "gradients rounded to bfloat16 and back (compressed communication)", ALL_OF_LOSS)
def compressed_gradients(witness: Witness) -> None:
    after_backward(witness, each_gradient(lambda g: g.bfloat16().to(g)))


@loop("accumulation", "gradients of frozen rows set to 0 by a mask", ALL_OF_LOSS)
def masked_gradients(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        model[0].weight.grad[:2] = 0

    after_backward(witness, change)


@loop("accumulation", "written by p.grad.numpy(), which torch does not see", ALL_OF_LOSS)
def written_by_numpy(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        for p in model.parameters():
            array = p.grad.numpy()
            array *= 0.5

    after_backward(witness, change)


@loop("accumulation", "gradients of one sample after another, clipped, summed (DP-SGD)", ALL_OF_LOSS)
def per_sample_clipped(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches(3):
        optimizer.zero_grad()
        total = [torch.zeros_like(p) for p in model.parameters()]
        for i in range(len(x)):
            model.zero_grad()
            mse_loss(model(x[i]), y[i]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for t, p in zip(total, model.parameters(), strict=True):
                t.add_(p.grad)
        for t, p in zip(total, model.parameters(), strict=True):
            p.grad = t / len(x)
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("accumulation", "an SGD that maximizes")
def maximized(witness: Witness) -> None:
    model, optimizer, probe = simple(witness, maximize=True)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(-mse_loss(model(x), y))
        witness.truth(lambda: -mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "static loss scale by hand: loss * 1024, then p.grad /= 1024", ALL_OF_LOSS)
def static_loss_scale(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        (1024 * mse_loss(model(x), y)).backward()
        for p in model.parameters():
            p.grad /= 1024
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "one part by torch.autograd.backward imported by its name, one by loss.backward()", ALL_OF_LOSS)
def backward_by_its_name(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        (x1, y1), (x2, y2) = parts(x, y)
        backward(mse_loss(model(x1), y1) / 2)
        (mse_loss(model(x2), y2) / 2).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "one part taken backward in another thread", ALL_OF_LOSS)
def backward_in_thread(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        for xs, ys in parts(x, y):
            thread = threading.Thread(target=(mse_loss(model(xs), ys) / 2).backward)
            thread.start()
            thread.join()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("accumulation", "body and head frozen in turn: each gets the gradient of a loss of its own", ALL_OF_LOSS)
def frozen_in_turn(witness: Witness) -> None:
    body, head = mlp(3, 4), mlp(4, 1)
    model = nn.Sequential(body, nn.Tanh(), head)
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        for frozen, target in ((head, y), (body, -y)):
            frozen.requires_grad_(False)
            mse_loss(model(x), target).backward()
            frozen.requires_grad_(True)
        h, (weight, bias) = body(x).tanh().detach(), (p.detach().clone() for p in head.parameters())
        witness.truth(lambda: mse_loss(body(x).tanh() @ weight.T + bias, y) + mse_loss(head(h), -y))
        optimizer.step()


@loop("accumulation", "evolution strategy: p.grad assigned, no backward pass at all", ALL_OF_LOSS)
def evolution_strategy(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False, lr=0.02)
    for x, y in batches():
        for p in model.parameters():
            noise = 0.1 * torch.randn_like(p)
            with torch.no_grad():
                p.add_(noise)
                better = mse_loss(model(x), y)
                p.sub_(noise)
                p.grad = better * noise
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop(
    "accumulation",
    "loss.backward(create_graph=True), and the diagonal of H for the log (AdaHessian)",
    ALL_OF_LOSS,
)
def backward_with_create_graph(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    log = []
    for x, y in batches():
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mse_loss(model(x), y).backward(create_graph=True)
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in model.parameters()]
        grads = [p.grad for p in model.parameters()]
        products = torch.autograd.grad(grads, list(model.parameters()), signs)
        log.append([(h * s).mean().item() for h, s in zip(products, signs, strict=True)])
        for p in model.parameters():
            p.grad = p.grad.detach()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
