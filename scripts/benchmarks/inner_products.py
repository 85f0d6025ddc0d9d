"""What the inner products cost against reading w, w* and g once, and how exact they are.

    python scripts/benchmarks/inner_products.py --threads 2 --rounds 30

Two floors, both of ``torch.dot``: over as many bytes in three long vectors, and over the model's own tensors,
which being many and apart take longer to read. Every way is timed once a round, one after the other, each
with cold caches; the ratios are of the medians. The errors are
relative, against a float64 loop, for gradients whose cosine with w - w* is 0.003. Scratch is what a way
holds or allocates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import lanes
import torch
import torchvision
from torch import Tensor

from geomprobe.measure.inner_products import InnerProducts

COSINE = 0.003
VECTORS, TENSORS = "reading three vectors", "reading the tensors"


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


def in_float64(w: Sequence[Tensor], star: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
    """The expected sums: tensor by tensor, everything in float64."""
    total = torch.zeros(6, dtype=torch.float64)
    for x, y, z in zip(w, star, g, strict=True):
        a, b = z.double(), x.double()
        d = b - y.double()
        total += torch.stack([(a * a).sum(), (b * a).sum(), (b * b).sum(), (a * d).sum(), (b * d).sum(), (d * d).sum()])
    return total


def naive(w: Sequence[Tensor], star: Sequence[Tensor], g: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Flatten, concatenate, float32 dots; and the bytes of the temporaries it makes."""
    a, b, c = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (g, w, star))
    d = b - c
    sums = [a.dot(a), b.dot(a), b.dot(b), a.dot(d), b.dot(d), d.dot(d)]
    return torch.stack([value.double() for value in sums]), 4 * d.nbytes


def dot_each(w: Sequence[Tensor], star: Sequence[Tensor], g: Sequence[Tensor]) -> None:
    """Read every tensor once."""
    for x, y, z in zip(w, star, g, strict=True):
        torch.dot(x.view(-1), y.view(-1))
        torch.dot(z.view(-1), z.view(-1))


def table(times: dict[str, float], results: dict[str, tuple[Tensor, int]], oracle: Tensor) -> Iterator[str]:
    yield f"| way | ms | over {VECTORS} | over {TENSORS} | error of g.d | worst of the six | scratch MiB |"
    yield "|---|---|---|---|---|---|---|"
    for name, taken in times.items():
        cells = [name, f"{taken:.2f}", f"{taken / times[VECTORS]:.2f}", f"{taken / times[TENSORS]:.2f}"]
        if name in results:
            sums, scratch = results[name]
            errors = ((sums - oracle) / oracle).abs()
            cells += [f"{float(errors[3]):.0e}", f"{float(errors.max()):.0e}", f"{scratch / 2**20:.1f}"]
        yield "| " + " | ".join(cells + [""] * (7 - len(cells))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="times each way is run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    w, star, g = points(options.model)
    size = sum(tensor.numel() for tensor in w)
    x, y, z = torch.randn(3, size)
    start = time.perf_counter()
    measures = {
        "eager": InnerProducts(w, {"final": star}),
        "eager, per parameter": InnerProducts(w, {"final": star}, per_parameter=True),
        "compiled": InnerProducts(w, {"final": star}, compiled=True),
    }
    compiling = time.perf_counter() - start
    ways: dict[str, Callable[[], object]] = {
        VECTORS: lambda: (x.dot(y), z.dot(z)),
        TENSORS: lambda: dot_each(w, star, g),
        **{name: partial(products.measure, g) for name, products in measures.items()},
        "naive": lambda: naive(w, star, g),
    }
    results = {
        name: (products.measure(g).view(-1, 6)[0], products.scratch_bytes) for name, products in measures.items()
    }
    results["naive"] = naive(w, star, g)
    print(
        f"{options.model}: {size / 1e6:.1f} M parameters in {len(w)} tensors, {options.threads} threads, ",
        end="",
    )
    print(f"torch {torch.__version__}; compiling took {compiling:.1f} s\n")
    others = torch.ones(2**24)  # read before each call, so that the caches hold nothing of the model
    times = lanes.take_turns(ways, options.rounds, 2, before=lambda: torch.dot(others, others))
    medians = {name: 1e3 * lanes.typical(seconds) for name, seconds in times.items()}
    for line in table(medians, results, in_float64(w, star, g)):
        print(line)


if __name__ == "__main__":
    main()
