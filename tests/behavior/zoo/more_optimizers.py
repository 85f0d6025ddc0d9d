"""Optimizers of all kinds, and what stands around them, in loops that are plain but for that."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from behavior.zoo.witness import ALL_OF_LOSS, Witness, batches, loop, mlp, sgd


def train(
    witness: Witness, model: nn.Module, optimizer: Optimizer, attach: bool = True, lr: float | None = None
) -> None:
    """As everybody writes it."""
    witness.watch(model, optimizer, attach=attach)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=lr)
        optimizer.step()


# Of torch


def _stock(name: str, what: str, make: Callable[[Any], Optimizer], attach: bool = True) -> None:
    def run(witness: Witness) -> None:
        model = mlp()
        train(witness, model, make(list(model.parameters())), attach)

    run.__name__ = name
    loop("optimizers", what)(run)


of = torch.optim
_stock("sgd_momentum", "SGD with momentum, no attach", lambda p: of.SGD(p, 0.1, momentum=0.9), attach=False)
_stock("sgd_nesterov_decay", "Nesterov with decay", lambda p: of.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1))
_stock("sgd_maximize", "SGD that climbs", lambda p: of.SGD(p, 0.1, maximize=True))
_stock("sgd_foreach", "SGD over all tensors at once", lambda p: of.SGD(p, 0.1, 0.9, foreach=True))
_stock("sgd_fused", "fused SGD", lambda p: of.SGD(p, 0.1, 0.9, fused=True))
_stock("sgd_rate_zero", "a learning rate of 0", lambda p: of.SGD(p, 0.0))
_stock("adam_amsgrad", "Adam with its maximum kept", lambda p: of.Adam(p, 0.05, amsgrad=True))
_stock(
    "adam_maximize_foreach",
    "Adam that climbs, no attach",
    lambda p: of.Adam(p, 0.05, maximize=True, foreach=True),
    False,
)
_stock("adamw_fused", "fused AdamW", lambda p: of.AdamW(p, 0.05, weight_decay=0.2, fused=True))
_stock("nadam", "NAdam", lambda p: of.NAdam(p, 0.05, weight_decay=0.1, decoupled_weight_decay=True))
_stock("radam", "RAdam", lambda p: of.RAdam(p, 0.05))
_stock(
    "rmsprop_centered", "RMSprop, centered, with momentum", lambda p: of.RMSprop(p, 0.02, centered=True, momentum=0.5)
)
_stock("adagrad_fused", "Adagrad with a decaying rate", lambda p: of.Adagrad(p, 0.1, lr_decay=0.1))
_stock("adadelta", "Adadelta", lambda p: of.Adadelta(p, 1.0))
_stock("adamax", "Adamax", lambda p: of.Adamax(p, 0.05))
_stock("asgd", "ASGD", lambda p: of.ASGD(p, 0.1))
_stock("rprop", "Rprop", lambda p: of.Rprop(p, 0.01))
_stock("adafactor", "Adafactor", lambda p: of.Adafactor(p, 0.05))
if hasattr(of, "Muon"):
    _stock("muon", "Muon on the matrices only", lambda p: of.Muon([each for each in p if each.dim() == 2], 0.02))


@loop("optimizers", "three groups with rates and decays of their own")
def groups_of_rates(witness: Witness) -> None:
    model = mlp(3, 3, 3, 1)
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": biases, "weight_decay": 0.0, "lr": 0.3},
        {"params": weights[1:]},
        {"params": weights[:1], "lr": 0},
    ]
    train(witness, model, torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3))


@loop("optimizers", "an empty first group")
def empty_first_group(witness: Witness) -> None:
    model = mlp()
    groups = [{"params": [], "lr": 0.7}, {"params": list(model.parameters())}]
    train(witness, model, torch.optim.SGD(groups, lr=0.1))


@loop("optimizers", "a group added after attach, before the first step", refused="parameter groups held")
def group_added_before_training(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    witness.watch(model, optimizer)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("optimizers", "a group added before the first step of a script without attach")
def group_added_no_attach(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    train(witness, model, optimizer, attach=False)


@loop("optimizers", "a group added in the middle", refused="parameter groups held")
def group_added_later(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    witness.watch(model, optimizer, attach=False)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("optimizers", "optimizer.load_state_dict puts an earlier rate and momentum back")
def optimizer_rolled_back(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    witness.watch(model, optimizer)
    kept: dict[str, Any] = {}
    for t, (x, y) in enumerate(batches()):
        if t == 1:
            kept = copy.deepcopy(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = 0.3
        if t == 3:
            optimizer.load_state_dict(kept)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=[0.1, 0.3, 0.3, 0.1][t])
        optimizer.step()


@loop("optimizers", "LBFGS", refused="LBFGS")
def lbfgs(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@loop("optimizers", "no optimizer: weights are moved by hand", refused="No optimizer stepped")
def weights_by_hand(witness: Witness) -> None:
    model = mlp()
    witness.watch(model, sgd(model), attach=False)
    for x, y in batches():
        found = torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), found, strict=True):
                p -= 0.1 * g


@loop("optimizers", "a second optimizer goes on where the first ends", refused="Two optimizers step")
def optimizer_exchanged(witness: Witness) -> None:
    model = mlp()
    first, second = torch.optim.Adam(model.parameters(), lr=0.05), sgd(model)
    witness.watch(model, first)
    for t, (x, y) in enumerate(batches()):
        optimizer = first if t < 2 else second
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


# Of the script


class Descent(Optimizer):
    """Gradient descent as a first exercise."""

    def __init__(self, parameters: Any, **defaults: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
        return loss


class Unrated(Optimizer):
    """Its rate has another name."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"eta": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["eta"] * p.grad)


