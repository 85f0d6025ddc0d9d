"""Loops that move the weights themselves: before the forward pass, between backward and step, and after it."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel

from behavior.zoo.witness import (
    ALL_OF_LOSS,
    HG,
    LOSS,
    Witness,
    batches,
    elsewhere,
    loader,
    loop,
    mlp,
    sgd,
    simple,
)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is commonly written: the old weights come back as ``p.data = old``."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> list[Tensor]:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm(p=2) for p in params]).norm(p=2)
        for p in params:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (0.05 / (norm + 1e-12)))
        moved = [p.data - self.state[p]["old_p"] for p in params]
        self.zero_grad()
        return moved

    @torch.no_grad()
    def second_step(self, truth: Callable[[], None]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        truth()
        self.base_optimizer.step()
        self.zero_grad()


@loop("weights", "SAM, p.data = old_p before the base optimizer's step, no attach", LOSS)
def sam(witness: Witness) -> None:
    model = mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    witness.watch(model, optimizer.base_optimizer, attach=False)
    for x, y in batches():
        mse_loss(model(x), y).backward()
        moved = optimizer.first_step()
        mse_loss(model(x), y).backward()
        there = elsewhere(model, moved, lambda m: mse_loss(m(x), y))
        optimizer.second_step(lambda: witness.truth(there, hessian=False))


@loop("weights", "SAM, attached to the base optimizer", LOSS)
def sam_attached(witness: Witness) -> None:
    model = mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    probe = witness.watch(model, optimizer.base_optimizer)
    for x, y in batches():
        probe.backward(mse_loss(model(x), y))
        moved = optimizer.first_step()
        probe.backward(mse_loss(model(x), y))
        there = elsewhere(model, moved, lambda m: mse_loss(m(x), y))
        optimizer.second_step(lambda: witness.truth(there, hessian=False))


def moved_and_back(
    witness: Witness,
    move: Callable[[nn.Parameter, Tensor], object],
    back: Callable[[nn.Parameter, Tensor, Tensor], object],
    attach: bool = True,
) -> None:
    """SAM written into the loop: weights moved along the gradient, a second pass there, and moved back."""
    model, optimizer, _ = simple(witness, attach)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        old = [p.detach().clone() for p in model.parameters()]
        steps = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in model.parameters()]
        for p, step in zip(model.parameters(), steps, strict=True):
            move(p, step)
        offsets = [p.detach() - o for p, o in zip(model.parameters(), old, strict=True)]
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for p, step, o in zip(model.parameters(), steps, old, strict=True):
            back(p, step, o)
        witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), hessian=False)
        optimizer.step()


@loop("weights", "SAM in the loop: p.data.add_ and p.data.sub_", LOSS)
def sam_by_data(witness: Witness) -> None:
    moved_and_back(witness, lambda p, step: p.data.add_(step), lambda p, step, old: p.data.sub_(step))


@loop("weights", "SAM in the loop: p.add_ and p.sub_ under no_grad", LOSS)
def sam_under_no_grad(witness: Witness) -> None:
    moved_and_back(
        witness, torch.no_grad()(lambda p, step: p.add_(step)), torch.no_grad()(lambda p, step, old: p.sub_(step))
    )


@loop("weights", "SAM in the loop: p.data = p.data + e, and p.data.copy_(old), no attach", LOSS)
def sam_by_new_data(witness: Witness) -> None:
    moved_and_back(
        witness,
        lambda p, step: setattr(p, "data", p.data + step),
        lambda p, step, old: p.data.copy_(old),
        attach=False,
    )


@loop("weights", "SAM in the loop: torch.nn.utils.vector_to_parameters, and back", LOSS)
def sam_by_vector(witness: Witness) -> None:
    moved_and_back(
        witness,
        lambda p, step: nn.utils.vector_to_parameters((p.detach() + step).flatten(), [p]),
        lambda p, step, old: nn.utils.vector_to_parameters(old.flatten(), [p]),
    )


@loop("weights", "weight noise before the forward pass, taken out before the step", LOSS)
def noise_and_back(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        old = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        offsets = [p.detach() - o for p, o in zip(model.parameters(), old, strict=True)]
        probe.backward(mse_loss(model(x), y))
        for p, o in zip(model.parameters(), old, strict=True):
            p.data.copy_(o)
        witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), hessian=False)
        optimizer.step()


@loop("weights", "binary weights in the forward pass, the real ones put back for the step (BinaryConnect)", LOSS)
def binary_connect(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for p in model.parameters():
        p.org = p.data.clone()
    for x, y in batches():
        for p in model.parameters():
            p.data.copy_(0.3 * p.org.sign())
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        offsets = [p.detach() - p.org for p in model.parameters()]
        for p in model.parameters():
            p.data.copy_(p.org)
        witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), hessian=False)
        optimizer.step()
        for p in model.parameters():
            p.org.copy_(p.data.clamp_(-1, 1))


@loop("weights", "extragradient: a half step by hand, the gradient there, the weights put back", LOSS)
def extragradient(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        old = [p.detach().clone() for p in model.parameters()]
        grads = torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
        offsets = [p.detach() - o for p, o in zip(model.parameters(), old, strict=True)]
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        with torch.no_grad():
            for p, o in zip(model.parameters(), old, strict=True):
                p.copy_(o)
        witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), hessian=False)
        optimizer.step()


@loop("weights", "weight decay by hand between backward and step: p.data.mul_(1 - c)", LOSS)
def decay_before_step(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        offsets = [0.02 * p.detach() for p in model.parameters()]
        for p in model.parameters():
            p.data.mul_(1 - 0.02)
        witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), changed=True, hessian=False)
        optimizer.step()


@loop("weights", "weight decay by hand between backward and step, under no_grad, no attach", LOSS)
def decay_before_step_under_no_grad(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        offsets = [0.02 * p.detach() for p in model.parameters()]
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1 - 0.02)
        witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), changed=True, hessian=False)
        optimizer.step()


@loop("weights", "new weights loaded between backward and step", ALL_OF_LOSS)
def loaded_before_step(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        if step == 2:
            offsets = [p.detach() - best[name] for name, p in model.named_parameters()]
            model.load_state_dict(best)
            witness.truth(elsewhere(model, offsets, lambda m: mse_loss(m(x), y)), hessian=False)
        else:
            witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


# After the step, before the forward pass, and around evaluations: the gradient is of the row's weights


def after_step(witness: Witness, change: Callable[[nn.Module], object]) -> None:
    """A loop that changes the weights after each step but the last one."""
    model, optimizer, _ = simple(witness)
    for step, (x, y) in enumerate(batches()):
        if step:
            change(model)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


def after_last_step(witness: Witness, change: Callable[[nn.Module], object]) -> None:
    """The same after the last step, too, where geomprobe does not know that the loop ends."""
    model, optimizer, _ = simple(witness, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        change(model)


@loop("weights", "weights changed under no_grad after the last step, no attach", refused="the final iterate is lost")
def changed_after_last_step(witness: Witness) -> None:
    after_last_step(witness, torch.no_grad()(lambda model: [p.mul_(0.98) for p in model.parameters()]))


@loop(
    "weights",
    "p.data clamped after the last step, no attach (WGAN)",
    refused="iterate is lost|through .data",
)
def data_changed_after_last_step(witness: Witness) -> None:
    after_last_step(witness, lambda model: [p.data.clamp_(-0.3, 0.3) for p in model.parameters()])


@loop(
    "weights",
    "p.data clamped after the last step of probe.epochs",
    refused="iterate is lost|through .data",
)
def data_changed_after_last_step_of_epochs(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for epoch in probe.epochs(2):
        for x, y in batches(2):
            optimizer.zero_grad()
            probe.backward(mse_loss(model(x), y))
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()
            for p in model.parameters():
                p.data.clamp_(-0.3, 0.3)


@loop("weights", "weights clipped after each step (WGAN)")
def weights_clipped(witness: Witness) -> None:
    after_step(witness, lambda model: [p.data.clamp_(-0.3, 0.3) for p in model.parameters()])


@loop("weights", "rows normalized by hand after each step")
def weights_normalized(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight.div_(model[0].weight.norm(dim=1, keepdim=True))

    after_step(witness, change)


@loop("weights", "projection onto a ball after each step: p.data = p.data * c")
def projected(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        norm = torch.stack([p.data.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.data = p.data * (1.0 / norm).clamp(max=1)

    after_step(witness, change)


@loop("weights", "torch.renorm of the weights in place after each step (max-norm constraint)")
def renormed(witness: Witness) -> None:
    after_step(witness, lambda model: model[0].weight.data.renorm_(2, 0, 0.5))


@loop("weights", "decoupled weight decay by hand after each step")
def decay_after_step(witness: Witness) -> None:
    after_step(witness, lambda model: [p.data.mul_(0.98) for p in model.parameters()])


@loop("weights", "pruning by hand: small weights set to 0 after each step")
def pruned(witness: Witness) -> None:
    after_step(witness, lambda model: [p.data.mul_(p.data.abs() > 0.1) for p in model.parameters()])


@loop("weights", "Lookahead by hand: slow weights every second step")
def lookahead(witness: Witness) -> None:
    slow: dict[str, Tensor] = {}

    def change(model: nn.Module) -> None:
        if not slow:
            slow.update({name: p.detach().clone() for name, p in model.named_parameters()})
            return
        for name, p in model.named_parameters():
            slow[name] += 0.5 * (p.data - slow[name])
            p.data.copy_(slow[name])

    after_step(witness, change)


@loop("weights", "Lookahead as an optimizer around another one, no attach")
def lookahead_wrapper(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    slow = [p.detach().clone() for p in model.parameters()]

    class Lookahead:
        def step(self, count: int) -> None:
            optimizer.step()
            if count % 2:
                for p, s in zip(model.parameters(), slow, strict=True):
                    s.add_(p.data - s, alpha=0.5)
                    p.data = s.clone()

    wrapper = Lookahead()
    for count, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        wrapper.step(count)


@loop("weights", "weight noise before the forward pass, which stays")
def noise_stays(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        for p in model.parameters():
            p.data.add_(0.02 * torch.randn_like(p))
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("weights", "Langevin noise under no_grad after each step")
def langevin(witness: Witness) -> None:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.01)

    after_step(witness, change)


@loop("weights", "layers initialized again in the middle of the run")
def initialized_again(witness: Witness) -> None:
    count = iter(range(9))
    after_step(witness, lambda model: model[-1].reset_parameters() if next(count) == 1 else None)


@loop("weights", "evaluation between the steps: the mean of the weights swapped in by p.data, and out again")
def ema_swapped(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    average = [p.detach().clone() for p in model.parameters()]

    def swap() -> None:
        for i, p in enumerate(model.parameters()):
            p.data, average[i] = average[i], p.data

    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        for a, p in zip(average, model.parameters(), strict=True):
            a.mul_(0.9).add_(p.detach(), alpha=0.1)
        swap()
        with torch.no_grad():
            model.eval()(x)
        model.train()
        swap()


@loop("weights", "evaluation by load_state_dict of the mean, and load_state_dict back")
def ema_loaded(witness: Witness) -> None:
    average: dict[str, Tensor] = {}

    def change(model: nn.Module) -> None:
        kept = copy.deepcopy(model.state_dict())
        for name, value in kept.items():
            average[name] = 0.5 * (average.get(name, value) + value)
        model.load_state_dict(average)
        with torch.no_grad():
            model(batches(1)[0][0])
        model.load_state_dict(kept)

    after_step(witness, change)


@loop("weights", "AveragedModel (SWA) updated at each step and evaluated")
def swa(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    average = AveragedModel(model)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        average.update_parameters(model)
        with torch.no_grad():
            average(x)


@loop("weights", "AveragedModel made before attach, epochs of a loader, no attach")
def swa_made_before(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    witness.watch(model, optimizer, attach=False)
    data = loader(2)
    for epoch in range(2):
        for x, y in data:
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()
            average.update_parameters(model)
        with torch.no_grad():
            average(x)


@loop("weights", "a copy.deepcopy of the model kept at each step for a later evaluation")
def deep_copies(witness: Witness) -> None:
    copies = []

    def change(model: nn.Module) -> None:
        copies.append(copy.deepcopy(model))

    after_step(witness, change)


@loop("weights", "evaluation between backward and step, under no_grad")
def evaluated_before_step(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        with torch.no_grad():
            mse_loss(model.eval()(x), y).item()
        model.train()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("weights", "sharpness logged between backward and step: p.data moved, a loss evaluated, the bits put back", HG)
def sharpness_logged(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    log = []
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        old = [p.data.clone() for p in model.parameters()]
        for p in model.parameters():
            p.data.add_(0.01 * p.grad)
        with torch.no_grad():
            log.append(mse_loss(model(x), y).item())
        for p, o in zip(model.parameters(), old, strict=True):
            p.data.copy_(o)
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("weights", "evaluation with swapped weights between backward and step: p.data = average, and back", HG)
def swapped_before_step(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    average = [0.5 * p.detach() for p in model.parameters()]
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        old = [p.data for p in model.parameters()]
        for p, a in zip(model.parameters(), average, strict=True):
            p.data = a
        with torch.no_grad():
            model(x)
        for p, o in zip(model.parameters(), old, strict=True):
            p.data = o
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("weights", "weights moved and put back between two micro-batches, the second one's gradient is elsewhere", LOSS)
def one_part_elsewhere(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        old = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.data.mul_(1.1)
        offsets = [p.detach() - o for p, o in zip(model.parameters(), old, strict=True)]
        mse_loss(model(x), y).backward()
        for p, o in zip(model.parameters(), old, strict=True):
            p.data.copy_(o)
        there = elsewhere(model, offsets, lambda m: mse_loss(m(x), y))
        witness.truth(lambda: mse_loss(model(x), y) + there(), hessian=False)
        optimizer.step()


@loop("weights", "double forward: the graph of the old weights is taken backward after the step (delayed)", ALL_OF_LOSS)
def delayed_gradient(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    waiting = None
    for x, y in batches(5):
        # The gradient of the last step's weights, as a pipeline with stale weights has it.
        old = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = mse_loss(torch.func.functional_call(model, old, (x,)), y)
        if waiting is not None:
            stale, before = waiting
            optimizer.zero_grad()
            for p, g in zip(model.parameters(), torch.autograd.grad(stale, list(before.values())), strict=True):
                p.grad = g
            witness.truth(None)
            optimizer.step()
        waiting = loss, old
