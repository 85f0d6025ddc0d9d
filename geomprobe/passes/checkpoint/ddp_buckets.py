"""DDP's first steps made up for where a run begins in the middle, since they decide the order of its sums.

After its first backward pass DDP puts the gradients into other buckets, in the order in which they came. From three
processes on a sum's bits depend on its place in a bucket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from geomprobe.errors import RunError
from geomprobe.probe.hooks.global_hooks import muted
from geomprobe.reproducibility.digest import leaves
from geomprobe.reproducibility.isolation import keep_gradients, keep_state

_STEPS = 3  # after which a run's buckets stay as they are, with a static graph too, and DDP's log has them


def buckets(replicas: Sequence[nn.Module]) -> list[str | None]:
    """How each DDP module has its gradients in buckets now; None while it has not regrouped them."""
    logged: list[Any] = [replica._get_ddp_logging_data() for replica in replicas]  # type: ignore[operator]
    return [each.get("rebuilt_per_bucket_param_indices") for each in logged]


class WarmUp:
    """Takes each DDP module through some passes before its first real one, from ``step`` on, and restores all but the
    buckets.
    """

    def __init__(self, replicas: Sequence[nn.Module], step: int) -> None:
        self._passes = min(step, _STEPS)
        self._hooks = {
            replica: replica.register_forward_pre_hook(self._entered, prepend=True, with_kwargs=True)
            for replica in (replicas if self._passes else ())
        }

    def _entered(self, replica: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or replica not in self._hooks:
            return
        self._hooks.pop(replica).remove()
        members = list(replica.parameters())
        with keep_state(replica), keep_gradients(members), _synchronizing(replica), muted():
            for _ in range(self._passes):
                for parameter in members:
                    parameter.grad = None
                outputs = [t for t in leaves(replica.forward(*args, **kwargs))[0] if t.requires_grad]
                if not outputs:
                    raise RunError(
                        "the run cannot continue in the middle under DDP: the model's output holds no tensor with a "
                        "gradient, so its buckets cannot be brought to what they were. Start over with --force."
                    )
                torch.stack([output.float().sum() for output in outputs]).sum().backward()


def require_buckets(then: Sequence[str | None], replicas: Sequence[nn.Module]) -> None:
    """Compare DDP's buckets, after the first backward pass, with what `buckets` gave when the checkpoint was taken.

    Raises:
        RunError: they are others, so sums over the processes would come in another order.
    """
    for before, now in zip(then, buckets(replicas), strict=True):
        if before is not None and before != now:
            raise RunError(
                f"DDP had its gradients in the buckets {before} when the checkpoint was taken, and has them in "
                f"{now} now: sums would come in another order, and the run would be another one. Does the model use "
                "its parameters in another order from step to step? It can only start over, with --force."
            )


@contextlib.contextmanager
def _synchronizing(replica: Any) -> Iterator[None]:
    before, replica.require_backward_grad_sync = replica.require_backward_grad_sync, True
    try:
        yield
    finally:
        replica.require_backward_grad_sync = before