class Twice(torch.optim.SGD):
    """Takes the parent's step twice."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step()


class TwoClosures(torch.optim.SGD):
    """Evaluates the closure, moves, and evaluates it once more for the update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            closure()
        return super().step()


class Recaller(torch.optim.Adam):
    """Throws gradients away in its own manner."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


@loop("optimizers", "an Optimizer of the script's own")
def own_optimizer(witness: Witness) -> None:
    model = mlp()
    train(witness, model, Descent(model.parameters()))


@loop("optimizers", "an Optimizer of the script's own, whose groups have no lr")
def own_optimizer_without_lr(witness: Witness) -> None:
    model = mlp()
    train(witness, model, Unrated(model.parameters()), attach=False, lr=float("nan"))


@loop("optimizers", "a subclass that takes the parent's step twice")
def own_step_twice(witness: Witness) -> None:
    model = mlp()
    train(witness, model, Twice(model.parameters(), lr=0.1, momentum=0.5))


@loop("optimizers", "a subclass with a zero_grad that calls no other")
def own_zero_grad(witness: Witness) -> None:
    model = mlp()
    train(witness, model, Recaller(model.parameters(), lr=0.05))


def _with_closure(witness: Witness, model: nn.Module, optimizer: Optimizer, attach: bool) -> None:
    witness.watch(model, optimizer, attach=attach)
    for x, y in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            witness.truth(lambda: mse_loss(model(x), y))
            return loss

        optimizer.step(closure)


@loop("optimizers", "Adam with a closure given to step")
def adam_closure(witness: Witness) -> None:
    model = mlp()
    _with_closure(witness, model, torch.optim.Adam(model.parameters(), lr=0.05), attach=True)


@loop("optimizers", "SGD with a closure given to step, no attach")
def sgd_closure_no_attach(witness: Witness) -> None:
    model = mlp()
    _with_closure(witness, model, sgd(model, momentum=0.9), attach=False)


@loop("optimizers", "an own optimizer that evaluates a closure")
def own_closure(witness: Witness) -> None:
    model = mlp()
    _with_closure(witness, model, Descent(model.parameters()), attach=True)


@loop("optimizers", "a closure that is evaluated twice in a step", refused="evaluated its closure twice")
def own_closure_twice(witness: Witness) -> None:
    model = mlp()
    optimizer = TwoClosures(model.parameters(), lr=0.1)
    witness.watch(model, optimizer)
    for x, y in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@loop("optimizers", "a closure without a backward pass, after the gradients were made")
def closure_for_the_loss_only(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step(lambda: loss)


@loop("optimizers", "optimizer.step is replaced by a function that takes the time")
def step_timed(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    original = optimizer.step

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = original(*args, **kwargs)
        assert time.perf_counter() >= started
        return found

    optimizer.step = timed  # type: ignore[method-assign]
    train(witness, model, optimizer)


@loop("optimizers", "optimizer.step is wrapped in a partial with its closure")
def step_partial(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.5)
    witness.watch(model, optimizer, attach=False)
    current: list[Tensor] = list(batches()[0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(current[0]), current[1])
        loss.backward()
        witness.truth(lambda: mse_loss(model(current[0]), current[1]))
        return loss

    step = functools.partial(optimizer.step, closure)
    for x, y in batches():
        current[:] = x, y
        step()


class Lookahead(Optimizer):
    """Every few steps of the inner optimizer, goes back half way (Zhang et al., 2019)."""

    def __init__(self, optimizer: Optimizer, every: int) -> None:
        self.optimizer, self.every, self.count = optimizer, every, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        found = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            members = (p for group in self.param_groups for p in group["params"])
            for slow, p in zip(self.slow, members, strict=True):
                slow += 0.5 * (p.data - slow)
                p.data.copy_(slow)
        return found


@loop("optimizers", "Lookahead around Adam, attach on the wrapper")
def lookahead_attached(witness: Witness) -> None:
    model = mlp()
    train(witness, model, Lookahead(torch.optim.Adam(model.parameters(), lr=0.05), every=3))


@loop(
    "optimizers",
    "Lookahead whose last step goes back, no attach",
    refused="iterate is lost|through .data",
)
def lookahead_no_attach(witness: Witness) -> None:
    model = mlp()
    wrapper = Lookahead(sgd(model), every=2)
    witness.watch(model, wrapper.optimizer, attach=False)
    for x, y in batches():
        wrapper.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        wrapper.step()


class SAM(Optimizer):
    """As it is commonly written (Foret et al., 2021): the weights come back as other memory."""

    def __init__(self, parameters: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        members = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in members]).norm()
        for p in members:
            self.state[p]["old"] = p.data.clone()
            self.state[p]["up"] = 0.05 / norm * p.grad
            p.add_(self.state[p]["up"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self, about_to_step: Callable[[], None]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        about_to_step()
        self.base_optimizer.step()


def shifted(model: nn.Module, up: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss at weights that are ``up`` from the present ones."""
    return mse_loss(functional_call(model, {name: p + up[name] for name, p in model.named_parameters()}, (x,)), y)


