"""Several optimizers: hybrids, schedules, layers trained by themselves, GANs, actors and critics."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from behavior.zoo.loops_losses import fake, real
from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loader, loop, mlp, parts, sgd


class Orthogonal(Optimizer):
    """Momentum whose matrices are made orthogonal by Newton-Schulz iterations, as in Muon."""

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    kept.mul_(group["momentum"]).add_(p.grad)
                    p.sub_(group["lr"] * _orthogonal(kept))
        return loss


def _orthogonal(matrix: Tensor) -> Tensor:
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        x = 1.5 * x - 0.5 * x @ x.T @ x
    return x


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() != 2]


def hybrid(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    return Orthogonal(matrices(model)), torch.optim.AdamW(vectors(model), lr=0.03, weight_decay=0.1)


# Hybrids


def _round(witness: Witness, attach: bool = True, zero: str = "together") -> None:
    model = mlp()
    muon, adamw = hybrid(model)
    witness.watch(model, [muon, adamw], attach)
    for x, y in batches():
        if zero == "together":
            muon.zero_grad()
            adamw.zero_grad()
        elif zero == "in place":
            muon.zero_grad(set_to_none=False)
            adamw.zero_grad(set_to_none=False)
        loss = mse_loss(model(x), y)
        loss.backward()
        kept = gradients(model)
        witness.truth(lambda: mse_loss(model(x), y), moving=muon)
        muon.step()
        if zero == "after each":
            muon.zero_grad()
        witness.truth(taken_before(model, kept, loss), moving=adamw, hessian=False)
        adamw.step()
        if zero == "after each":
            adamw.zero_grad()


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def taken_before(model: nn.Module, kept: list[Tensor], loss: Tensor) -> Callable[[], Tensor]:
    """A loss of this value and this gradient at the present weights, which was evaluated at earlier ones."""
    value, at = loss.detach().clone(), [p.detach().clone() for p in model.parameters()]

    def evaluate() -> Tensor:
        offsets = zip(kept, model.parameters(), at, strict=True)
        return value + sum(((g * (p - w)).sum() for g, p, w in offsets), torch.zeros(()).double())

    return evaluate


@loop("several", "Muon for matrices, AdamW for the rest")
def hybrid_attached(witness: Witness) -> None:
    _round(witness)


@loop("several", "Muon for matrices, AdamW for the rest, no attach")
def hybrid_no_attach(witness: Witness) -> None:
    _round(witness, attach=False)


@loop("several", "a hybrid that zeroes gradients in place")
def hybrid_zeroed_in_place(witness: Witness) -> None:
    _round(witness, zero="in place")


@loop("several", "a hybrid whose optimizers zero their gradients right after their steps")
def hybrid_zeroed_after_each(witness: Witness) -> None:
    _round(witness, zero="after each")


@loop("several", "a hybrid whose optimizers zero their gradients right after their steps, no attach")
def hybrid_zeroed_after_each_no_attach(witness: Witness) -> None:
    _round(witness, attach=False, zero="after each")


@loop("several", "a hybrid that never zeroes", {"loss", "clr"} | HG)
def hybrid_never_zeroed(witness: Witness) -> None:
    model = mlp()
    muon, adamw = hybrid(model)
    witness.watch(model, [muon, adamw])
    for t, (x, y) in enumerate(batches()):
        loss = mse_loss(model(x), y)
        loss.backward()
        kept = gradients(model)
        witness.truth(None if t else lambda: mse_loss(model(x), y), moving=muon)
        muon.step()
        witness.truth(None if t else taken_before(model, kept, loss), moving=adamw, hessian=False)
        adamw.step()


def _alternate(witness: Witness, ratio: int, attach: bool, accumulate: bool = False) -> None:
    """The first optimizer steps at every batch, the second at every ``ratio``-th."""
    model = mlp()
    first, second = hybrid(model)
    witness.watch(model, [first, second], attach)
    value = torch.zeros(()).double()
    for t, (x, y) in enumerate(batches(count=2 * ratio)):
        first.zero_grad()
        if not accumulate:
            second.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        kept = gradients(model)
        value = value + loss.detach() if accumulate else loss.detach()
        witness.truth(lambda: mse_loss(model(x), y), moving=first)
        first.step()
        if t % ratio == ratio - 1:
            witness.truth(taken_before(model, kept, value), moving=second, hessian=False)
            second.step()
            second.zero_grad()
            value = torch.zeros(()).double()


@loop("several", "a schedule of 5:1")
def five_to_one(witness: Witness) -> None:
    _alternate(witness, 5, attach=True)


@loop("several", "a schedule of 5:1, no attach")
def five_to_one_no_attach(witness: Witness) -> None:
    _alternate(witness, 5, attach=False)


@loop("several", "one of two optimizers accumulates over the steps of the other")
def one_accumulates(witness: Witness) -> None:
    _alternate(witness, 3, attach=True, accumulate=True)


@loop("several", "each has a backward pass of its own, at the weights that the other left")
def turns(witness: Witness) -> None:
    model = mlp()
    optimizers = hybrid(model)
    witness.watch(model, optimizers)
    for x, y in batches():
        for optimizer in optimizers:
            model.zero_grad()
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y), moving=optimizer)
            optimizer.step()


@loop("several", "each in its turn; the other's gradients are left there, and join its next ones", HG)
def turns_own_zeroed(witness: Witness) -> None:
    model = mlp()
    optimizers = hybrid(model)
    witness.watch(model, optimizers)
    pending: list[Tensor] = [torch.zeros(()).double()] * 2
    for t, (x, y) in enumerate(batches()):
        optimizer = optimizers[t % 2]
        loss = mse_loss(model(x), y)
        loss.backward()
        pending = [value + loss.detach() for value in pending]
        whole = (lambda: mse_loss(model(x), y)) if t == 0 else taken_before(model, gradients(model), pending[t % 2])
        witness.truth(whole, moving=optimizer, hessian=t == 0)
        optimizer.step()
        optimizer.zero_grad()
        pending[t % 2] = torch.zeros(()).double()


@loop("several", "micro-batches under both")
def both_accumulate(witness: Witness) -> None:
    model = mlp()
    muon, adamw = hybrid(model)
    witness.watch(model, [muon, adamw])
    for x, y in batches():
        model.zero_grad()
        total = torch.zeros(()).double()
        for u, v in parts(x, y):
            loss = mse_loss(model(u), v) / 2
            loss.backward()
            total = total + loss.detach()
        kept = gradients(model)
        witness.truth(lambda: sum(mse_loss(model(u), v) / 2 for u, v in parts(x, y)), moving=muon)
        muon.step()
        witness.truth(taken_before(model, kept, total), moving=adamw, hessian=False)
        adamw.step()


@loop("several", "discriminative rates by two SGDs, with schedulers and epochs")
def schedulers_on_each(witness: Witness) -> None:
    model = mlp()
    body, head = sgd(model[0], 0.01), sgd(model[2], 0.2, momentum=0.5)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(body, 0.5),
        torch.optim.lr_scheduler.StepLR(head, 1, gamma=0.9),
    ]
    probe = witness.watch(model, [body, head], body=schedulers[0], head=schedulers[1])
    data = loader(count=2)
    for epoch in probe.epochs(2):
        for x, y in probe.batches(data):
            body.zero_grad()
            head.zero_grad()
            loss = mse_loss(model(x), y)
            probe.backward(loss)
            kept = gradients(model)
            witness.truth(lambda: mse_loss(model(x), y), moving=body, epoch=epoch)
            body.step()
            witness.truth(taken_before(model, kept, loss), moving=head, epoch=epoch, hessian=False)
            head.step()
        for scheduler in schedulers:
            scheduler.step()


@loop("several", "two groups in the first optimizer, one in the second; rates differ")
def groups_in_each(witness: Witness) -> None:
    model = mlp(3, 4, 4, 1)
    first = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}], lr=0.05)
    second = torch.optim.Adam(model[4].parameters(), lr=0.02)
    witness.watch(model, [first, second])
    for x, y in batches():
        model.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        kept = gradients(model)
        witness.truth(lambda: mse_loss(model(x), y), moving=first)
        first.step()
        witness.truth(taken_before(model, kept, loss), moving=second, hessian=False)
        second.step()


@loop("several", "an optimizer that never steps")
def never_steps(witness: Witness) -> None:
    model = mlp()
    used, unused = sgd(model), torch.optim.Adam(model.parameters())
    witness.watch(model, [used, unused], attach=False)
    for x, y in batches():
        used.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), moving=used)
        used.step()


@loop("several", "an optimizer that never steps, and whose gradients pile up")
def never_steps_nor_zeroes(witness: Witness) -> None:
    model = mlp()
    used, unused = sgd(model[0]), torch.optim.Adam(model[2].parameters())
    witness.watch(model, [used, unused])
    for x, y in batches():
        used.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), moving=used)
        used.step()


@loop("several", "an optimizer that was thrown away before training")
def thrown_away(witness: Witness) -> None:
    model = mlp()
    optimizer: Any = torch.optim.Adam(model.parameters())
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer)  # which refers to it, and it to itself
    del scheduler
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("several", "the same parameters under two optimizers: Adam first, then SGD")
def phases(witness: Witness) -> None:
    model = mlp()
    adam, plain = torch.optim.Adam(model.parameters(), lr=0.05), sgd(model)
    witness.watch(model, [adam, plain], attach=False)
    for t, (x, y) in enumerate(batches()):
        optimizer = adam if t < 2 else plain
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), moving=optimizer)
        optimizer.step()


@loop("several", "gradients of the other optimizer zeroed by hand between the two steps", ALL_OF_LOSS)
def zeroed_between(witness: Witness) -> None:
    model = mlp()
    first, second = sgd(model[0]), sgd(model[2])
    witness.watch(model, [first, second])
    for x, y in batches():
        model.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), moving=first)
        first.step()
        for p in model[2].parameters():
            p.grad.mul_(0.5)
        witness.truth(None, moving=second)
        second.step()


@loop("several", "closures in both steps")
def closures(witness: Witness) -> None:
    model = mlp()
    optimizers = hybrid(model)
    witness.watch(model, optimizers)
    for x, y in batches():
        for optimizer in optimizers:

            def closure() -> Tensor:
                model.zero_grad()
                loss = mse_loss(model(x), y)
                loss.backward()
                witness.truth(lambda: mse_loss(model(x), y), moving=optimizer)
                return loss

            optimizer.step(closure)


def _scaled(witness: Witness, attach: bool = True, overflow: tuple[int, int] | None = None) -> None:
    """``overflow``: the update at which a gradient overflows, and whose it is."""
    model = mlp()
    optimizers = [sgd(model[0]), torch.optim.Adam(model[2].parameters(), lr=0.02)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    in_order = optimizers[::-1] if overflow == (0, 0) else optimizers  # of their first updates
    witness.watch(model, in_order, attach, **({"scaler": scaler} if attach else {}))
    for t, (x, y) in enumerate(batches()):
        model.zero_grad()
        loss = mse_loss(model(x), y)
        scaler.scale(loss).backward()
        if overflow is not None and t == overflow[0]:
            model[2 * overflow[1]].weight.grad.fill_(torch.inf)
        kept = [g / scaler.get_scale() for g in gradients(model)]
        moved = False
        for i, optimizer in enumerate(optimizers):
            if (t, i) != overflow:
                whole = taken_before(model, kept, loss) if moved else lambda: mse_loss(model(x), y)
                witness.truth(whole, moving=optimizer, hessian=not moved, scale=scaler.get_scale())
                moved = True
            scaler.step(optimizer)
        scaler.update()


@loop("several", "a GradScaler with one update for both")
def scaled_both(witness: Witness) -> None:
    _scaled(witness)


@loop("several", "a GradScaler skips the step of the first of them")
def scaled_first_skipped(witness: Witness) -> None:
    _scaled(witness, overflow=(2, 0))


@loop("several", "a GradScaler skips the very first step, no attach")
def scaled_very_first_skipped(witness: Witness) -> None:
    _scaled(witness, attach=False, overflow=(0, 0))


@loop("several", "a GradScaler skips the step of the second of them")
def scaled_one_skipped(witness: Witness) -> None:
    _scaled(witness, overflow=(2, 1))


@loop("several", "a GradScaler skips the first step of one of them, no attach")
def scaled_no_attach(witness: Witness) -> None:
    _scaled(witness, attach=False, overflow=(0, 1))


# Layers trained by themselves


def _layers(witness: Witness, attach: bool = True) -> None:
    layers = nn.ModuleList([mlp(3, 4), mlp(4, 4)])
    heads = nn.ModuleList([mlp(4, 1), mlp(4, 1)])
    model = nn.ModuleList([layers, heads])
    optimizers = [sgd(nn.ModuleList(pair)) for pair in zip(layers, heads, strict=True)]
    witness.watch(model, optimizers, attach)
    for x, y in batches():
        h = x
        for layer, head, optimizer in zip(layers, heads, optimizers, strict=True):
            at = h.detach()
            optimizer.zero_grad()
            mse_loss(head(layer(at)), y).backward()
            witness.truth(lambda: mse_loss(head(layer(at)), y), moving=optimizer)
            optimizer.step()
            h = layer(at)


@loop("several", "layers with losses and optimizers of their own", HG)
def layer_wise(witness: Witness) -> None:
    _layers(witness)


@loop(
    "several", "layers with losses of their own, no attach: nothing says that they are one model", refused="--optimizer"
)
def layer_wise_no_attach(witness: Witness) -> None:
    _layers(witness, attach=False)


@loop("several", "layers with losses of their own, which step together at the end", HG)
def layer_wise_together(witness: Witness) -> None:
    model = mlp(3, 4, 4)
    heads = [mlp(4, 1), mlp(4, 1)]
    whole = nn.ModuleList([model, *heads])
    optimizers = [sgd(nn.ModuleList(pair)) for pair in zip((model[0], model[2]), heads, strict=True)]
    witness.watch(whole, optimizers)
    for x, y in batches():
        first = torch.tanh(model[0](x)).detach()
        losses = [
            lambda: mse_loss(heads[0](torch.tanh(model[0](x))), y),
            lambda: mse_loss(heads[1](model[2](first)), y),
        ]
        whole.zero_grad()
        for loss in losses:
            loss().backward()
        for loss, optimizer in zip(losses, optimizers, strict=True):
            witness.truth(loss, moving=optimizer)
            optimizer.step()


# GANs, actors and critics


class Generator(nn.Sequential):
    pass


class Critic(nn.Sequential):
    pass


def _gan(witness: Witness, attach: str | None, of: str = "generator") -> None:
    generator, critic = Generator(*mlp(3, 4, 2)), Critic(*mlp(2, 4, 1))
    of_generator, of_critic = torch.optim.Adam(generator.parameters(), lr=0.02), sgd(critic)
    if of == "generator":
        witness.watch(generator, of_generator, attach is not None)
    else:
        witness.watch(critic, of_critic, attach is not None)
    for x, y in batches(features=3, targets=2):
        of_critic.zero_grad()
        made = generator(x).detach()
        (real(critic(y)) + fake(critic(made))).backward()
        if of == "critic":
            witness.truth(lambda: real(critic(y)) + fake(critic(made)))
        of_critic.step()
        of_generator.zero_grad()
        real(critic(generator(x))).backward()
        if of == "generator":
            witness.truth(lambda: real(critic(generator(x))))
        of_generator.step()


@loop("several", "GAN, attach on the generator's optimizer")
def gan_attached(witness: Witness) -> None:
    _gan(witness, "generator")


@loop("several", "GAN, no attach", refused="0: Adam with 4 tensors .* of Generator; 1: SGD .* of Critic")
def gan_no_attach(witness: Witness) -> None:
    _gan(witness, None)


for _of, _choice in (("generator", "Generator"), ("critic", "Critic"), ("generator", "Adam"), ("critic", "1")):

    def _chosen(witness: Witness, of: str = _of) -> None:
        _gan(witness, None, of)

    _chosen.__name__ = f"gan_optimizer_{_choice.lower()}"
    loop(
        "several", f"GAN, no attach, --optimizer {_choice}", ALL_OF_LOSS if _of == "critic" else (), optimizer=_choice
    )(_chosen)


@loop("several", "GAN, --optimizer of a class that is not there", refused="true of no optimizer", optimizer="Lion")
def gan_optimizer_unknown(witness: Witness) -> None:
    _gan(witness, None)


@loop("several", "GAN, --optimizer and attach", refused="Leave one out", optimizer="0")
def gan_optimizer_and_attach(witness: Witness) -> None:
    _gan(witness, "generator")


def _actor_critic(witness: Witness, attach: bool) -> None:
    actor, critic = mlp(3, 4, 2), mlp(3, 4, 1)
    of_actor, of_critic = sgd(actor), torch.optim.Adam(critic.parameters(), lr=0.02)
    witness.watch(actor, of_actor, attach)
    for x, y in batches():
        value = critic(x)
        advantage = (y - value).detach()
        policy = lambda: -(actor(x).log_softmax(1)[:, :1] * advantage).mean()  # noqa: E731
        of_actor.zero_grad()
        policy().backward()
        witness.truth(policy)
        of_actor.step()
        of_critic.zero_grad()
        mse_loss(value, y).backward()
        of_critic.step()


@loop("several", "actor and critic, attach on the actor's")
def actor_and_critic(witness: Witness) -> None:
    _actor_critic(witness, attach=True)


@loop("several", "actor and critic, no attach", refused="Two optimizers step")
def actor_and_critic_no_attach(witness: Witness) -> None:
    _actor_critic(witness, attach=False)


# What stays refused


@loop("several", "a second optimizer of the model that is made after the first step", refused="train the same model")
def made_later(witness: Witness) -> None:
    model = mlp()
    witness.watch(model, sgd(model), attach=False)
    optimizer = sgd(model)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            optimizer = torch.optim.Adam(model.parameters())
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


class Around(Optimizer):
    """Steps another optimizer in its own step."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@loop("several", "an optimizer that steps another one, both attached", refused="within Around.step")
def nested(witness: Witness) -> None:
    model = mlp()
    inner = sgd(model)
    outer = Around(inner)
    witness.watch(model, [outer, inner])
    for x, y in batches():
        outer.zero_grad()
        mse_loss(model(x), y).backward()
        outer.step()


@loop("several", "LBFGS beside SGD", refused="LBFGS evaluates its closure several times")
def lbfgs_beside(witness: Witness) -> None:
    model = mlp()
    witness.watch(model, [sgd(model[0]), torch.optim.LBFGS(model[2].parameters())])
