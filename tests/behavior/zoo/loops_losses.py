"""Loops that do things with their losses, and with losses of other models."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax, mse_loss, softmax
from torch.utils.checkpoint import checkpoint

from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loader, loop, mlp, parts, sgd, simple


def logged(witness: Witness, log: Callable[[Tensor], object], attach: bool = True, before: bool = False) -> None:
    """A loop that logs its loss after the backward pass, or ``before`` it."""
    model, optimizer, _ = simple(witness, attach)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        if before:
            log(loss)
        loss.backward()
        if not before:
            log(loss)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "running += loss, where running is the first loss, detached")
def running_in_place(witness: Witness) -> None:
    running: list[Tensor] = []

    def log(loss: Tensor) -> None:
        running.append(loss.detach()) if not running else None
        running[0] += loss.detach()

    logged(witness, log)


@loop("losses", "each loss's detached value smoothed in place: v.mul_(0.1).add_(average)")
def smoothed_in_place(witness: Witness) -> None:
    average = torch.zeros((), dtype=torch.float64)
    logged(witness, lambda loss: average.copy_(loss.detach().mul_(0.1).add_(average, alpha=0.9)), attach=False)


@loop("losses", "total_loss += loss.item()")
def total_of_items(witness: Witness) -> None:
    total = [0.0]
    logged(witness, lambda loss: total.append(total.pop() + loss.item()))


@loop("losses", "a meter that starts at 0 and adds detached losses")
def meter(witness: Witness) -> None:
    total: list[Any] = [0]
    logged(witness, lambda loss: total.append(total.pop() + loss.detach()), before=True)


@loop("losses", "a list of losses with their graphs, averaged at the end")
def list_of_losses(witness: Witness) -> None:
    kept: list[Tensor] = []
    logged(witness, kept.append)
    torch.stack([loss.detach() for loss in kept]).mean().item()


@loop("losses", "loss *= n for the log, in place after the backward pass")
def multiplied_in_place(witness: Witness) -> None:
    def log(loss: Tensor) -> None:
        loss *= 6

    logged(witness, log)


@loop("losses", "loss.data /= n for the log, after the backward pass, no attach")
def data_divided(witness: Witness) -> None:
    logged(witness, lambda loss: loss.data.div_(4), attach=False)


@loop("losses", "loss.detach().numpy() added to in place")
def numpy_in_place(witness: Witness) -> None:
    def log(loss: Tensor) -> None:
        array = loss.detach().numpy()
        array += 1.0

    logged(witness, log)


@loop("losses", "loss.zero_() under no_grad after the backward pass")
def loss_zeroed(witness: Witness) -> None:
    logged(witness, torch.no_grad()(lambda loss: loss.zero_()))


@loop("losses", "loss.detach_() after the backward pass")
def loss_detached(witness: Witness) -> None:
    logged(witness, lambda loss: loss.detach_())


@loop("losses", "loss = loss.item() after the backward pass: the name is taken by a number")
def loss_reassigned(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        probe.backward(loss)
        loss = loss.item() * len(x)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        del loss


@loop("losses", "float64 model, the loss taken in float32")
def loss_of_float32(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y).float())
        witness.truth(lambda: mse_loss(model(x), y).float())
        optimizer.step()


@loop("losses", "the loss has one element and one dimension")
def loss_of_one_element(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).reshape(1).backward()
        witness.truth(lambda: mse_loss(model(x), y).reshape(1))
        optimizer.step()


@loop("losses", "a constant added to the loss, detached (a margin, a baseline)")
def detached_constant(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y) + y.square().mean())
        witness.truth(lambda: mse_loss(model(x), y) + y.square().mean())
        optimizer.step()


@loop("losses", "flooding: (loss - b).abs() + b")
def flooding(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward((mse_loss(model(x), y) - 0.9).abs() + 0.9)
        witness.truth(lambda: (mse_loss(model(x), y) - 0.9).abs() + 0.9)
        optimizer.step()


@loop("losses", "weight penalty by hand in the loss")
def penalty_in_loss(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())

    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(loss_of(x, y))
        witness.truth(lambda: loss_of(x, y))
        optimizer.step()


@loop("losses", "TD target of the same network, under no_grad (DQN)", HG)
def td_target(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        with torch.no_grad():
            target = y + 0.9 * model(x.flip(0))
        optimizer.zero_grad()
        mse_loss(model(x), target).backward()
        witness.truth(lambda: mse_loss(model(x), target))
        optimizer.step()


@loop("losses", "stop-gradient on one of two views of the same network (SimSiam)", HG)
def stop_gradient(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, _ in batches():
        optimizer.zero_grad()
        one, two = model(x), model(x + 0.1)
        probe.backward((mse_loss(one, two.detach()) + mse_loss(two, one.detach())) / 2)
        a, b = one.detach(), two.detach()
        witness.truth(lambda: (mse_loss(model(x), b) + mse_loss(model(x + 0.1), a)) / 2)
        optimizer.step()


@loop("losses", "straight-through estimator: h + (h.round() - h).detach()", HG)
def straight_through(witness: Witness) -> None:
    body, head = mlp(3, 4), mlp(4, 1)
    model = nn.Sequential(body, head)
    optimizer = sgd(model)
    probe = witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        h = body(x)
        rest = (h.round() - h).detach()
        probe.backward(mse_loss(head(h + rest), y))
        witness.truth(lambda: mse_loss(head(body(x) + rest), y))
        optimizer.step()


@loop("losses", "actor and critic in one model, advantage detached, losses summed", HG)
def advantage_detached(witness: Witness) -> None:
    body, actor, critic = mlp(3, 4), mlp(4, 2), mlp(4, 1)
    model = nn.ModuleList([body, actor, critic])
    optimizer = sgd(model)
    probe = witness.watch(model, optimizer)

    def losses(x: Tensor, y: Tensor, advantage: Tensor | None) -> tuple[Tensor, Tensor]:
        h = body(x).tanh()
        value = critic(h)
        if advantage is None:
            advantage = (y - value).detach()
        return -(advantage * log_softmax(actor(h), 1)[:, :1]).mean() + mse_loss(value, y), advantage

    for x, y in batches():
        optimizer.zero_grad()
        loss, kept = losses(x, y, None)
        probe.backward(loss)
        witness.truth(lambda: losses(x, y, kept)[0])
        optimizer.step()


@loop("losses", "a batch with a nan is left out before the backward pass")
def nan_left_out(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for step, (x, y) in enumerate(batches(5)):
        loss = mse_loss(model(x), y) * (float("nan") if step == 2 else 1.0)
        if torch.isnan(loss):
            continue
        optimizer.zero_grad()
        loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "a step with an infinite gradient is left out after the backward pass, the next one zeroes")
def infinity_left_out(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for step, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y) * (float("inf") if step == 2 else 1.0))
        if not all(p.grad.isfinite().all() for p in model.parameters()):
            continue
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "backward inside a helper function that returns a number")
def helper_function(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)

    def closure(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss.item()

    for x, y in batches():
        closure(x, y)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "a caller under no_grad, forward and backward under enable_grad")
def caller_under_no_grad(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    with torch.no_grad():
        for x, y in batches():
            optimizer.zero_grad()
            with torch.enable_grad():
                mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y))
            optimizer.step()


@loop("losses", "a loss evaluated once more for the log, with its graph, never taken backward")
def evaluated_twice(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    log = []
    for x, y in batches():
        optimizer.zero_grad()
        log.append(mse_loss(model(x), y).item())
        probe.backward(mse_loss(model(x), y))
        log.append(mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "probe.backward(loss, closure=...)")
def closure_given(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y), closure=lambda: mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "optimizer.step(closure), which zeroes, evaluates and takes backward")
def step_with_closure(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            witness.truth(lambda: mse_loss(model(x), y))
            return loss

        optimizer.step(closure)


@loop("losses", "one loss through probe.backward, the other one by loss.backward()", ALL_OF_LOSS)
def half_named(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        model(x).square().mean().backward()
        witness.truth(lambda: mse_loss(model(x), y) + model(x).square().mean())
        optimizer.step()


@loop("losses", "micro-batches of which only the last one goes through probe.backward", ALL_OF_LOSS)
def last_part_named(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        (x1, y1), (x2, y2) = parts(x, y)
        (mse_loss(model(x1), y1) / 2).backward()
        probe.backward(mse_loss(model(x2), y2) / 2)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "some steps by probe.backward, others by loss.backward()", ALL_OF_LOSS)
def named_at_some_steps(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        probe.backward(loss) if step % 2 else loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "losses of a dictionary summed")
def dictionary_of_losses(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)

    def losses(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = model(x)
        return {"fit": mse_loss(out, y), "size": 0.1 * out.square().mean(), "zero": out.sum() * 0.0}

    for x, y in batches():
        optimizer.zero_grad()
        sum(losses(x, y).values()).backward()
        witness.truth(lambda: sum(losses(x, y).values()))
        optimizer.step()


@loop("losses", "uncertainty weights of two tasks, trained beside the model")
def uncertainty_weights(witness: Witness) -> None:
    model = mlp(3, 5, 2)
    scales = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), scales], lr=0.05)
    probe = witness.watch(model, optimizer)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return ((model(x) - y).square().mean(0) * (-scales).exp() + scales).sum()

    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(loss_of(x, y))
        witness.truth(lambda: loss_of(x, y))
        optimizer.step()


# Losses of two models


@loop("losses", "a frozen teacher gives the targets")
def distillation(witness: Witness) -> None:
    teacher = mlp(3, 5, 4).eval().requires_grad_(False)
    model = mlp(3, 5, 4)
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    data = loader(2)
    for epoch in range(2):
        for x, _ in data:
            target = softmax(teacher(x) / 2, 1)
            optimizer.zero_grad()
            kl_div(log_softmax(model(x) / 2, 1), target, reduction="batchmean").backward()
            witness.truth(lambda: kl_div(log_softmax(model(x) / 2, 1), target, reduction="batchmean"), epoch=epoch)
            optimizer.step()


@loop("losses", "teacher and student are both trained, the teacher's backward pass comes first", ALL_OF_LOSS)
def teacher_first(witness: Witness) -> None:
    teacher, model = mlp(), mlp()
    optimizer, of_teacher = sgd(model), sgd(teacher)
    witness.watch(model, optimizer)
    for x, y in batches():
        of_teacher.zero_grad()
        mse_loss(teacher(x), y).backward()
        of_teacher.step()
        target = teacher(x).detach()
        optimizer.zero_grad()
        mse_loss(model(x), target).backward()
        witness.truth(lambda: mse_loss(model(x), target))
        optimizer.step()


@loop(
    "losses",
    "both are trained, both backward passes come before both steps",
    ALL_OF_LOSS,
)
def teacher_between(witness: Witness) -> None:
    teacher, model = mlp(), mlp()
    optimizer, of_teacher = sgd(model), sgd(teacher)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        of_teacher.zero_grad()
        mse_loss(teacher(x), y).backward()
        target = teacher(x).detach()
        mse_loss(model(x), target).backward()
        of_teacher.step()
        witness.truth(lambda: mse_loss(model(x), target))
        optimizer.step()


def gan(witness: Witness, train: Callable[..., None]) -> None:
    """A GAN; ``train`` takes one step of both, and the generator is measured."""
    generator, critic = mlp(3, 4, 2), mlp(2, 4, 1)
    of_generator, of_critic = sgd(generator), sgd(critic)
    witness.watch(generator, of_generator)
    for x, y in batches(features=3, targets=2):
        train(witness, generator, critic, of_generator, of_critic, x, y)


def real(out: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(out, torch.ones_like(out))


def fake(out: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(out, torch.zeros_like(out))


@loop("losses", "GAN as in torch's tutorial: errD_real.backward(), errD_fake.backward(), errG.backward()", ALL_OF_LOSS)
def gan_tutorial(witness: Witness) -> None:
    def train(witness: Witness, g: Any, d: Any, of_g: Any, of_d: Any, z: Tensor, y: Tensor) -> None:
        d.zero_grad()
        real(d(y)).backward()
        made = g(z)
        fake(d(made.detach())).backward()
        of_d.step()
        g.zero_grad()
        real(d(made)).backward()
        witness.truth(lambda: real(d(g(z))))
        of_g.step()

    gan(witness, train)


@loop("losses", "GAN, the generator first; its gradients in the critic stay until the critic's zero_grad", ALL_OF_LOSS)
def gan_generator_first(witness: Witness) -> None:
    def train(witness: Witness, g: Any, d: Any, of_g: Any, of_d: Any, z: Tensor, y: Tensor) -> None:
        of_g.zero_grad()
        real(d(g(z))).backward()
        witness.truth(lambda: real(d(g(z))))
        of_g.step()
        of_d.zero_grad()
        ((real(d(y)) + fake(d(g(z).detach()))) / 2).backward()
        of_d.step()

    gan(witness, train)


@loop("losses", "GAN, one joint backward pass of the sum of both losses, of which each model gets its own", ALL_OF_LOSS)
def gan_joint_sum(witness: Witness) -> None:
    def train(witness: Witness, g: Any, d: Any, of_g: Any, of_d: Any, z: Tensor, y: Tensor) -> None:
        of_g.zero_grad()
        of_d.zero_grad()
        for p in d.parameters():
            p.requires_grad_(False)
        of_generator = real(d(g(z)))
        for p in d.parameters():
            p.requires_grad_(True)
        of_critic = real(d(y)) + fake(d(g(z).detach()))
        (of_generator + of_critic).backward()
        kept = of_critic.detach()
        witness.truth(lambda: real(d(g(z))) + kept)  # a number that does not depend on the generator
        of_g.step()
        of_d.step()

    gan(witness, train)


@loop("losses", "GAN, torch.autograd.backward of the list of both losses", ALL_OF_LOSS)
def gan_joint_list(witness: Witness) -> None:
    def train(witness: Witness, g: Any, d: Any, of_g: Any, of_d: Any, z: Tensor, y: Tensor) -> None:
        of_g.zero_grad()
        of_d.zero_grad()
        for p in d.parameters():
            p.requires_grad_(False)
        of_generator = real(d(g(z)))
        for p in d.parameters():
            p.requires_grad_(True)
        torch.autograd.backward([of_generator, real(d(y)) + fake(d(g(z).detach()))])
        witness.truth(lambda: real(d(g(z))))
        of_g.step()
        of_d.step()

    gan(witness, train)


@loop("losses", "GAN, the critic's gradients reach the generator and are zeroed with it", ALL_OF_LOSS)
def gan_not_detached(witness: Witness) -> None:
    def train(witness: Witness, g: Any, d: Any, of_g: Any, of_d: Any, z: Tensor, y: Tensor) -> None:
        of_d.zero_grad()
        (real(d(y)) + fake(d(g(z)))).backward()  # made is not detached
        of_d.step()
        of_g.zero_grad()
        real(d(g(z))).backward()
        witness.truth(lambda: real(d(g(z))))
        of_g.step()

    gan(witness, train)


@loop("losses", "GAN, the critic steps twice for each step of the generator", ALL_OF_LOSS)
def gan_two_to_one(witness: Witness) -> None:
    def train(witness: Witness, g: Any, d: Any, of_g: Any, of_d: Any, z: Tensor, y: Tensor) -> None:
        for _ in range(2):
            of_d.zero_grad()
            (d(g(z).detach()).mean() - d(y).mean()).backward()
            of_d.step()
            for p in d.parameters():
                p.data.clamp_(-0.5, 0.5)
        of_g.zero_grad()
        (-d(g(z)).mean()).backward()
        witness.truth(lambda: -d(g(z)).mean())
        of_g.step()

    gan(witness, train)


@loop("losses", "the loss is of a part of a larger model; an auxiliary head has an optimizer of its own", ALL_OF_LOSS)
def probe_head(witness: Witness) -> None:
    model, head = mlp(3, 5, 2), mlp(2, 1)
    optimizer, of_head = sgd(model), sgd(head)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        of_head.zero_grad()
        out = model(x)
        mse_loss(out.sum(1, keepdim=True), y).backward()
        mse_loss(head(out.detach()), y).backward()
        of_head.step()
        witness.truth(lambda: mse_loss(model(x).sum(1, keepdim=True), y))
        optimizer.step()


@loop("losses", "MAML: inner steps by autograd.grad with create_graph, one outer backward pass")
def maml(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)

    def outer(x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        inner = mse_loss(torch.func.functional_call(model, weights, (x[:3],)), y[:3])
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        return mse_loss(torch.func.functional_call(model, fast, (x[3:],)), y[3:])

    for x, y in batches(3):
        optimizer.zero_grad()
        probe.backward(outer(x, y))
        witness.truth(lambda: outer(x, y))
        optimizer.step()


@loop("losses", "the log of a likelihood is maximized: (-objective).backward()")
def negative_objective(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        objective = -mse_loss(model(x), y)
        (-objective).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "a whole sequence in truncated pieces: the hidden state is detached between them", HG)
def truncated_sequence(witness: Witness) -> None:
    cell = nn.RNNCell(3, 4).double()
    optimizer = sgd(cell)
    probe = witness.watch(cell, optimizer)
    for x, _ in batches():
        optimizer.zero_grad()
        hidden, states = torch.zeros(2, 4, dtype=torch.float64), []
        for piece in x.chunk(3):
            states.append(hidden)
            hidden = cell(piece, hidden)
            probe.backward(hidden.square().mean())
            hidden = hidden.detach()
        pairs = list(zip(x.chunk(3), states, strict=True))
        witness.truth(lambda: sum(cell(piece, state).square().mean() for piece, state in pairs))
        optimizer.step()


@loop("losses", "loss += penalty in place, before the backward pass")
def penalty_added_in_place(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(model(x), y)
        loss += 0.1 * model(x).square().mean()
        loss *= 2
        return loss

    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(loss_of(x, y))
        witness.truth(lambda: loss_of(x, y))
        optimizer.step()


@loop("losses", "losses of the pieces of a batch added up in one tensor, one backward pass at the end")
def added_up(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64)
        for xs, ys in parts(x, y, 3):
            total += mse_loss(model(xs), ys)
        return total.squeeze()

    for x, y in batches():
        optimizer.zero_grad()
        loss_of(x, y).backward()
        witness.truth(lambda: loss_of(x, y))
        optimizer.step()


@loop("losses", "gradient norm logged by torch.autograd.grad(retain_graph=True) before the backward pass")
def logged_by_autograd_grad(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    log = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        log.append(sum(g.square().sum() for g in grads).item())
        loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


class Drawing(nn.Module):
    """Dropout and batch normalization around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = mlp(3, 5), nn.BatchNorm1d(5).double(), mlp(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.3))


