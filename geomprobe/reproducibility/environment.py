"""The manifest of everything that moves bits (software, hardware, flags, sources, training), and its comparison."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from geomprobe._package import FOLDER, __version__
from geomprobe.errors import EnvironmentMismatch

# A difference in one of these can change bits although every flag below reads the same.
BIT_CHANGING_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_BUFFSIZE",
    "NCCL_COLLNET_ENABLE",
    "NCCL_CROSS_NIC",
    "NCCL_GRAPH_FILE",
    "NCCL_MAX_CTAS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_CTAS",
    "NCCL_MIN_NCHANNELS",
    "NCCL_NTHREADS",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_TOPO_FILE",
    "NCCL_TUNER_PLUGIN",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
    "PYTHONHASHSEED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_LINALG_PREFER_CUSOLVER",
)


_UNCERTIFIED = " (`replay --uncertified` goes on without a certificate.)"

_NOTHING = {"replay": "nothing was replayed", "go on": "nothing was done"}

# Sections of the manifest whose every entry must be equal for a replay to be the same run: those that are known at the
# start, and those of the first step. "host" and "measure" are there to read; they change no bits of the training.
START_SECTIONS = ("seed", "strict", "script", "software", "hardware", "environment")
FIRST_STEP_SECTIONS = ("flags", "optimizer", "model", "loader", "ranks")


def file_digest(path: Path) -> str | None:
    """SHA-256 of a regular file, None where it cannot be read, or is another thing, whose end may never come."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return None


def source_digests(root: Path) -> dict[str, str]:
    """SHA-256 of every imported module's file below the script's folder ``root``, by path relative to it.

    It is the user's own code beside the script; installed packages below the folder are left out.
    """
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        # As text first: a path of each of some thousand modules would take 0.1 s.
        if not (isinstance(file, str) and file.startswith(str(root))):
            continue
        path = Path(file)
        if not path.is_relative_to(root) or path.is_relative_to(FOLDER):
            continue
        if "site-packages" in path.parts or (digest := file_digest(path)) is None:
            continue
        found[str(path.relative_to(root))] = digest
    return dict(sorted(found.items()))


def function_script(train: Callable[[], Any]) -> dict[str, Any]:
    """Describe a function as what is run; its source counts where Python can find it."""
    try:
        digest = hashlib.sha256(inspect.getsource(train).encode()).hexdigest()
    except (OSError, TypeError):
        digest = None
    name = getattr(train, "__qualname__", type(train).__qualname__)
    return {"kind": "function", "path": name, "argv": [], "cwd": None, "root": None, "sha256": digest}


