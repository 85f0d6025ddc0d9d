"""Loops that throw gradients away in their own ways."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from behavior.zoo.witness import ALL_OF_LOSS, Witness, batches, loader, loop, mlp, parts, sgd, simple


@loop("zeroing", "zero_grad before each backward pass, epochs named")
def zero_grad(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    data = loader(2)
    for epoch in probe.epochs(2):
        for x, y in data:
            optimizer.zero_grad()
            probe.backward(mse_loss(model(x), y))
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()


@loop("zeroing", "zero_grad(set_to_none=False) after each step")
def zero_grad_after_step(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in probe.batches(batches()):
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), epoch=0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@loop("zeroing", "model.zero_grad(set_to_none=False), no attach, epochs of a loader")
def model_zero_grad_in_place(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False, momentum=0.9)
    data = loader(count=2)
    for epoch in range(2):
        for x, y in data:
            model.zero_grad(set_to_none=False)
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch)
            optimizer.step()


@loop("zeroing", "p.grad.zero_() by hand before each backward pass")
def zeroed_by_hand(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "p.grad.detach_().zero_() in the script's own step function, as torch did it once")
def zeroed_as_once(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for x, y in batches():
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.detach_().zero_()


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


@loop("zeroing", "gradients zeroed in a hook after the optimizer's step")
def zeroed_in_post_hook(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    optimizer.register_step_post_hook(lambda *_: torch._foreach_zero_([p.grad for p in model.parameters()]))
    for x, y in batches():
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "zero_grad in a forward pre-hook of the model")
def zeroed_before_forward(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    hook = model.register_forward_pre_hook(lambda *_: optimizer.zero_grad())
    for x, y in batches():
        probe.backward(mse_loss(model(x), y))
        hook.remove()  # the witness calls the model, too
        witness.truth(lambda: mse_loss(model(x), y))
        hook = model.register_forward_pre_hook(lambda *_: optimizer.zero_grad())
        optimizer.step()


@loop("zeroing", "all gradients are views of one flat tensor, which is zeroed", ALL_OF_LOSS)
def one_flat_gradient(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    whole = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for p, part in zip(model.parameters(), whole.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = part.view_as(p)
    for x, y in batches():
        whole.zero_()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


# Between two backward passes of one step


def attacked(witness: Witness, zero: Callable[[nn.Module, torch.optim.Optimizer], None], attach: bool = True) -> None:
    """Adversarial training: a backward pass for the attack (FGSM), ``zero``, and the one to train on."""
    model, optimizer, _ = simple(witness, attach)
    for x, y in batches():
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        mse_loss(model(x), y).backward()
        bad = (x + 0.1 * x.grad.sign()).detach()
        zero(model, optimizer)
        mse_loss(model(bad), y).backward()
        witness.truth(lambda: mse_loss(model(bad), y))
        optimizer.step()


def by_hand(change: Callable[[nn.Parameter], object]) -> Callable[[nn.Module, object], None]:
    def zero(model: nn.Module, optimizer: object) -> None:
        for p in model.parameters():
            change(p)

    return zero


@loop("zeroing", "FGSM, optimizer.zero_grad() between attack and training")
def fgsm_zero_grad(witness: Witness) -> None:
    attacked(witness, lambda model, optimizer: optimizer.zero_grad())


@loop("zeroing", "FGSM, optimizer.zero_grad(set_to_none=False) between, no attach")
def fgsm_zero_grad_in_place(witness: Witness) -> None:
    attacked(witness, lambda model, optimizer: optimizer.zero_grad(set_to_none=False), attach=False)


@loop("zeroing", "FGSM, model.zero_grad() between")
def fgsm_model_zero_grad(witness: Witness) -> None:
    attacked(witness, lambda model, optimizer: model.zero_grad())


@loop("zeroing", "FGSM, model.zero_grad(set_to_none=False) between")
def fgsm_model_zero_grad_in_place(witness: Witness) -> None:
    attacked(witness, lambda model, optimizer: model.zero_grad(set_to_none=False))


@loop("zeroing", "FGSM, zero_grad(set_to_none=False) of each module by model.apply between")
def fgsm_zeroed_by_apply(witness: Witness) -> None:
    attacked(witness, lambda model, optimizer: model.apply(lambda m: m.zero_grad(set_to_none=False)))


@loop("zeroing", "FGSM, p.grad = None by hand between")
def fgsm_set_to_none_by_hand(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: setattr(p, "grad", None)))


@loop("zeroing", "FGSM, del p.grad between")
def fgsm_deleted(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: delattr(p, "grad")))


@loop("zeroing", "FGSM, p.grad.zero_() by hand between", ALL_OF_LOSS)
def fgsm_zeroed_by_hand(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: p.grad.zero_()), attach=False)


@loop("zeroing", "FGSM, p.grad.data.zero_() by hand between", ALL_OF_LOSS)
def fgsm_data_zeroed(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: p.grad.data.zero_()))


@loop("zeroing", "FGSM, p.grad.detach_().zero_() between", ALL_OF_LOSS)
def fgsm_detached_and_zeroed(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: p.grad.detach_().zero_()))


@loop("zeroing", "FGSM, torch._foreach_zero_ between", ALL_OF_LOSS)
def fgsm_foreach_zero(witness: Witness) -> None:
    attacked(witness, lambda model, optimizer: torch._foreach_zero_([p.grad for p in model.parameters()]))


@loop("zeroing", "FGSM, p.grad = torch.zeros_like(p) between", ALL_OF_LOSS)
def fgsm_new_zeros(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: setattr(p, "grad", torch.zeros_like(p))))


@loop("zeroing", "FGSM, p.grad.data = torch.zeros_like(p) between", ALL_OF_LOSS)
def fgsm_new_data(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: setattr(p.grad, "data", torch.zeros_like(p))))


@loop("zeroing", "FGSM, p.grad.mul_(0) between", ALL_OF_LOSS)
def fgsm_times_zero(witness: Witness) -> None:
    attacked(witness, by_hand(lambda p: p.grad.mul_(0)))


@loop("zeroing", "FGSM, p.grad *= 0.5 between: half of the attack's gradient stays", ALL_OF_LOSS)
def fgsm_halved(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        mse_loss(model(inputs), y).backward()
        bad = (x + 0.1 * inputs.grad.sign()).detach()
        for p in model.parameters():
            p.grad *= 0.5
        mse_loss(model(bad), y).backward()
        witness.truth(lambda: 0.5 * mse_loss(model(x), y) + mse_loss(model(bad), y))
        optimizer.step()


@loop("zeroing", "PGD: three passes for the attack, p.grad.zero_() after each", ALL_OF_LOSS)
def pgd_zeroed_by_hand(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches(3):
        delta = torch.zeros_like(x, requires_grad=True)
        optimizer.zero_grad()
        for _ in range(3):
            mse_loss(model(x + delta), y).backward()
            delta.data = (delta + 0.02 * delta.grad.sign()).clamp(-0.05, 0.05).detach()
            delta.grad.zero_()
            for p in model.parameters():
                p.grad.zero_()
        probe.backward(mse_loss(model(x + delta.detach()), y))
        witness.truth(lambda: mse_loss(model(x + delta.detach()), y))
        optimizer.step()


@loop("zeroing", "free adversarial training: the attack uses the gradient of the training pass")
def free_adversarial(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    delta = torch.zeros(6, 3, dtype=torch.float64)
    for x, y in batches(3):
        for _ in range(2):
            noise = delta.clone().requires_grad_()
            optimizer.zero_grad()
            mse_loss(model(x + noise), y).backward()
            witness.truth(lambda: mse_loss(model(x + noise.detach()), y))
            optimizer.step()
            delta = (delta + 0.05 * noise.grad.sign()).clamp(-0.1, 0.1)


@loop("zeroing", "the attack's gradient by torch.autograd.grad: nothing to zero")
def attack_by_autograd_grad(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        x.requires_grad_()
        (slope,) = torch.autograd.grad(mse_loss(model(x), y), x)
        bad = (x + 0.1 * slope.sign()).detach()
        optimizer.zero_grad()
        probe.backward(mse_loss(model(bad), y))
        witness.truth(lambda: mse_loss(model(bad), y))
        optimizer.step()


@loop("zeroing", "gradient penalty: its slope by create_graph, one backward pass of the sum")
def gradient_penalty(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return mse_loss(out, y) + (slope.norm(dim=1) - 1).square().mean()

    for x, y in batches():
        optimizer.zero_grad()
        probe.backward(loss_of(x, y))
        witness.truth(lambda: loss_of(x, y))
        optimizer.step()


@loop("zeroing", "a backward pass for the log (gradient norm of a probe batch), model.zero_grad(set_to_none=False)")
def logged_gradient_norm(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    (probe_x, probe_y), *data = batches(5)
    log = []
    for x, y in data:
        model.zero_grad(set_to_none=False)
        mse_loss(model(probe_x), probe_y).backward()
        log.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        model.zero_grad(set_to_none=False)
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "two backward passes for the gradient noise scale, optimizer.zero_grad() after each")
def gradient_noise_scale(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        norms = []
        for size in (2, 4):
            optimizer.zero_grad()
            mse_loss(model(x[:size]), y[:size]).backward()
            norms.append(sum(p.grad.square().sum() for p in model.parameters()))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "only the head's gradients are zeroed between two backward passes")
def only_head_zeroed(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), 2 * y).backward()
        for p in model[-1].parameters():
            p.grad.zero_()
        mse_loss(model(x), y).backward()
        witness.truth(None)  # the body's gradient is of two losses, the head's of one
        optimizer.step()


@loop("zeroing", "the head's gradients are set to None between two backward passes")
def only_head_dropped(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), 2 * y).backward()
        model[-1].zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(None)
        optimizer.step()


@loop("zeroing", "never zeroed: the gradients of all steps add up")
def never_zeroed(witness: Witness) -> None:
    model, optimizer, probe = simple(witness, lr=0.02)
    for step, (x, y) in enumerate(batches()):
        probe.backward(mse_loss(model(x), y))
        witness.truth(None if step else lambda: mse_loss(model(x), y))  # later ones are of losses at other weights
        optimizer.step()


@loop("zeroing", "zeroed at every second step only")
def zeroed_every_second_step(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, lr=0.02)
    for step, (x, y) in enumerate(batches()):
        if step % 2 == 0:
            optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(None if step % 2 else lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "gradient memory: p.grad.mul_(0.5) after each step instead of zero_grad")
def gradients_decay(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, lr=0.05)
    for step, (x, y) in enumerate(batches()):
        mse_loss(model(x), y).backward()
        witness.truth(None if step else lambda: mse_loss(model(x), y))
        optimizer.step()
        for p in model.parameters():
            p.grad.mul_(0.5)


@loop("zeroing", "a step is skipped and its gradients stay for the next one")
def skipped_step_stays(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    data = batches()
    for step, (x, y) in enumerate(data):
        mse_loss(model(x), y).backward()
        if step == 1:
            continue
        if step == 2:
            witness.truth(lambda: mse_loss(model(x), y) + mse_loss(model(data[1][0]), data[1][1]))
        else:
            witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()


@loop("zeroing", "a step whose gradient is too large is thrown away by zero_grad")
def skipped_step_dropped(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for step, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad(set_to_none=False)
        probe.backward(mse_loss(model(x), y))
        if step in (1, 2):
            continue
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "a step is skipped and its gradients are zeroed by hand", ALL_OF_LOSS)
def skipped_step_zeroed_by_hand(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for step, (x, y) in enumerate(batches(5)):
        mse_loss(model(x), y).backward()
        if step != 2:
            witness.truth(lambda: mse_loss(model(x), y))
            optimizer.step()
        for p in model.parameters():
            p.grad.zero_()


@loop("zeroing", "the zero_grad of another model's optimizer between backward and step")
def zero_grad_of_another(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    other = sgd(mlp())
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        other.zero_grad()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "zero_grad between micro-batches by mistake: only the last one counts")
def zeroed_between_parts(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            optimizer.zero_grad()
            probe.backward(mse_loss(model(xs), ys) / 2)
        witness.truth(lambda: mse_loss(model(xs), ys) / 2)
        optimizer.step()


@loop("zeroing", "zero_grad between backward and step, by mistake: the step takes no gradient")
def zeroed_before_step(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        if step == 1:
            optimizer.zero_grad(set_to_none=False)
        witness.truth(None if step == 1 else lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "two steps with the gradient of one backward pass")
def two_steps_of_one_gradient(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches(3):
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        witness.truth(None)  # the loss was that of other weights
        optimizer.step()


def out_of_memory(gradient: Tensor) -> None:
    raise RuntimeError("CUDA out of memory")


@loop("zeroing", "a backward pass runs out of memory half way, the script zeroes and takes the next batch")
def out_of_memory_skipped(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for step, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        handle = model[0].weight.register_hook(out_of_memory) if step == 2 else None
        try:
            mse_loss(model(x), y).backward()
        except RuntimeError:
            handle.remove()
            optimizer.zero_grad()
            continue
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "a backward pass runs out of memory, p.grad = None by hand, and the batch again by halves")
def out_of_memory_halved(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        handle = model[0].weight.register_hook(out_of_memory) if step == 2 else None
        try:
            mse_loss(model(x), y).backward()
        except RuntimeError:
            handle.remove()
            for p in model.parameters():
                p.grad = None
            for xs, ys in parts(x, y):
                (mse_loss(model(xs), ys) / 2).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("zeroing", "a backward pass runs out of memory, p.grad.zero_() by hand where there is one", ALL_OF_LOSS)
def out_of_memory_zeroed_by_hand(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for step, (x, y) in enumerate(batches(5)):
        handle = model[0].weight.register_hook(out_of_memory) if step == 2 else None
        try:
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y))
            optimizer.step()
        except RuntimeError:
            handle.remove()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
