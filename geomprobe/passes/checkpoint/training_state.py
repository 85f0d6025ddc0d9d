"""A training's whole state, taken between two steps and put back bit for bit: what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geomprobe.distributed.dtensor import is_dtensor, placed, to_local
from geomprobe.errors import RunError
from geomprobe.passes.checkpoint.plain_values import HostTensor, StateOf
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.isolation import RNGState, capture_rng, restore_rng


def capture(probe: Probe, loaders: Sequence[Any]) -> dict[str, Any]:
    """The state of a probe's training, for `store.Writer.submit`, which copies its tensors.

    Of tensors that are spread over several processes it is this process's part. What is under ``replicated`` is the
    same on every process of a run under DDP. ``loaders`` are those whose random generators count, in an order that a
    second process shares.
    """
    weights = probe.weights
    states = [{name: each.state.get(p, {}) for name, p in probe.parameters.items()} for each in probe.optimizers]
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in each.param_groups] for each in probe.optimizers
    ]
    plain = [
        {name: {k: v for k, v in entries.items() if not isinstance(v, Tensor)} for name, entries in state.items()}
        for state in states
    ]
    extra = {name: m.get_extra_state() for name, m in _modules(probe.model) if _has_extra_state(m)}
    return {
        "replicated": {
            "weights": {name: HostTensor(to_local(weight)) for name, weight in weights.items()},
            "gradients": {name: _kept(w.grad, w) for name, w in weights.items() if w.grad is not None},
            "optimizers": [
                {
                    name: {k: _kept(v, probe.parameters[name]) for k, v in entries.items() if isinstance(v, Tensor)}
                    for name, entries in state.items()
                }
                for state in states
            ],
        },
        "optimizers": StateOf("the optimizer", {"groups": groups, "state": plain, "moving": probe.moving}),
        "buffers": {name: _kept(buffer, buffer) for name, buffer in probe.buffers.items()},
        "requires_grad": {name: weight.requires_grad for name, weight in weights.items()},
        "training": {name: module.training for name, module in _modules(probe.model)},
        "extra": {name: StateOf(f"the extra state of module {name!r}", value) for name, value in extra.items()},
        "stateful": {
            name: StateOf(f"the state_dict of {name!r}, which attach was given,", thing.state_dict())
            for name, thing in probe.stateful.items()
        },
        "streams": streams(loaders),
    }


def restore(probe: Probe, loaders: Sequence[Any], state: Mapping[str, Any]) -> None:
    """Put back what `capture` gave into an equal training of another process; the random streams come last.

    Raises:
        RunError: the training is not equal: a tensor is missing, too much, or of another shape.
    """
    weights, stored = probe.weights, state["replicated"]
    if differing := sorted(set(weights) ^ set(stored["weights"])):
        raise RunError(
            f"the checkpoint holds {len(stored['weights'])} weights and the model has {len(weights)}; not in both: "
            f"{', '.join(differing[:5])}. Build the model as it was built when the run began."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            values, own = stored["weights"][name], to_local(weight)
            if own.shape != values.shape:
                raise RunError(
                    f"the checkpoint holds {name} of shape {list(values.shape)}, and the model has it of shape "
                    f"{list(own.shape)}. Build the model as it was built when the run began."
                )
            own.copy_(values)
            weight.requires_grad_(state["requires_grad"][name])
            gradient = stored["gradients"].get(name)
            weight.grad = None if gradient is None else _rebuilt(gradient, weight)
        for name, buffer in probe.buffers.items():
            _restore_buffer(probe.model, name, buffer, state["buffers"].get(name))
    rest = state["optimizers"]
    if len(probe.optimizers) != len(rest["groups"]):
        raise RunError(
            f"the checkpoint holds the state of {len(rest['groups'])} optimizers, and there are {len(probe.optimizers)}"
        )
    each = zip(probe.optimizers, stored["optimizers"], rest["groups"], rest["state"], strict=True)
    for optimizer, tensors, groups, plain in each:
        _restore_optimizer(probe, optimizer, tensors, groups, plain)
    probe.moving = rest["moving"]
    for name, module in _modules(probe.model):
        module.training = state["training"][name]
        if name in state["extra"]:
            module.set_extra_state(state["extra"][name])
    for name, thing in probe.stateful.items():
        if name not in state["stateful"]:
            raise RunError(f"the checkpoint holds no state of {name!r}, which attach is given now")
        thing.load_state_dict(state["stateful"][name])
    restore_streams(loaders, state["streams"])


def streams(loaders: Sequence[Any]) -> dict[str, Any]:
    """The state of every global random generator, and of each loader's own."""
    rng = vars(capture_rng())
    own = [[generator.get_state() for generator in _generators(loader)] for loader in loaders]
    return {**rng, "cuda": list(rng["cuda"]), "loaders": own}


