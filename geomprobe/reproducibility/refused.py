"""The operations that torch refuses under deterministic algorithms on CUDA, and what to write in the place of each."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from torch import nn

_WORDS = " does not have a deterministic implementation"


class Refused(NamedTuple):
    """An operation without a deterministic form.

    Attributes:
        operation: as a script writes it.
        kernels: how the names begin that torch's error gives it.
        instead: what has one, with the same values but for rounding where nothing else is said.
        modules: classes of torch.nn that call it.
    """

    operation: str
    kernels: tuple[str, ...]
    instead: str
    modules: tuple[str, ...] = ()


REFUSED = (
    Refused(
        "cross_entropy and nll_loss of scores [N, C, ...]",
        ("nll_loss2d",),
        "a row for each label: cross_entropy(x.movedim(1, -1).flatten(0, -2), y.flatten())",
        ("CrossEntropyLoss", "NLLLoss"),
    ),
    Refused(
        "grid_sample",
        ("grid_sampler",),
        "torch.gather of the four corners, added with their weights",
    ),
    Refused(
        "adaptive_avg_pool2d, but for 1x1",
        ("adaptive_avg_pool2d",),
        "avg_pool2d(x, size // output) where the output divides the size; x.mean((-2, -1), keepdim=True) for 1x1",
        ("AdaptiveAvgPool2d",),
    ),
    Refused(
        "adaptive_avg_pool3d",
        ("adaptive_avg_pool3d",),
        "means of blocks: x.unflatten each axis into (output, size // output), then .mean",
        ("AdaptiveAvgPool3d",),
    ),
    Refused(
        "adaptive_max_pool2d",
        ("adaptive_max_pool2d",),
        "max_pool2d(x, size // output) where the output divides the size",
        ("AdaptiveMaxPool2d",),
    ),
    Refused(
        "avg_pool3d",
        ("avg_pool3d",),
        "avg_pool2d over height and width of x.flatten(1, 2), then avg_pool1d over depth",
        ("AvgPool3d",),
    ),
    Refused(
        "max_pool3d, in older versions of torch",
        ("max_pool3d",),
        "max_pool2d over height and width of x.flatten(1, 2), then max_pool1d over depth",
        ("MaxPool3d",),
    ),
    Refused(
        "max_unpool1d, 2d and 3d",
        ("max_unpooling",),
        "zeros.scatter_add(-1, indices.flatten(2), x.flatten(2)), for windows that do not overlap",
        ("MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"),
    ),
    Refused(
        "fractional_max_pool2d and 3d",
        ("fractional_max_pool",),
        "max_pool2d with a fixed stride; it is another model",
        ("FractionalMaxPool2d", "FractionalMaxPool3d"),
    ),
    Refused(
        "padding by reflection in 1 and 3 dimensions, and in 2 where torch says so",
        ("reflection_pad",),
        "x.index_select(dim, places), with the reflected places, for each dimension",
        ("ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d"),
    ),
    Refused(
        "padding by replication, in older versions of torch",
        ("replication_pad",),
        "x.index_select(dim, places), with the places clamped, for each dimension",
        ("ReplicationPad1d", "ReplicationPad2d", "ReplicationPad3d"),
    ),
    Refused(
        "interpolate with linear, bilinear, bicubic or trilinear, where torch says so",
        ("upsample_",),
        "interpolate(mode='nearest'), or a transposed convolution with fixed weights",
        ("Upsample", "UpsamplingBilinear2d"),
    ),
    Refused(
        "embedding_bag with mode='max'",
        ("embedding_bag_backward_cuda_max",),
        "embedding(bags).max(1).values, for bags of one length",
        ("EmbeddingBag",),
    ),
    Refused(
        "scatter_reduce with 'prod'",
        ("scatter_reduce", "scatter"),
        "exp of scatter_add of logarithms, for positive values",
    ),
    Refused(
        "put_",
        ("put_",),
        "x.view(-1).index_put_((index,), values)",
    ),
    Refused(
        "bincount with weights",
        ("_bincount", "bincount"),
        "zeros.index_add(0, x, weights)",
    ),
    Refused(
        "histc of floats",
        ("_histc",),
        "torch.bincount(torch.bucketize(x, edges))",
    ),
    Refused(
        "median with indices",
        ("median",),
        "x.sort(dim).values.select(dim, (n - 1) // 2)",
    ),
    Refused(
        "kthvalue",
        ("kthvalue",),
        "x.sort(dim).values.select(dim, k - 1)",
    ),
    Refused(
        "ctc_loss",
        ("ctc_loss", "_ctc_loss"),
        "the same on the CPU: ctc_loss(log_probs.cpu(), targets.cpu(), ...)",
        ("CTCLoss",),
    ),
)
"""In the order of how often they are met; `docs/cuda.md` shows them. Versions of torch differ in what they refuse."""


def explained(error: BaseException, model: nn.Module | None = None) -> str:
    """Which operation torch has refused, which module called it, and what to write instead; empty where it did not.

    Args:
        error: what torch raised, with its traceback.
        model: where the operation is a part of the backward pass, its modules that may have called it are named.

    >>> print(explained(RuntimeError("put_ does not have a deterministic implementation, but you set ...")))
    put_ is refused. Instead of put_: x.view(-1).index_put_((index,), values).
    """
    name, words, _ = str(error).partition(_WORDS)
    if not words:
        return ""
    called = _calls(error.__traceback__)
    refused = next((each for each in REFUSED if name.startswith(each.kernels)), None)
    where = f" by {called}" if called else _suspects(refused, model)
    instead = "" if refused is None else f" Instead of {refused.operation}: {refused.instead}."
    return f"{name} is refused{where}.{instead}"


def _calls(traceback: TracebackType | None) -> str:
    """The innermost module whose forward was running, by its name in the outermost one."""
    modules = list(_modules(traceback))
    if not modules:
        return ""
    names = {id(module): name for name, module in modules[0].named_modules()}
    name, kind = names.get(id(modules[-1])), type(modules[-1]).__name__
    return f"{name} ({kind})" if name else kind


def _modules(traceback: TracebackType | None) -> Iterator[nn.Module]:
    while traceback is not None:
        local = traceback.tb_frame.f_locals
        if isinstance(module := local.get("self"), nn.Module):
            yield module
        traceback = traceback.tb_next


def _suspects(refused: Refused | None, model: nn.Module | None) -> str:
    """The modules of a model that call an operation, where it was refused outside of all of them."""
    if refused is None or model is None:
        return ""
    found = [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if type(m).__name__ in refused.modules]
    return f" in the backward pass of {', '.join(found[:5])}" if found else ""
