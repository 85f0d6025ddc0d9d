"""A training's whole state, taken between two steps and put back bit for bit: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomprobe.distributed.dtensor import held, is_dtensor, placed
from geomprobe.errors import RunError
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.rng import RNGState, capture_rng, restore_rng


def capture(probe: Probe, loaders: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a probe's training: its tensors, which are not copied, and everything else.

    Of tensors that are spread over several processes it is what this one holds.

    Args:
        probe: whose model, optimizer and attached objects.
        loaders: those whose random generators count, in an order that a second process shares.

    Returns:
        Tensors by name (weights, buffers, gradients, optimizer state), and a dict that can be pickled.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"sparse": {}, "optimizer": {}, "placement": {}, "spread": {}}
    for name, weight in probe.weights.items():
        tensors[f"weights/{name}"] = held(weight)
        if weight.grad is not None:
            _put(tensors, rest, f"gradients/{name}", weight.grad)
    for name, buffer in probe.buffers.items():
        _put(tensors, rest, f"buffers/{name}", buffer)
    for name, parameter in probe.parameters.items():
        for key, value in probe.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                _put(tensors, rest, f"optimizer/{name}/{key}", value)
            else:
                rest["optimizer"][name, key] = value
    groups = probe.optimizer.param_groups
    rest["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    rest["stateful"] = {name: thing.state_dict() for name, thing in probe.stateful.items()}
    rest["requires_grad"] = {name: weight.requires_grad for name, weight in probe.weights.items()}
    rest["training"] = {name: module.training for name, module in _modules(probe.model)}
    rest["extra"] = {name: m.get_extra_state() for name, m in _modules(probe.model) if _has_extra_state(m)}
    rest["streams"] = streams(loaders)
    return tensors, rest


def restore(
    probe: Probe, loaders: Sequence[Any], tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put a state back into an equal training that another process has built; the random streams come last.

    Raises:
        RunError: the training is not equal: a tensor is missing, too much, or of another shape.
    """
    weights = probe.weights
    _require_same_names(weights, {n.removeprefix("weights/") for n in tensors if n.startswith("weights/")})
    with torch.no_grad():
        for name, weight in weights.items():
            _require_same_shape(name, held(weight), tensors[f"weights/{name}"])
            held(weight).copy_(tensors[f"weights/{name}"])
            weight.requires_grad_(rest["requires_grad"][name])
            weight.grad = _get(tensors, rest, f"gradients/{name}", weight)
        for name, buffer in probe.buffers.items():
            _restore_buffer(probe.model, name, buffer, _get(tensors, rest, f"buffers/{name}", buffer))
    _restore_optimizer(probe, tensors, rest)
    for name, module in _modules(probe.model):
        module.training = rest["training"][name]
        if name in rest["extra"]:
            module.set_extra_state(rest["extra"][name])
    for name, thing in probe.stateful.items():
        if name not in rest["stateful"]:
            raise RunError(f"the checkpoint holds no state of {name!r}, which attach is given now")
        thing.load_state_dict(rest["stateful"][name])
    restore_streams(loaders, rest["streams"])


def streams(loaders: Sequence[Any]) -> dict[str, Any]:
    """The state of every global random generator, and of each loader's own."""
    rng = capture_rng()
    return {
        "python": rng.python,
        "numpy": rng.numpy,
        "torch": rng.torch,
        "cuda": list(rng.cuda),
        "loaders": [[generator.get_state() for generator in _generators(loader)] for loader in loaders],
    }


def restore_streams(loaders: Sequence[Any], states: Mapping[str, Any]) -> None:
    """Put back what `streams` gave.

    Raises:
        RunError: the loaders are not the same.
    """
    own = [list(_generators(loader)) for loader in loaders]
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


def _restore_optimizer(probe: Probe, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    # By hand: load_state_dict would cast float32 state of a bfloat16 parameter down, and alias what it is given.
    optimizer = probe.optimizer
    then, now = len(rest["groups"]), len(optimizer.param_groups)
    if then != now:
        raise RunError(
            f"the optimizer had {then} parameter groups when the checkpoint was written, and has {now}"
        )
    for group, kept in zip(optimizer.param_groups, rest["groups"], strict=True):
        for key in [key for key in group if key != "params" and key not in kept]:
            del group[key]
        group.update(kept)
    optimizer.__dict__["_opt_called"] = True  # or a scheduler would warn that the optimizer has not stepped
    optimizer.state.clear()
    names = [name for name in (*tensors, *rest["sparse"]) if name.startswith("optimizer/")]
    for name in names:
        _, parameter, key = _split(name)
        owner = probe.parameters[parameter]
        optimizer.state[owner][key] = _get(tensors, rest, name, owner)
    for (parameter, key), value in rest["optimizer"].items():
        optimizer.state[probe.parameters[parameter]][key] = value


def _split(name: str) -> tuple[str, str, str]:
    kind, _, rest = name.partition("/")
    parameter, _, key = rest.rpartition("/")
    return kind, parameter, key


def _put(tensors: dict[str, Tensor], rest: dict[str, Any], name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        rest["sparse"][name] = tensor.detach()
        return
    tensors[name] = own = held(tensor)
    # In memory order too, or a channels_last moment would come back in another one, and with other bits to read.
    rest["placement"][name] = str(own.device), tuple(own.stride())
    if is_dtensor(tensor):
        rest["spread"][name] = tensor.placements, tuple(tensor.shape), tuple(tensor.stride())  # type: ignore[attr-defined]


def _get(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], name: str, beside: Tensor) -> Tensor | None:
    """A stored tensor as it was, spread over the processes that ``beside`` is spread over."""
    if name in rest["sparse"]:
        sparse: Tensor = rest["sparse"][name]
        return sparse
    if name not in tensors:
        return None
    stored, (device, stride) = tensors[name], rest["placement"][name]
    if 0 in stride and stored.numel():  # an expanded tensor: its elements share memory
        own = stored.to(device)
    else:
        own = torch.empty_strided(stored.shape, stride, dtype=stored.dtype, device=device).copy_(stored)
    return placed(own, beside, *rest["spread"][name]) if name in rest["spread"] else own


def _restore_buffer(model: nn.Module | None, name: str, buffer: Tensor, stored: Tensor | None) -> None:
    if stored is None:
        raise RunError(f"the checkpoint holds no buffer {name!r}, which the model has now")
    if buffer.shape == stored.shape and buffer.dtype == stored.dtype:
        held(buffer).copy_(held(stored))
        return
    assert model is not None
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, stored)


def _modules(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    return iter(()) if model is None else model.named_modules()


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """The random generators that a loader and its samplers hold, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    seen: set[int] = set()
    for holder in holders:
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield generator


def _require_same_names(weights: Mapping[str, Tensor], kept: set[str]) -> None:
    if differing := sorted(set(weights) ^ kept):
        raise RunError(
            f"the checkpoint holds {len(kept)} weights and the model has {len(weights)}; not in both: "
            f"{', '.join(differing[:5])}. Build the model as it was built when the run began."
        )


def _require_same_shape(name: str, weight: Tensor, stored: Tensor) -> None:
    if weight.shape != stored.shape:
        raise RunError(
            f"the checkpoint holds {name} of shape {list(stored.shape)}, and the model has it of shape "
            f"{list(weight.shape)}. Build the model as it was built when the run began."
        )