def _sam(witness: Witness, of_wrapper: bool) -> None:
    model = mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.5)
    witness.watch(model, optimizer if of_wrapper else optimizer.base_optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.first_step()
        mse_loss(model(x), y).backward()
        up = {name: optimizer.state[p]["up"] for name, p in model.named_parameters()}
        # The weights come back with other last bits than those that the gradient is of, less the step up.
        optimizer.second_step(lambda: witness.truth(lambda: shifted(model, up, x, y), hessian=False))


@loop("optimizers", "SAM by p.data = old_p, attach on the wrapper", refused="Two optimizers step")
def sam_wrapper(witness: Witness) -> None:
    _sam(witness, of_wrapper=True)


class Perturbed(torch.optim.SGD):
    """SAM in one optimizer: evaluates its closure at weights up the slope, and steps from where it was."""

    ups: dict[Tensor, Tensor]
    about_to_step: Callable[[], None]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        members = [p for group in self.param_groups for p in group["params"]]
        self.ups = {p: 0.05 * p.sign() for p in members}
        for p in members:
            p.add_(self.ups[p])
        with torch.enable_grad():
            loss = closure()
        for p in members:
            p.sub_(self.ups[p])
        self.about_to_step()
        super().step()
        return loss


@loop("optimizers", "a step that evaluates its closure at other weights than it steps from", refused="at other weights")
def closure_at_other_weights(witness: Witness) -> None:
    model = mlp()
    optimizer = Perturbed(model.parameters(), lr=0.1)
    witness.watch(model, optimizer)
    for x, y in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        def about_to_step() -> None:
            up = {name: optimizer.ups[p] for name, p in model.named_parameters()}
            witness.truth(lambda: shifted(model, up, x, y), hessian=False)

        optimizer.about_to_step = about_to_step
        optimizer.step(closure)


class ByData(Descent):
    """Moves p.data, which the version of a parameter does not show."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


class NewData(Descent):
    """Gives each parameter new memory at each step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad.data


class UsesUpGradients(Descent):
    """Writes its update into the gradients, and drops them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.add_(p, alpha=0.1).mul_(-group["lr"]))
                p.grad = None


class Cautious(torch.optim.Adam):
    """Looks at the new weights, and goes back by load_state_dict where they are worse."""

    def step(self, closure: Any = None) -> Any:
        kept = [p.detach().clone() for p in self.param_groups[0]["params"]]
        found = super().step()
        if any(bool((p.detach() - old).abs().max() > 0.05) for p, old in zip(self.members, kept, strict=True)):
            for p, old in zip(self.members, kept, strict=True):
                p.data.lerp_(old, 0.5)
        return found

    @property
    def members(self) -> list[Tensor]:
        return self.param_groups[0]["params"]


@loop("optimizers", "an own optimizer that moves p.data")
def own_by_data(witness: Witness) -> None:
    model = mlp()
    train(witness, model, ByData(model.parameters()), attach=False)


@loop("optimizers", "an own optimizer that gives each parameter new memory")
def own_new_data(witness: Witness) -> None:
    model = mlp()
    train(witness, model, NewData(model.parameters()))


@loop("optimizers", "an own optimizer that writes into the gradients and drops them")
def own_uses_up_gradients(witness: Witness) -> None:
    model = mlp()
    train(witness, model, UsesUpGradients(model.parameters()))


@loop("optimizers", "a subclass that goes half way back where the step was long")
def own_cautious(witness: Witness) -> None:
    model = mlp()
    train(witness, model, Cautious(model.parameters(), lr=0.1), attach=False)


@loop("optimizers", "named parameters are given to the optimizer")
def named_parameters(witness: Witness) -> None:
    model = mlp()
    train(witness, model, torch.optim.AdamW(model.named_parameters(), lr=0.05))


@loop("optimizers", "a parameter twice in one group, which moves twice")
def duplicate_parameter(witness: Witness) -> None:
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1, foreach=False)
    train(witness, model, optimizer)


@loop("optimizers", "one optimizer a parameter, each steps in the backward pass", refused="Two optimizers step")
def steps_in_backward(witness: Witness) -> None:
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    witness.watch(model, next(iter(optimizers.values())), attach=False)

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for x, y in batches():
        mse_loss(model(x), y).backward()


@loop("optimizers", "attach after the first steps, which no epoch of a loader shows", refused="attach was called twice")
def attached_late(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            witness.watch(model, optimizer)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


@loop("optimizers", "an optimizer of another model steps in between, attach on the one to measure")
def another_models_optimizer(witness: Witness) -> None:
    model, other = mlp(), mlp()
    optimizer, second = sgd(model), torch.optim.Adam(other.parameters(), lr=0.3)
    witness.watch(model, optimizer)
    for x, y in batches():
        second.zero_grad()
        mse_loss(other(x), y).backward()
        second.step()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("optimizers", "both backward passes first, then both steps, attach on the one to measure", ALL_OF_LOSS)
def another_models_backward_first(witness: Witness) -> None:
    model, other = mlp(), mlp()
    optimizer, second = sgd(model), torch.optim.Adam(other.parameters(), lr=0.3)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        second.zero_grad()
        mse_loss(model(x), y).backward()
        mse_loss(other(x), 2.0 * y).backward()
        second.step()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("optimizers", "the step comes before the backward pass: each uses the gradient of the batch before", ALL_OF_LOSS)
def step_before_backward(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        if t:
            previous = batches()[t - 1]
            witness.truth(lambda: mse_loss(model(previous[0]), previous[1]))
            optimizer.step()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()


@loop("optimizers", "a closure that sets the rate as well, by the norm of its gradient")
def closure_sets_rate(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            lr = 0.1 / (1.0 + sum(p.grad.square().sum().item() for p in model.parameters()))
            optimizer.param_groups[0]["lr"] = lr
            witness.truth(lambda: mse_loss(model(x), y), lr=lr)
            return loss

        optimizer.step(closure)


@loop("optimizers", "a closure without zero_grad, which is called before step", ALL_OF_LOSS)
def closure_zeroed_outside(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():

        def closure() -> Tensor:
            loss = mse_loss(model(x), y)
            loss.backward()
            witness.truth(lambda: mse_loss(model(x), y))
            return loss

        model.zero_grad(set_to_none=False)
        optimizer.step(closure)


@loop("optimizers", "a new optimizer each epoch", refused="Two optimizers step")
def optimizer_made_each_epoch(witness: Witness) -> None:
    model = mlp()
    witness.watch(model, sgd(model), attach=False)
    for _ in range(2):
        optimizer = sgd(model)
        for x, y in batches(2):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()


@loop("optimizers", "the dictionary of a group is replaced by another")
def group_replaced(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.1 / (t + 1)}
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.1 / (t + 1))
        optimizer.step()


@loop(
    "optimizers",
    "the optimizer's state is cleared between two steps with one gradient",
    ALL_OF_LOSS,
)
def state_cleared(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        optimizer.state.clear()
        witness.truth(None)  # the gradient is of the weights before
        optimizer.step()


class DecaysFirst(torch.optim.SGD):
    """SGDW: decays the weights, and takes the parent's step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.1 * group["lr"])
        return super().step(closure)


class DecaysFirstByData(torch.optim.SGD):
    """The same through p.data."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - 0.1 * group["lr"])
        return super().step(closure)


@loop("optimizers", "a subclass that decays the weights before the parent's step", ALL_OF_LOSS)
def own_decay_first(witness: Witness) -> None:
    model = mlp()
    train(witness, model, DecaysFirst(model.parameters(), lr=0.5))


@loop("optimizers", "a subclass that decays p.data before the parent's step, no attach", ALL_OF_LOSS)
def own_decay_first_by_data(witness: Witness) -> None:
    model = mlp()
    train(witness, model, DecaysFirstByData(model.parameters(), lr=0.5), attach=False)
