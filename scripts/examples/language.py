"""Train a language model on WikiText-2, or on the source of Python's standard library, which needs no download.

    python scripts/examples/language.py --data data                          the Transformer on WikiText-2, as NWT
    python scripts/examples/language.py --corpus stdlib --model gpt
    geomprobe record -o runs/stdlib scripts/examples/language.py --corpus stdlib --layers 2 --train-words 50000

What is not given is as in NWT's appendix A.4 (Adam, rate 1e-4, weight decay 1e-5, 20 epochs); the sizes, the 32 words
of a segment and the clipping, which it leaves to PyTorch's word language model, are those of its authors' code.
The gradient is measured as the optimizer gets it, which is clipped.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import geomprobe

# The papers' models and data are beside the experiments.
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

from workloads import GPT, Corpus, WordTransformer, columns, segments, stdlib, wikitext2


def make_corpus(options: argparse.Namespace) -> Corpus:
    if options.corpus == "wikitext2":
        return wikitext2(options.data)
    return stdlib(modules=options.modules, words=options.vocabulary)


def make_model(options: argparse.Namespace, words: int) -> nn.Module:
    sizes = {"features": options.features, "heads": options.heads, "layers": options.layers}
    if options.model == "gpt":
        return GPT(words, context=options.bptt, dropout=options.dropout, **sizes)
    return WordTransformer(words, hidden=options.hidden, dropout=options.dropout, **sizes)


def make_optimizer(options: argparse.Namespace, model: nn.Module) -> Optimizer:
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    momentum = 0.9 if options.optimizer == "momentum" else 0
    return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=momentum, weight_decay=options.weight_decay)


def loss_of(model: nn.Module, words: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy of the next word, in nats."""
    return functional.cross_entropy(model(words).flatten(0, 1), following.flatten())


@torch.no_grad()
def perplexity(model: nn.Module, held_out: list[tuple[Tensor, Tensor]]) -> float:
    """Exponential of the mean cross-entropy of a held-out word."""
    model.eval()
    total = sum(float(loss_of(model, *pair)) * len(pair[0]) for pair in held_out)
    model.train()
    return math.exp(total / sum(len(words) for words, _ in held_out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=["wikitext2", "stdlib"], default="wikitext2")
    parser.add_argument("--data", default="data", help="the folder that wikitext-2 lies in")
    parser.add_argument("--modules", nargs="+", help="of the standard library; all by default")
    parser.add_argument("--vocabulary", type=int, default=10_000, help="size of the standard library's")
    parser.add_argument("--train-words", type=int, help="train on that many words from the beginning")
    parser.add_argument("--model", choices=["transformer", "gpt"], default="transformer")
    parser.add_argument("--features", type=int, default=128, help="numbers per word")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="units of the Transformer's perceptrons")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bptt", type=int, default=32, help="words of a segment")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--optimizer", choices=["sgd", "momentum", "adam"], default="adam")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--clip", type=float, default=0.25, help="greatest norm of the gradient")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    options = parse()
    corpus = make_corpus(options)
    text = columns(corpus.train[: options.train_words], options.batch_size).to(options.device)
    held_out = segments(columns(corpus.valid, options.batch_size).to(options.device), options.bptt)
    model = make_model(options, len(corpus.vocabulary)).to(options.device)
    optimizer = make_optimizer(options, model)

    probe = geomprobe.attach(model, optimizer)
    for epoch in probe.epochs(options.epochs):
        for words, following in probe.batches(segments(text, options.bptt)):
            loss = loss_of(model, words, following)
            optimizer.zero_grad()
            # The closure is for Hg alone: attention's fused kernels have no second derivative.
            probe.backward(loss, closure=partial(loss_of, model, words, following))
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
        print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}  held-out perplexity {perplexity(model, held_out):.2f}")


if __name__ == "__main__":
    main()