@loop("losses", "dropout and batch normalization")
def dropout_and_norm(witness: Witness) -> None:
    model = Drawing()
    optimizer = sgd(model)
    probe = witness.watch(model, optimizer)

    def again(state: Tensor, x: Tensor, y: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return mse_loss(model(x), y)

    for x, y in batches():
        state = torch.get_rng_state()
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        witness.truth(lambda: again(state, x, y))
        optimizer.step()


def checkpointed(witness: Witness, reentrant: bool) -> None:
    body, head = mlp(3, 4), mlp(4, 1)
    model = nn.Sequential(body, nn.Tanh(), head)
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        x.requires_grad_(reentrant)
        mse_loss(head(checkpoint(lambda x: body(x).tanh(), x, use_reentrant=reentrant)), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "activation checkpointing", HG)
def checkpointing(witness: Witness) -> None:
    checkpointed(witness, reentrant=False)


@loop("losses", "reentrant activation checkpointing: backward passes inside the backward pass", HG)
def reentrant_checkpointing(witness: Witness) -> None:
    checkpointed(witness, reentrant=True)


def packed(witness: Witness, hooks: Callable[[], Any], changed: bool) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        with hooks():
            loss = mse_loss(model(x), y)
        loss.backward()
        witness.truth(lambda: mse_loss(model(x), y), changed=changed)
        optimizer.step()


@loop("losses", "activations kept on the host: torch.autograd.graph.save_on_cpu", HG)
def saved_on_cpu(witness: Witness) -> None:
    packed(witness, torch.autograd.graph.save_on_cpu, changed=False)


@loop("losses", "activations kept in bfloat16 (compressed by saved_tensors_hooks)", ALL_OF_LOSS)
def saved_in_bfloat16(witness: Witness) -> None:
    packed(
        witness,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.double()),
        changed=True,
    )


