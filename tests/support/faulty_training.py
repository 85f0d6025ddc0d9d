"""A small training with a place for a fault at every point of a step, written in three ways of using the probe."""

import random
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import geomprobe

STYLES = ("batches", "attach", "unmodified")
BATCHES, EPOCHS = 5, 14
STEPS = BATCHES * EPOCHS


class Samples(Dataset):
    """40 samples of 8 numbers in 3 classes, augmented with all three global generators."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 8, generator=generator)
        self.y = torch.randint(3, (40,), generator=generator)
        self.noise = 0.1
        self.swap = False

    def __len__(self):
        return len(self.x)

    def __getitems__(self, indices):
        if self.swap:
            indices[:2] = indices[1::-1]
        return [self[index] for index in indices]

    def __getitem__(self, index):
        sign = 1 if random.random() < 0.5 else -1
        return sign * self.x[index] + self.noise * torch.randn(8) + float(np.random.rand()), self.y[index]


class Training:
    """What a fault can reach: the model, the optimizer, the data, the batch at hand and the step's number."""

    def __init__(self, fault):
        self.fault = fault
        self.step = 0
        self.smoothing = 0.0
        self.epochs = EPOCHS
        self.stop = None
        self.settings = {}
        self.batch_size = 8

    def at(self, point):
        if self.fault is not None:
            self.fault(self, point)


def trainer(style, *, optimizer=torch.optim.SGD, fault=None, swallow=False, **settings):
    """A training function; ``fault(training, point)`` is called at each point of each step."""

    def train():
        t = Training(fault)
        t.settings = settings
        t.at("start")
        t.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        t.data = Samples()
        t.optimizer = optimizer(t.model.parameters(), **{"lr": 0.05, **t.settings})
        t.loader = DataLoader(t.data, t.batch_size, shuffle=True)
        t.at("built")
        t.probe = None if style == "unmodified" else geomprobe.attach(t.model, t.optimizer)
        t.at("fetch")
        for _ in t.probe.epochs(t.epochs) if style == "batches" else range(t.epochs):
            for batch in t.probe.batches(t.loader) if style == "batches" else t.loader:
                t.batch = batch
                try:
                    one_step(t, style)
                except Exception:
                    if not swallow:
                        raise
                t.step += 1
                if t.step == t.stop:
                    return
                t.at("fetch")
        t.at("end")

    return train


def one_step(t, style):
    t.at("forward")
    x, y = t.batch
    loss = functional.cross_entropy(t.model(x), y, label_smoothing=t.smoothing)
    t.optimizer.zero_grad()
    if style == "batches":
        t.probe.backward(loss)
    else:
        loss.backward()
    t.at("update")
    t.optimizer.step()


def at_step(step, point, do):
    """A fault: ``do(training)`` once, at a point of a step."""

    def fault(training, reached):
        if (training.step, reached) == (step, point):
            do(training)

    return fault


@torch.no_grad()
def one_ulp(tensor, index=0):
    """Move one element to the next number above it."""
    flat = tensor.view(-1)
    if tensor.is_floating_point():
        flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf, dtype=tensor.dtype))
    else:
        flat[index] += 1


class Fault(NamedTuple):
    """What is done at a point of a step, and what must be named: a component, and a tensor by style."""

    point: str
    do: object
    component: str
    tensor: str
    elsewhere: tuple[str, str] | None = None  # component and tensor in scripts that do not show their batches

    def expected(self, style):
        return self.elsewhere if self.elsewhere and style != "batches" else (self.component, self.tensor)


def swap_samples(t):
    t.data.swap = True


def change_noise(t):
    t.data.noise *= 1.01


def change_label(t):
    t.batch[1][0] = (t.batch[1][0] + 1) % 3


def smooth(t):
    t.smoothing = 1e-3


def group(name, value):
    return lambda t: t.optimizer.param_groups[0].update({name: value})


def state(tensor, name):
    return lambda t: one_ulp(t.optimizer.state[t.model.get_parameter(tensor)][name])


FAULTS = {
    "a draw from Python's RNG before the fetch": Fault("fetch", lambda t: random.random(), "rng", "fetch/python"),
    "a draw from NumPy's RNG before the fetch": Fault("fetch", lambda t: np.random.rand(), "rng", "fetch/numpy"),
    "a draw from torch's RNG before the fetch": Fault("fetch", lambda t: torch.rand(1), "rng", "fetch/torch"),
    "a draw from Python's RNG after the fetch": Fault("forward", lambda t: random.random(), "rng", "step/python"),
    "a draw from NumPy's RNG after the fetch": Fault("forward", lambda t: np.random.rand(), "rng", "step/numpy"),
    "a draw from torch's RNG after the fetch": Fault("forward", lambda t: torch.rand(1), "rng", "step/torch"),
    "an ulp in a weight": Fault("forward", lambda t: one_ulp(t.model[4].weight), "weights", "4.weight"),
    "an ulp in a weight before its update": Fault("update", lambda t: one_ulp(t.model[1].bias), "weights", "1.bias"),
    "an ulp in a momentum": Fault("forward", state("0.weight", "momentum_buffer"), "optimizer", "0.weight"),
    "an ulp in a running mean": Fault(
        "forward", lambda t: one_ulp(t.model[1].running_mean), "buffers", "1.running_mean"
    ),
    "a count of batches": Fault(
        "update", lambda t: one_ulp(t.model[1].num_batches_tracked), "buffers", "1.num_batches_tracked"
    ),
    "two samples swapped": Fault("fetch", swap_samples, "batch", "fetched", ("batch", "inputs")),
    "another augmentation": Fault("fetch", change_noise, "batch", "fetched", ("batch", "inputs")),
    "another loss": Fault("forward", smooth, "loss", "loss"),
    "another learning rate": Fault("forward", group("lr", 0.0500001), "hyperparameters", "lr"),
    "another momentum": Fault("update", group("momentum", 0.8), "hyperparameters", "momentum"),
    "another weight decay": Fault("fetch", group("weight_decay", 1e-5), "hyperparameters", "weight_decay"),
    "another gradient": Fault("update", lambda t: one_ulp(t.model[4].bias.grad), "gradient", "4.bias"),
}
