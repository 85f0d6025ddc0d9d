"""What the one read of a step costs against a plain read of the same tensors, and how exact its sums are.

    python scripts/benchmarks/fused_read.py --threads 2 --rounds 30

The plain reads are of ``torch.dot`` over the model's own tensors: of w, w* and g for what gives sums, of w and g for
what gives digests alone. Each way is timed once a round, one after the other, each with cold caches; the ratios are
medians over rounds. The error is of the worst sum ``a . b``, over ``|a| |b|``, against sums in extended precision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import lanes
import numpy as np
import torch
import torchvision
from torch import Tensor

from geomprobe.kernels.fused_read import FusedRead
from geomprobe.kernels.sketch import Projector, numbered
from geomprobe.kernels.tensor_digests import TensorDigests
from geomprobe.report.table import table

COSINE = 0.003
SKETCH = 4096  # numbers of w, and as many of g


def points(model: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The model's initial weights, a reference 1 % away, and gradients with the wanted cosine."""
    torch.manual_seed(0)
    w = [parameter.detach() for parameter in torchvision.models.get_model(model).parameters()]
    star = [x + 0.01 * torch.randn_like(x) for x in w]
    noise = [1e-3 * torch.randn_like(x) for x in w]
    d = [x - y for x, y in zip(w, star, strict=True)]
    share = COSINE * (norm(noise) / norm(d))
    return w, star, [x + share * y for x, y in zip(noise, d, strict=True)]


def norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def dot_each(*pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
    for left, right in pairs:
        for a, b in zip(left, right, strict=True):
            torch.dot(a.view(-1), b.view(-1))


def worst_error(sums: Tensor, w: Sequence[Tensor], star: Sequence[Tensor], g: Sequence[Tensor]) -> float:
    x, s, y = (torch.cat([t.reshape(-1) for t in ts]).double().numpy().astype(np.longdouble) for ts in (w, star, g))
    d = x - s
    errors = []
    for found, (a, b) in zip(sums.tolist(), [(y, y), (x, y), (x, x), (y, d), (x, d), (d, d)], strict=True):
        errors.append(abs(found - (a * b).sum()) / np.sqrt((a * a).sum() * (b * b).sum()))
    return float(max(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="times each way is run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--backend", choices=["numba", "torch"], help="by default the fastest that is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    w, star, g = points(options.model)
    began = time.perf_counter()
    fused = FusedRead(w, {"final": star}, backend=options.backend)
    setup = time.perf_counter() - began
    digests = TensorDigests(w[0].device)
    projector = Projector(SKETCH, w[0].device)

    def sketched(sums: bool) -> None:
        fused.read(g, sums=sums)
        projector(numbered(w, w))
        projector(numbered(g, w))

    three, two = "plain read of w, w*, g", "plain read of w, g"
    ways: dict[str, Callable[[], object]] = {
        three: lambda: dot_each((w, star), (g, g)),
        two: lambda: dot_each((w, g)),
        "sums and both digests": lambda: fused.read(g),
        "both digests and norms": lambda: fused.read(g, sums=False),
        f"sums, digests and a sketch of {SKETCH}": lambda: sketched(True),
        f"digests, norms and a sketch of {SKETCH}": lambda: sketched(False),
        "both digests, by torch": lambda: digests([[tensor] for tensor in (*w, *g)]),
    }
    others = torch.ones(2**24)  # read before each call, so that the caches hold nothing of the model
    times = lanes.take_turns(ways, options.rounds, 2, before=lambda: torch.dot(others, others))
    found = fused.read(g).sums
    assert found is not None
    print(lanes.machine())
    size = sum(tensor.numel() for tensor in w)
    print(
        f"{options.model}: {size / 1e6:.1f} M parameters in {len(w)} tensors; {fused.backend}, set up in {setup:.1f} s"
    )
    print(f"error of the worst sum: {worst_error(found, w, star, g):.0e}")
    rows = [
        [name, f"{1e3 * lanes.typical(seconds):.2f} ms"]
        + [f"{lanes.ratio(seconds, times[other]):.2f}x" for other in (three, two)]
        for name, seconds in times.items()
    ]
    print(table(["", "median", "to w, w*, g", "to w, g"], rows, right=[1, 2, 3]))


if __name__ == "__main__":
    main()