def start_manifest(*, seed: int, strict: bool, script: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the environment before the script runs.

    Args:
        seed: the seed given to every global generator.
        strict: whether deterministic algorithms are enforced.
        script: what is run: kind, path, argv, cwd, sha256.

    Returns:
        A JSON-serializable dict of sections; ``host`` is for reading only.
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "geomprobe": __version__,
        "seed": seed,
        "strict": strict,
        "script": dict(script),
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda if devices else None,
            "cudnn": torch.backends.cudnn.version() if devices else None,
            "nccl": _nccl() if devices else None,
        },
        "hardware": {
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "devices": devices,
        },
        "environment": {name: os.environ.get(name) for name in BIT_CHANGING_VARIABLES},
        "host": {
            "name": socket.gethostname(),
            "platform": platform.platform(),
            "h5py": h5py.__version__,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def _nccl() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None


def flags() -> dict[str, Any]:
    """torch's switches that move bits, as they stand now."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "cudnn": bool(torch.backends.cudnn.enabled),
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
        "cudnn_deterministic": bool(torch.backends.cudnn.deterministic),
        "cudnn_float32": _float32_precision(cudnn),
        "cublas_float32": _float32_precision(cuda.matmul),
        "cublas_reduced_float16": str(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "cublas_reduced_bfloat16": str(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "linalg_library": str(cuda.preferred_linalg_library()),
        "attention": {
            "flash": cuda.flash_sdp_enabled(),
            "memory_efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        },
        "flush_denormal": float(torch.tensor(1e-310, dtype=torch.float64) * 1.0) == 0.0,
    }


def _float32_precision(backend: Any) -> str:
    """Whether a library of CUDA may use TF32: torch's present name for it, or the one before 2.9."""
    found = getattr(backend, "fp32_precision", None)
    return str(backend.allow_tf32) if found is None else str(found)


def training_manifest(
    model: nn.Module | None,
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, Tensor],
    loader: DataLoader[Any] | None,
) -> dict[str, Any]:
    """What is known of the training when its first step is about to be taken: the `FIRST_STEP_SECTIONS`.

    Args:
        model: the trained module, if it is known.
        optimizers: those that train it.
        parameters: the measured ones by name.
        loader: the one that gave the first step's batch, if one did.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()})
    several = len(optimizers) > 1
    groups = [(i, group) for i, optimizer in enumerate(optimizers) for group in optimizer.param_groups]
    found = {
        "flags": flags(),
        "optimizer": {
            "class": " + ".join(type(optimizer).__name__ for optimizer in optimizers),
            "groups": [
                {
                    **{k: _plain(v) for k, v in group.items() if k != "params"},
                    "num_parameters": len(group["params"]),
                    **({"optimizer": i} if several else {}),
                }
                for i, group in groups
            ],
        },
        "model": {
            "class": type(model).__name__ if model is not None else None,
            "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
            "num_parameters": sum(p.numel() for p in parameters.values()),
            "parameters": list(parameters),
            "device": str(next(iter(parameters.values())).device),
        },
    }
    if loader is not None:
        names = ("batch_size", "num_workers", "persistent_workers", "drop_last")
        found["loader"] = {name: getattr(loader, name) for name in names}
    return found


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)


def require_same_start(recorded: Mapping[str, Any], manifest: Mapping[str, Any], run: Path, doing: str) -> None:
    """Refuse to replay a run, or to go on with it, where the script or the environment has changed.

    Args:
        recorded: the manifest of the recording.
        manifest: what is known now, before the script runs.
        run: what was recorded.
        doing: what is refused: ``"replay"`` or ``"go on"``.

    Raises:
        EnvironmentMismatch: naming what changed.
    """
    before, now = recorded["script"], manifest["script"]
    changed = changed_sources(recorded.get("sources", {}), Path(now.get("root") or "."))
    if before.get("sha256") != now["sha256"] and before["path"] == now["path"]:
        changed = [
            now["path"],
            *(name for name in changed if Path(now["root"] or ".", name) != Path(now["path"])),
        ]
    if changed and before.get("root") == now.get("root"):
        raise EnvironmentMismatch(
            f"{', '.join(changed)} changed since {run} was recorded, so to {doing} would make another run: "
            f"{_NOTHING[doing]}. Restore the recorded version, or record again."
            f"{_UNCERTIFIED if doing == 'replay' else ''}"
        )
    require_same(recorded, manifest, START_SECTIONS, run, doing)


def changed_sources(recorded: Mapping[str, str], root: Path) -> list[str]:
    """Recorded files that are gone or different below ``root``."""
    return [name for name, digest in recorded.items() if file_digest(root / name) != digest]


def first_mismatch(
    recorded: Mapping[str, Any], present: Mapping[str, Any], sections: tuple[str, ...]
) -> tuple[str, Any, Any] | None:
    """The first entry of ``sections`` whose value differs: its dotted name and both values.

    >>> first_mismatch({"flags": {"threads": 2}}, {"flags": {"threads": 1}}, ("flags",))
    ('flags.threads', 2, 1)
    """
    pairs = ((section, recorded.get(section), present.get(section)) for section in sections)
    return next((found for pair in pairs if (found := _difference(*pair)) is not None), None)


def _difference(name: str, recorded: Any, present: Any) -> tuple[str, Any, Any] | None:
    if isinstance(recorded, Mapping) and isinstance(present, Mapping):
        pairs = [(f"{name}.{key}", recorded.get(key), present.get(key)) for key in {**recorded, **present}]
    elif isinstance(recorded, list) and isinstance(present, list) and len(recorded) == len(present):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(recorded, present, strict=True))]
    else:
        return None if recorded == present else (name, recorded, present)
    return next((found for pair in pairs if (found := _difference(*pair)) is not None), None)


def require_same_kind(recorded: Mapping[str, Any], present: Mapping[str, Any], what: Path) -> None:
    """Refuse another optimizer than the one that a checkpoint, ``what``, is of; its hyperparameters may have moved on.

    Both are sections ``optimizer`` of a manifest.

    Raises:
        EnvironmentMismatch: its class or the sizes of its groups differ.
    """
    before, now = (
        (section["class"], [(group["num_parameters"], group.get("optimizer", 0)) for group in section["groups"]])
        for section in (recorded, present)
    )
    if before != now:
        before, now = ((name, [count for count, _ in groups]) for name, groups in (before, now))
        raise EnvironmentMismatch(
            f"{what} is of {before[0]} with groups of {before[1]} tensors, and here is {now[0]} with {now[1]}: nothing "
            "was done. Build the same optimizer, or record again."
        )


def require_same(
    recorded: Mapping[str, Any],
    present: Mapping[str, Any],
    sections: tuple[str, ...],
    run: Path,
    doing: str = "replay",
) -> None:
    """Refuse to replay a run, or to go on with it, in an environment that differs from the recording's.

    Args:
        recorded, run, doing: as for `require_same_start`.
        present: the manifest as it is now.
        sections: which sections count.

    Raises:
        EnvironmentMismatch: naming the entry and both values.
    """
    found = first_mismatch(recorded, present, sections)
    if found is None:
        return
    name, before, now = found
    raise EnvironmentMismatch(
        f"{run} was recorded with {name} = {before!r}, but here it is {now!r}, which can change bits: "
        f"{_NOTHING[doing]}. Restore {name} to {before!r} and {doing} again, or record again with "
        f"`geomprobe record`.{_UNCERTIFIED if doing == 'replay' else ''}"
    )
