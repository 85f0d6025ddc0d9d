"""What the processes of a run would all keep alike in their checkpoints is kept by rank 0 alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from geomprobe.distributed.ranks import Ranks
from geomprobe.passes.checkpoint import store as checkpoint

_KINDS = ("weights/", "gradients/", "optimizer/")


def parted(
    ranks: Ranks, path: Path, tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], checkpoint.Alike | None]:
    """Leave out of a state what rank 0 keeps, where every process has the same weights.

    Waits for rank 0 to say what it keeps.

    Args:
        ranks: the processes of the run.
        path: of rank 0's checkpoint.
        tensors: of this process's state.

    Returns:
        The tensors that this process is to keep, and what it shares, if that is all the same.

    >>> tensors = {"weights/w": torch.ones(2), "buffers/b": torch.zeros(1)}
    >>> kept, shared = parted(Ranks(), Path("step-00000012"), tensors)
    >>> list(kept), shared.at
    (['weights/w', 'buffers/b'], None)
    """
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith(_KINDS)}
    digest = _digest(shared)
    if ranks.broadcast(path.name, digest) != digest:
        return tensors, None
    if ranks.first:
        return tensors, checkpoint.Alike(tuple(shared), digest)
    own = {name: tensor for name, tensor in tensors.items() if name not in shared}
    return own, checkpoint.Alike(tuple(shared), digest, path)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
