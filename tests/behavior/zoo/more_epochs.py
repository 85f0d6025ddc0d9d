"""Where batches come from, and how epochs are counted.

The truth is the script's own count from 0 where it has one, else the passes over the loader that its steps are of.
"""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset

from behavior.zoo.witness import HG, Witness, batches, loader, loop, mlp, sgd

EPOCH = frozenset({"epoch"})


class Training:
    """A model whose plain steps a loop over data calls."""

    def __init__(self, witness: Witness, attach: bool = False) -> None:
        self.witness, self.model = witness, mlp()
        self.optimizer = sgd(self.model)
        self.probe = witness.watch(self.model, self.optimizer, attach=attach)

    def loss(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        return sum(mse_loss(self.model(x), y) for x, y in pairs)

    def step(self, *pairs: tuple[Tensor, Tensor], epoch: float = float("nan")) -> None:
        """A step on all of the batches at once."""
        self.optimizer.zero_grad()
        self.loss(*pairs).backward()
        self.witness.truth(lambda: self.loss(*pairs), epoch=epoch)
        self.optimizer.step()


# One loader


@loop("epochs", "for epoch in range, one loader, no attach")
def one_loader(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2, shuffle=True)
    for epoch in range(3):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("epochs", "epochs that the script counts from 1 are the same epochs")
def counted_from_one(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for epoch in range(1, 4):
        for batch in data:
            training.step(batch, epoch=epoch - 1)


@loop("epochs", "probe.batches without probe.epochs")
def probe_batches_alone(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for epoch in range(2):
        for batch in training.probe.batches(data):
            training.step(batch, epoch=epoch)


@loop("epochs", "two loops over probe.epochs: the second stage counts from 0 again")
def two_stages_named(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for _ in range(2):
        for epoch in training.probe.epochs(2):
            for batch in data:
                training.step(batch, epoch=epoch)


@loop("epochs", "next(iter(loader)) at each step", EPOCH)
def next_of_iter(witness: Witness) -> None:
    training, data = Training(witness), loader(count=3, shuffle=True)
    for t in range(4):
        training.step(next(iter(data)), epoch=t)


@loop("epochs", "while True, with StopIteration and a new iterator")
def iterator_renewed(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2)
    iterator, epoch, t = iter(data), 0, 0
    while t < 5:
        try:
            batch = next(iterator)
        except StopIteration:
            iterator = iter(data)
            epoch += 1
            continue
        training.step(batch, epoch=epoch)
        t += 1


def forever(data: Any) -> Iterator[Any]:
    while True:
        yield from data


@loop("epochs", "a generator that goes over the loader for ever")
def endless_generator(witness: Witness) -> None:
    training, stream = Training(witness), forever(loader(count=2))
    for t in range(5):
        training.step(next(stream), epoch=t // 2)


@loop("epochs", "a generator that goes on for ever, one batch ahead of the step", EPOCH)
def endless_generator_ahead(witness: Witness) -> None:
    training, stream = Training(witness), forever(loader(count=2))
    batch = next(stream)
    for t in range(5):
        ahead = next(stream)
        training.step(batch, epoch=t // 2)
        batch = ahead


@loop("epochs", "a prefetcher that is one batch ahead within each epoch", EPOCH)
def prefetched(witness: Witness) -> None:
    training, data = Training(witness), loader(count=3)
    for epoch in range(2):
        iterator = iter(data)
        batch = next(iterator)
        while batch is not None:
            ahead = next(iterator, None)
            training.step(batch, epoch=epoch)
            batch = ahead


@loop("epochs", "itertools.cycle, which keeps the batches of the first pass", EPOCH)
def cycled(witness: Witness) -> None:
    training = Training(witness)
    for t, batch in enumerate(itertools.islice(itertools.cycle(loader(count=2)), 5)):
        training.step(batch, epoch=t // 2)


@loop("epochs", "the batches are taken into a list once", EPOCH)
def listed_once(witness: Witness) -> None:
    training, data = Training(witness), list(loader(count=2))
    for epoch in range(3):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("epochs", "the batches are taken into a list each epoch", EPOCH)
def listed_each_epoch(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2, shuffle=True)
    for epoch in range(3):
        for batch in list(data):
            training.step(batch, epoch=epoch)


@loop("epochs", "each epoch ends early")
def broken_off(witness: Witness) -> None:
    training, data = Training(witness), loader(count=4)
    for epoch in range(3):
        for i, batch in enumerate(data):
            training.step(batch, epoch=epoch)
            if i == 1:
                break


@loop("epochs", "a new loader each epoch, over more and more of the data", EPOCH)
def new_loader_each_epoch(witness: Witness) -> None:
    training, data = Training(witness), loader(count=3).dataset
    for epoch in range(3):
        for batch in DataLoader(Subset(data, range(6 * (epoch + 1))), 6):
            training.step(batch, epoch=epoch)


@loop("epochs", "a pass over the loader for the mean of the data, before training", EPOCH)
def statistics_first(witness: Witness) -> None:
    data = loader(count=2)
    mean = torch.stack([x.mean(0) for x, _ in data]).mean(0)
    training = Training(witness)
    for epoch in range(2):
        for x, y in data:
            training.step((x - mean, y), epoch=epoch)


@loop("epochs", "an epoch in which a sanity check leaves after one batch, before training", EPOCH)
def sanity_check_first(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for x, _ in data:
        training.model(x)
        break
    for epoch in range(2):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("epochs", "accumulation over the end of an epoch: there is a pass without a step", EPOCH)
def accumulation_over_epochs(witness: Witness) -> None:
    training, data = Training(witness), loader(count=1)
    kept: list[Any] = []
    for epoch in range(6):
        for batch in data:
            kept.append(batch)
            if len(kept) == 2:
                training.step(*kept, epoch=epoch)
                kept = []


@loop("epochs", "several steps a batch")
def several_steps_a_batch(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2)
    for epoch in range(2):
        for batch in data:
            for _ in range(2):
                training.step(batch, epoch=epoch)


@loop("epochs", "several batches a step", EPOCH)
def several_batches_a_step(witness: Witness) -> None:
    training, data = Training(witness), loader(count=4)
    for epoch in range(2):
        kept: list[Any] = []
        for batch in data:
            kept.append(batch)
            if len(kept) == 2:
                training.step(*kept, epoch=epoch)
                kept = []


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in batches(2):
            yield from zip(x, y, strict=True)


@loop("epochs", "an iterable data set without a length")
def iterable_data_set(witness: Witness) -> None:
    training, data = Training(witness), DataLoader(Stream(), 6)
    for epoch in range(2):
        for batch in data:
            training.step(batch, epoch=epoch)


# No loader


@loop("epochs", "no loader: generated data, epochs in range", EPOCH)
def generated_data(witness: Witness) -> None:
    training = Training(witness)
    for epoch in range(2):
        for batch in batches(2):
            training.step(batch, epoch=epoch)


@loop("epochs", "no loader: generated data, a count of steps")
def generated_data_by_steps(witness: Witness) -> None:
    training = Training(witness, attach=True)
    for batch in batches():
        training.step(batch)


@loop("epochs", "no loader: generated data, probe.epochs")
def generated_data_named(witness: Witness) -> None:
    training = Training(witness, attach=True)
    for epoch in training.probe.epochs(3):
        for batch in batches(2):
            training.step(batch, epoch=epoch)


@loop("epochs", "several sweeps over a buffer of collected data, as in PPO; a loader gives the starts", EPOCH)
def sweeps_over_a_buffer(witness: Witness) -> None:
    training, starts = Training(witness), loader(count=2)
    for iteration in range(2):
        buffer = [(x, y) for x, y in starts]
        for _ in range(2):
            for batch in buffer:
                training.step(batch, epoch=iteration)


# Two loaders


@loop("epochs", "two loaders of equal length, zipped", EPOCH)
def zipped(witness: Witness) -> None:
    training, first, second = Training(witness), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(3):
        for one, other in zip(first, second, strict=True):
            training.step(one, other, epoch=epoch)


@loop("epochs", "a loader zipped with a shorter one that is cycled: the batches of that come from memory", EPOCH)
def zipped_with_a_cycle(witness: Witness) -> None:
    training, labeled, rest = Training(witness), loader(count=3), loader(count=2)
    for epoch in range(2):
        for one, other in zip(labeled, itertools.cycle(rest)):
            training.step(one, other, epoch=epoch)


@loop("epochs", "a loader, and beside it an endless one that is shorter", EPOCH)
def beside_an_endless_one(witness: Witness) -> None:
    training, data, beside = Training(witness), loader(count=3), forever(loader(count=2))
    for epoch in range(2):
        for batch in data:
            training.step(batch, next(beside), epoch=epoch)


@loop("epochs", "a validation batch by next(iter(...)) in each step, with gradients", EPOCH)
def validation_batch_each_step(witness: Witness) -> None:
    training, data, held_out = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for batch in data:
            training.loss(next(iter(held_out))).item()
            training.step(batch, epoch=epoch)


@loop("epochs", "the same, and the epochs are named")
def validation_batch_each_step_named(witness: Witness) -> None:
    training, data, held_out = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    for epoch in training.probe.epochs(2):
        for batch in data:
            training.loss(next(iter(held_out))).item()
            training.step(batch, epoch=epoch)


@loop("epochs", "two tasks take turns, each with an iterator of its own", EPOCH)
def tasks_in_turn(witness: Witness) -> None:
    training, tasks = Training(witness), (loader(count=3), loader(count=3, shuffle=True))
    for epoch in range(2):
        iterators = [iter(task) for task in tasks]
        for t in range(6):
            training.step(next(iterators[t % 2]), epoch=epoch)


@loop("epochs", "first all batches of one loader, then all of another, each epoch", EPOCH)
def one_after_the_other(witness: Witness) -> None:
    training, first, second = Training(witness), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for batch in itertools.chain(first, second):
            training.step(batch, epoch=epoch)


@loop("epochs", "a curriculum: two epochs of easy data, then one of hard", EPOCH)
def curriculum(witness: Witness) -> None:
    training, easy, hard = Training(witness), loader(count=1), loader(count=3)
    for epoch, data in enumerate([easy, easy, hard]):
        for batch in data:
            training.step(batch, epoch=epoch)


# Evaluation in between


def _evaluated(witness: Witness, gradients: bool, mid_epoch: bool, same: bool) -> None:
    training, data = Training(witness), loader(count=2)
    other = data if same else loader(count=2, shuffle=True)

    def evaluate() -> float:
        training.model.eval()
        with torch.set_grad_enabled(gradients):
            found = sum(training.loss(batch).item() for batch in other)
        training.model.train()
        return found

    for epoch in range(3):
        for batch in data:
            if mid_epoch:
                evaluate()
            training.step(batch, epoch=epoch)
        evaluate()


@loop("evaluation", "after each epoch under no_grad")
def evaluated_after_epochs(witness: Witness) -> None:
    _evaluated(witness, gradients=False, mid_epoch=False, same=False)


@loop("evaluation", "after each epoch without no_grad")
def evaluated_with_gradients(witness: Witness) -> None:
    _evaluated(witness, gradients=True, mid_epoch=False, same=False)


@loop("evaluation", "after each epoch on the training data, without no_grad", EPOCH)
def evaluated_on_training_data(witness: Witness) -> None:
    _evaluated(witness, gradients=True, mid_epoch=False, same=True)


@loop("evaluation", "between each batch and its step, under no_grad")
def evaluated_in_steps(witness: Witness) -> None:
    _evaluated(witness, gradients=False, mid_epoch=True, same=False)


@loop("evaluation", "between each batch and its step, without no_grad", EPOCH)
def evaluated_in_steps_with_gradients(witness: Witness) -> None:
    _evaluated(witness, gradients=True, mid_epoch=True, same=False)


@loop("evaluation", "between each batch and its step on the training data, without no_grad", EPOCH)
def evaluated_in_steps_on_training_data(witness: Witness) -> None:
    _evaluated(witness, gradients=True, mid_epoch=True, same=True)


# Loaders inside loaders


@loop("inner loops", "an inner loader in each step of an outer one; the step is after the inner loop", EPOCH)
def inner_loader(witness: Witness) -> None:
    training, tasks, support = Training(witness), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for task in tasks:
            parts = list(support)
            training.step(task, *parts, epoch=epoch)


@loop("inner loops", "steps in an inner loader, a new pass over it for each batch of the outer one", EPOCH)
def steps_in_inner_loader(witness: Witness) -> None:
    training, tasks, support = Training(witness), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for task in tasks:
            for batch in support:
                training.step(task, batch, epoch=epoch)


def _adapted(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Weights after a differentiable step of gradient descent."""
    weights = dict(model.named_parameters())
    inner = mse_loss(functional_call(model, weights, (batch[0],)), batch[1])
    slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    return {k: p - 0.1 * g for (k, p), g in zip(weights.items(), slopes, strict=True)}


@loop("inner loops", "MAML: the loss after an inner step, which is differentiated through", EPOCH)
def maml_two_loaders(witness: Witness) -> None:
    training, tasks, queries = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    model, optimizer = training.model, training.optimizer

    def loss(support: Any, query: Any) -> Tensor:
        return mse_loss(functional_call(model, _adapted(model, support), (query[0],)), query[1])

    for epoch in range(2):
        for support, query in zip(tasks, queries, strict=True):
            optimizer.zero_grad()
            loss(support, query).backward()
            witness.truth(lambda: loss(support, query), epoch=epoch)
            optimizer.step()


def _reptile(witness: Witness, copied: Callable[[nn.Module], nn.Module], attach: bool) -> None:
    training, tasks = Training(witness, attach=attach), loader(count=2)
    model, optimizer = training.model, training.optimizer
    for epoch in range(2):
        for x, y in tasks:
            inner = copied(model)
            inner_optimizer = sgd(inner)
            for _ in range(2):
                inner_optimizer.zero_grad()
                mse_loss(inner(x), y).backward()
                inner_optimizer.step()
            for p, q in zip(model.parameters(), inner.parameters(), strict=True):
                p.grad = p.detach() - q.detach()
            witness.truth(None, epoch=epoch)
            optimizer.step()


def _fresh(model: nn.Module) -> nn.Module:
    inner = mlp()
    inner.load_state_dict(model.state_dict())
    return inner


@loop("inner loops", "Reptile: inner steps of a model made for it, the difference is the gradient")
def reptile(witness: Witness) -> None:
    _reptile(witness, _fresh, attach=True)


@loop("inner loops", "Reptile: inner steps of a deep copy")
def reptile_deep_copy(witness: Witness) -> None:
    _reptile(witness, copy.deepcopy, attach=True)


@loop("inner loops", "Reptile without attach", refused="Two optimizers step")
def reptile_no_attach(witness: Witness) -> None:
    _reptile(witness, _fresh, attach=False)


@loop("inner loops", "MAML of first order: the gradient of an adapted deep copy is handed over", HG | {"loss", "clr"})
def maml_first_order(witness: Witness) -> None:
    training, tasks = Training(witness, attach=True), loader(count=2)
    model, optimizer = training.model, training.optimizer
    for epoch in range(2):
        for x, y in tasks:
            inner = copy.deepcopy(model)
            slopes = torch.autograd.grad(mse_loss(inner(x), y), list(inner.parameters()))
            up = [-0.1 * slope for slope in slopes]
            with torch.no_grad():
                for q, by in zip(inner.parameters(), up, strict=True):
                    q.add_(by)
            mse_loss(inner(x), y).backward()
            for p, q in zip(model.parameters(), inner.parameters(), strict=True):
                p.grad = q.grad
            shift = dict(zip(dict(model.named_parameters()), up, strict=True))
            moved = lambda: {k: p + shift[k] for k, p in model.named_parameters()}  # noqa: E731
            loss = lambda: mse_loss(functional_call(model, moved(), (x,)), y)  # noqa: E731
            witness.truth(loss, epoch=epoch, hessian=False)
            optimizer.step()


# Named, and then not


@loop("named epochs", "steps after the loop over probe.epochs are of no epoch")
def steps_after_named_epochs(witness: Witness) -> None:
    training, parts = Training(witness, attach=True), batches()
    for epoch in training.probe.epochs(2):
        for batch in parts[:2]:
            training.step(batch, epoch=epoch)
    for batch in parts[2:]:
        training.step(batch)


@loop("named epochs", "steps before the loop over probe.epochs are of no epoch")
def steps_before_named_epochs(witness: Witness) -> None:
    training, parts = Training(witness, attach=True), batches()
    for batch in parts[2:]:
        training.step(batch)
    for epoch in training.probe.epochs(2):
        for batch in parts[:2]:
            training.step(batch, epoch=epoch)


@loop("named epochs", "after probe.epochs a second stage goes over its loader by range", EPOCH)
def second_stage_not_named(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for epoch in training.probe.epochs(2):
        for batch in data:
            training.step(batch, epoch=epoch)
    for epoch in range(2):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("named epochs", "probe.epochs is left by break, and another loop over it follows")
def named_epochs_broken_off(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for epoch in training.probe.epochs(5):
        for batch in data:
            training.step(batch, epoch=epoch)
        if epoch == 1:
            break
    for epoch in training.probe.epochs(1):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("named epochs", "evaluation through probe.batches too, without probe.epochs")
def evaluated_by_probe_batches(witness: Witness) -> None:
    training, data, held_out = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for batch in training.probe.batches(data):
            training.step(batch, epoch=epoch)
        for batch in training.probe.batches(held_out):
            training.loss(batch).item()


@loop("named epochs", "evaluation through probe.batches in the middle of an epoch of probe.batches", EPOCH)
def evaluated_by_probe_batches_inside(witness: Witness) -> None:
    training, data, held_out = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for batch in training.probe.batches(data):
            for other in training.probe.batches(held_out):
                training.loss(other).item()
            training.step(batch, epoch=epoch)


@loop("named epochs", "probe.batches over two zipped loaders")
def probe_batches_zipped(witness: Witness) -> None:
    training, first, second = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for one, other in training.probe.batches(zip(first, second, strict=True)):
            training.step(one, other, epoch=epoch)


@loop("named epochs", "an inner loop over probe.batches in each batch of an outer one", EPOCH)
def probe_batches_nested(witness: Witness) -> None:
    training, tasks, support = Training(witness, attach=True), loader(count=2), loader(count=2, shuffle=True)
    for epoch in range(2):
        for task in training.probe.batches(tasks):
            for batch in training.probe.batches(support):
                training.step(task, batch, epoch=epoch)


@loop("named epochs", "probe.batches over a list, each epoch, and steps between the epochs by other data", EPOCH)
def steps_between_probe_batches(witness: Witness) -> None:
    training, parts = Training(witness, attach=True), batches()
    for epoch in range(2):
        for batch in training.probe.batches(parts[:2]):
            training.step(batch, epoch=epoch)
        training.step(parts[3], epoch=epoch)


# More ways to go over data


@loop("epochs", "each epoch goes over the data twice: where they have no names, passes are epochs", EPOCH)
def two_passes_an_epoch(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2)
    for epoch in range(2):
        for part in range(2):
            for batch in data:
                training.step(batch, epoch=2 * epoch + part)


@loop("epochs", "an epoch without a step: the layers are frozen, and only looked at", EPOCH)
def an_epoch_without_steps(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2)
    for epoch in range(3):
        for batch in data:
            if epoch == 0:
                training.loss(batch)
            else:
                training.step(batch, epoch=epoch)


@loop("epochs", "the last batch of each pass is kept for the first step of the next", EPOCH)
def one_batch_late(witness: Witness) -> None:
    training, data = Training(witness), loader(count=3)
    late = None
    for epoch in range(2):
        for batch in data:
            if late is not None:
                training.step(late, epoch=epoch)
            late = batch


@loop("epochs", "a replay buffer: steps on batches of earlier passes", EPOCH)
def replay_buffer(witness: Witness) -> None:
    training, data = Training(witness), loader(count=2)
    buffer: list[Any] = []
    for epoch in range(3):
        for batch in data:
            buffer.append(batch)
            if epoch:
                training.step(buffer[len(buffer) // 2], epoch=epoch)


@loop("epochs", "hard examples: losses of a whole pass choose the batches of the steps", EPOCH)
def hard_examples(witness: Witness) -> None:
    training, data = Training(witness), loader(count=3)
    for epoch in range(2):
        found = [(training.loss(batch).item(), batch) for batch in data]
        for _, batch in sorted(found, key=lambda each: -each[0])[:2]:
            training.step(batch, epoch=epoch)


@loop("epochs", "a loader of the training data for batches, and another for its order, both used once an epoch")
def one_loader_for_labels(witness: Witness) -> None:
    training, data, weights = Training(witness), loader(count=2), loader(count=2)
    for epoch in range(3):
        total = sum(float(y.sum()) for _, y in weights)
        for x, y in data:
            training.step((x, y - 0.01 * total), epoch=epoch)


@loop("epochs", "a loader with a batch sampler, and drop_last")
def batch_sampler(witness: Witness) -> None:
    training = Training(witness)
    source = loader(count=3).dataset
    data = DataLoader(source, batch_sampler=BatchSampler(RandomSampler(source), 4, drop_last=True))
    for epoch in range(2):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("epochs", "one long pass, whose sampler goes over the data several times", EPOCH)
def sampler_of_many_epochs(witness: Witness) -> None:
    training = Training(witness)
    source = loader(count=2).dataset
    data = DataLoader(source, 6, sampler=RandomSampler(source, replacement=False, num_samples=3 * len(source)))
    for batch in data:
        training.step(batch, epoch=0)


@loop("epochs", "K folds: a training and a validation loader for each fold, one model", EPOCH)
def folds(witness: Witness) -> None:
    training, source = Training(witness), loader(count=3).dataset
    for fold in range(3):
        chosen = [i for i in range(18) if i % 3 != fold]
        for batch in DataLoader(Subset(source, chosen), 6):
            training.step(batch, epoch=fold)
        with torch.no_grad():
            for batch in DataLoader(Subset(source, range(fold, 18, 3)), 6):
                training.loss(batch)


@loop("named epochs", "a framework sets probe.epoch")
def epoch_set(witness: Witness) -> None:
    training, data = Training(witness, attach=True), loader(count=2)
    for epoch in range(3, 6):
        training.probe.epoch = epoch
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("epochs", "two loaders over one data set take turns, with samplers of their own", EPOCH)
def samplers_in_turn(witness: Witness) -> None:
    training = Training(witness)
    source = loader(count=3).dataset
    pair = DataLoader(source, 6), DataLoader(source, 6, shuffle=True)
    for epoch in range(2):
        iterators = [iter(data) for data in pair]
        for t in range(6):
            training.step(next(iterators[t % 2]), epoch=epoch)


@loop("epochs", "full batches: a pass over the loader is a step")
def full_batches(witness: Witness) -> None:
    training, data = Training(witness), loader(count=1)
    for epoch in range(4):
        for batch in data:
            training.step(batch, epoch=epoch)


@loop("epochs", "a dry run: each epoch ends after one batch", EPOCH)
def one_batch_an_epoch(witness: Witness) -> None:
    training, data = Training(witness), loader(count=3)
    for epoch in range(4):
        for batch in data:
            training.step(batch, epoch=epoch)
            break


@loop(
    "epochs",
    "one loader, evaluated with gradients after the third step of each epoch on another of the same data",
    EPOCH,
)
def evaluated_on_the_same_data(witness: Witness) -> None:
    training, data = Training(witness), loader(count=4)
    other = DataLoader(data.dataset, 12)
    for epoch in range(2):
        for t, batch in enumerate(data):
            training.step(batch, epoch=epoch)
            if t == 2:
                for held_out in other:
                    training.loss(held_out).item()
                    break
