"""What Hg costs: step time and memory, against the plain step and a hand-written minimal double backward.

    python scripts/benchmarks/curvature.py  ResNet-18, a small GPT and an MLP; some minutes on 2 cores
    python scripts/benchmarks/curvature.py --models gpt        one of them
    python scripts/benchmarks/curvature.py --steps 100         longer, steadier

Trainings of one model on the same batches take turns, step by step in one process:

    plain        forward, backward, update
    by hand      the shortest code that has Hg: autograd.grad with create_graph, and autograd.grad of that
    geomprobe    Curvature.backward and Curvature.product
    every 8th    the same at each 8th step, plain backward at the others
    curvlinops   a plain step and curvlinops' HessianLinearOperator on its minibatch, where it is installed

Times are medians over steps, ratios medians over rounds of turns. Memory is the peak of a process that runs one
training alone, above that of the plain one, in units of the weights.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator

import lanes
import torch
from torch import Tensor, nn
from torch.nn import functional

from geomprobe.measure.curvature.hessian_gradient import Curvature
from geomprobe.report.table import table

SPARSE = 8
WARM_UP = SPARSE  # rounds

Batch = tuple[Tensor, Tensor]


class GPT(nn.Module):
    """A decoder of the usual kind, with attention written out: fused kernels have no second derivative."""

    def __init__(self, vocabulary: int = 512, width: int = 128, heads: int = 4, depth: int = 4, length: int = 64):
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "after": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("future", torch.ones(length, length).triu(1).bool(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = x + block["out"](self._attention(block["qkv"](block["before"](x))))
            x = x + block["mlp"](block["after"](x))
        return self.head(self.norm(x)).transpose(1, 2)

    def _attention(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(self.future, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


def resnet() -> nn.Module:
    """ResNet-18 with the stem for 32x32 images, 11.2 M parameters."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def images(shape: tuple[int, ...]) -> Callable[[], Batch]:
    return lambda: (torch.randn(shape), torch.randint(10, shape[:1]))


def text() -> Batch:
    tokens = torch.randint(512, (8, 65))
    return tokens[:, :-1], tokens[:, 1:]


MODELS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Batch]]] = {
    "resnet": ("ResNet-18, batch 32 of 3x32x32", resnet, images((32, 3, 32, 32))),
    "gpt": ("GPT, 4 layers of width 128, batch 8 of 64 tokens", GPT, text),
    "mlp": ("MLP 784-1024-1024-10, batch 128", mlp, images((128, 784))),
}


class Training:
    """One lane: a model, its optimizer, and how its gradients and Hg come about."""

    every = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9)

    def run(self, data: list[Batch]) -> Iterator[None]:
        for step, (x, y) in enumerate(data):
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(x), y)
            if step % self.every:
                loss.backward()
            else:
                self.differentiate(loss, x, y)
            del loss
            self.optimizer.step()
            yield

    @property
    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self.parameters]

    def differentiate(self, loss: Tensor, x: Tensor, y: Tensor) -> None:
        loss.backward()


class ByHand(Training):
    def differentiate(self, loss: Tensor, x: Tensor, y: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.detach()
        self.product = torch.autograd.grad(gradients, self.parameters, self.gradients)


class Geomprobe(Training):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.curvature = Curvature(self.parameters, model)

    def differentiate(self, loss: Tensor, x: Tensor, y: Tensor) -> None:
        self.curvature.backward(loss)
        self.product = self.curvature.product(self.gradients)


class Sparse(Geomprobe):
    every = SPARSE


class Curvlinops(Training):
    def differentiate(self, loss: Tensor, x: Tensor, y: Tensor) -> None:
        from curvlinops import HessianLinearOperator

        loss.backward()
        hessian = HessianLinearOperator(
            self.model, nn.CrossEntropyLoss(), self.parameters, [(x, y)], check_deterministic=False
        )
        self.product = hessian @ self.gradients


LANES: dict[str, type[Training]] = {
    "plain": Training,
    "by hand": ByHand,
    "geomprobe": Geomprobe,
    "every 8th": Sparse,
    "curvlinops": Curvlinops,
}


def lane(name: str, model: str, steps: int) -> lanes.Lane:
    """The training ``name`` of ``model``; all of one model see the same weights and batches."""
    _, build, batch = MODELS[model]
    torch.manual_seed(0)
    data = [batch() for _ in range(4)]
    return lanes.Lane(LANES[name](build()).run([data[i % 4] for i in range(steps)]))


def available(model: str) -> list[str]:
    """The lanes that run here; prints why curvlinops does not, if so."""
    names = list(LANES)
    if importlib.util.find_spec("curvlinops") is None:
        return names[:-1]
    try:
        lane("curvlinops", model, 1)()
    except Exception as error:  # whatever it is, it is that lane's
        print(f"curvlinops does not run on this model: {str(error).splitlines()[0]}")
        return names[:-1]
    return names


def report(model: str, steps: int) -> None:
    title, build, _ = MODELS[model]
    names = available(model)
    times = lanes.take_turns({name: lane(name, model, WARM_UP + steps) for name in names}, steps, WARM_UP)
    memory = {name: lanes.alone(__file__, "--models", model, "--alone", name) for name in names}
    weights = 4 * sum(p.numel() for p in build().parameters())
    rows = []
    for name in names:
        every = LANES[name].every
        by_hand = f"{lanes.ratio(times[name], times['by hand']):.3f}x" if every == 1 else ""
        cells = [
            f"{1e3 * lanes.typical(times[name], every):.1f} ms",
            f"{lanes.ratio(times[name], times['plain'], every):.3f}x",
            by_hand,
            f"{(memory[name] - memory['plain']) / weights:.2f} |w|",
        ]
        rows.append([name, *cells])
    print(f"\n{title}, {weights / 4e6:.1f} M parameters, {steps} steps")
    print(table(["", "step", "to plain", "to by hand", "extra memory"], rows, right=[1, 2, 3, 4]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48, help=f"measured steps, a multiple of {SPARSE}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--alone", choices=LANES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        lanes.print_peak(lane(arguments.alone, arguments.models[0], 2 * SPARSE), SPARSE, SPARSE)
        return
    print(lanes.machine())
    for model in arguments.models:
        report(model, arguments.steps)


if __name__ == "__main__":
    main()