def restore_streams(loaders: Sequence[Any], states: Mapping[str, Any]) -> None:
    """Put back what `streams` gave.

    Raises:
        RunError: the loaders are not the same.
    """
    own = [_generators(loader) for loader in loaders]
    then, now = ([len(each) for each in found] for found in (states["loaders"], own))
    if then != now:
        raise RunError(
            f"the script had made {len(then)} data loaders with {then} generators of their own when the checkpoint was "
            f"written, and now {len(now)} with {now}: their random streams cannot be put back. Make all loaders before "
            "the loop over epochs, or give each epoch's own generator a seed of its own."
        )
    for generators, kept in zip(own, states["loaders"], strict=True):
        for generator, state in zip(generators, kept, strict=True):
            generator.set_state(state)
    restore_rng(RNGState(states["python"], states["numpy"], states["torch"], tuple(states["cuda"])))


def _restore_optimizer(
    probe: Probe,
    optimizer: Optimizer,
    tensors: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    # By hand: load_state_dict would cast float32 state of a bfloat16 parameter down, and alias what it is given.
    then, now = len(groups), len(optimizer.param_groups)
    if then != now:
        raise RunError(f"the optimizer had {then} parameter groups when the checkpoint was written, and has {now}")
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        for key in [key for key in group if key != "params" and key not in kept]:
            del group[key]
        group.update(kept)
    optimizer.__dict__["_opt_called"] = True  # or a scheduler would warn that the optimizer has not stepped
    optimizer.state.clear()
    for name, parameter in probe.parameters.items():
        entries = {key: _rebuilt(kept, parameter) for key, kept in tensors[name].items()}
        if entries := {**entries, **plain[name]}:
            optimizer.state[parameter] = entries


def _kept(tensor: Tensor, beside: Tensor) -> dict[str, Any]:
    """A tensor's values and layout; ``beside`` is the one whose device it usually has."""
    own = to_local(tensor)
    kept: dict[str, Any] = {"values": HostTensor(own)}
    kept["device"] = None if own.device == beside.device else str(own.device)
    # In memory order too, or a channels_last moment would come back in another one, and with other bits to read.
    kept["stride"] = list(own.stride()) if own.layout == torch.strided else None
    if is_dtensor(tensor):
        kept["spread"] = [tensor.placements, list(tensor.shape), list(tensor.stride())]  # type: ignore[attr-defined]
    return kept


def _rebuilt(kept: Mapping[str, Any], beside: Tensor) -> Tensor:
    """A tensor as it was, spread over the processes that ``beside`` is spread over."""
    values, stride = kept["values"], kept["stride"]
    device = beside.device if kept["device"] is None else kept["device"]
    if stride is None or (0 in stride and values.numel()):  # sparse, or expanded: its elements share memory
        own: Tensor = values.to(device)
    else:
        own = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=device).copy_(values)
    return placed(own, beside, *kept["spread"]) if "spread" in kept else own


def _restore_buffer(model: nn.Module | None, name: str, buffer: Tensor, kept: Any) -> None:
    if kept is None:
        raise RunError(f"the checkpoint holds no buffer {name!r}, which the model has now")
    stored = _rebuilt(kept, buffer)
    if buffer.shape == stored.shape and buffer.dtype == stored.dtype:
        to_local(buffer).copy_(to_local(stored))
        return
    assert model is not None
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, stored)


def _modules(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    return iter(()) if model is None else model.named_modules()


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _generators(loader: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers hold, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    found = [getattr(holder, "generator", None) for holder in (loader, *samplers)]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