class Stored(torch.autograd.Function):
    """The square, which keeps its input on ctx without save_for_backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.h = h.detach()
        return h.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.h * gradient


@loop("losses", "a Function that stores on ctx without save_for_backward", HG)
def stored_on_ctx(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(Stored.apply(model(x) - y).mean())
        witness.truth(lambda: (model(x) - y).square().mean())
        optimizer.step()


class Sliced(torch.autograd.Function):
    """The square, whose backward leaves part of the derivative out, as a bug does."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return h * gradient


@loop("losses", "a Function whose backward forgets a factor", ALL_OF_LOSS)
def wrong_backward(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        Sliced.apply(model(x) - y).mean().backward()
        witness.truth(lambda: (model(x) - y).square().mean(), changed=True)
        optimizer.step()


@loop("losses", "an activation changed in place after it was used, where autograd does not see it (.data)", HG)
def activation_changed(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        inputs = x.clone()
        loss = mse_loss(model(inputs), y)
        loss.backward()
        inputs.data.zero_()  # the buffer of the loader is used again
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("losses", "one batch tensor for all steps, filled in place by the loader after each backward pass", HG)
def one_batch_tensor(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    x, y = (tensor.clone() for tensor in batches(1)[0])
    data = batches(5)
    for now, following in itertools.pairwise(data):
        x.copy_(now[0])
        y.copy_(now[1])
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        x.copy_(following[0])
        y.copy_(following[1])
        witness.truth(lambda: mse_loss(model(now[0]), now[1]))
        optimizer.step()
