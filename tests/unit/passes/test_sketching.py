"""A recording keeps the sketch of the weights and the gradient that the optimizer has, and resumes it bit for bit."""

import json

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import geomprobe
from geomprobe.cli import main
from geomprobe.errors import RunError, UsageError
from geomprobe.trace.record import open_record
from geomprobe.trace.sketch import projected

STEPS = 24


class Training:
    """24 steps of a model with tied weights, channels_last convolutions, an embedding and an unused parameter."""

    def __init__(self, stop=None, fused_scale=None):
        self.stop, self.fused_scale, self.seen = stop, fused_scale, []

    def __call__(self):
        data = TensorDataset(torch.randn(48, 3, 6, 6), torch.randint(0, 9, (48,)))
        conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        head = nn.Linear(16, 9)
        table = nn.Embedding(9, 16, sparse=self.fused_scale is None)
        tied = nn.Linear(16, 16, bias=False)
        again = nn.Linear(16, 16, bias=False)
        again.weight = tied.weight
        unused = nn.Linear(2, 2)
        mix = nn.Linear(8, 16)
        model = nn.ModuleList([conv, head, table, tied, again, unused, mix])
        # Only plain SGD takes sparse gradients.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=self.fused_scale is not None)
        scaler = torch.amp.GradScaler("cpu", init_scale=self.fused_scale or 1.0, enabled=self.fused_scale is not None)
        probe = geomprobe.attach(model, optimizer, scaler=scaler)
        for _ in probe.epochs(2):
            for x, y in probe.batches(DataLoader(data, 4)):
                if probe.step == self.stop:
                    self.stop = None
                    raise KeyboardInterrupt
                hidden = mix(conv(x).relu().mean((2, 3))) + table(y.flip(0))
                loss = nn.functional.cross_entropy(head(again(tied(hidden).tanh())), y)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                w = [p.detach().clone() for p in model.parameters()]
                scale = self.fused_scale or 1.0
                g = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() / scale for p in model.parameters()]
                self.seen.append((w, g))
                scaler.step(optimizer)
                scaler.update()


def as_recorded(sketch, described, tensors):
    return projected(described, [(each.numpy(), "float32") for each in tensors])


@pytest.mark.parametrize("fused_scale", [None, 1024.0])
def test_it_is_of_the_weights_before_each_step_and_of_the_unscaled_gradient(tmp_path, fused_scale, capsys):
    train = Training(fused_scale=fused_scale)
    record = geomprobe.record(train, tmp_path / "run", seed=0, sketch=64)
    sketch, described = record.sketch, record.manifest["sketch"]
    assert sketch.steps.tolist() == list(range(STEPS))
    for step, (w, g) in enumerate(train.seen):
        assert np.array_equal(sketch.weights(step), as_recorded(sketch, described, w))
        assert np.array_equal(sketch.gradients(step), as_recorded(sketch, described, g))
    last = record.reference("final")
    point = projected(described, [last[name] for name in record.manifest["model"]["parameters"]])
    assert np.array_equal(sketch.offsets("final"), sketch.weights() - point)
    assert "the sketch adds 1,024 bytes a step to the record" in capsys.readouterr().err
    assert not np.isnan(record.sketch.cosine().value).any()
    record.close()


def test_of_one_step_in_five_it_is_spread_over_five_rows(tmp_path, capsys):
    train = Training()
    record = geomprobe.record(train, tmp_path / "run", seed=0, sketch=64, sketch_every=5)
    sketch, described = record.sketch, record.manifest["sketch"]
    assert sketch.steps.tolist() == [0, 5, 10, 15]  # step 20's last part would be in row 24
    for step in sketch.steps:
        w, g = train.seen[step]
        assert np.array_equal(sketch.weights(step), as_recorded(sketch, described, w))
        assert np.array_equal(sketch.gradients(step), as_recorded(sketch, described, g))
    assert "adds 208 bytes a step" in capsys.readouterr().err  # 26 numbers, of 128 / 5


@pytest.mark.parametrize("every", [1, 5])
def test_a_resumed_recording_has_the_same_bits(tmp_path, every):
    options = {"sketch": 64, "sketch_every": every, "checkpoint_every": "7steps"}
    whole = geomprobe.record(Training(), tmp_path / "whole", seed=0, **options)
    train = Training(stop=17)
    with pytest.raises(KeyboardInterrupt):
        geomprobe.record(train, tmp_path / "cut", seed=0, **options)
    with open_record(tmp_path / "cut") as begun:
        streamed = begun.sketch
        assert begun.status == "incomplete"
        assert np.array_equal(streamed.weights(), whole.sketch.weights()[: len(streamed.steps)])
        with pytest.raises(UsageError, match="there is no reference 'final'"):
            streamed.cosine()
    resumed = geomprobe.record(train, tmp_path / "cut", resume=True)
    assert resumed.sketch.steps.tolist() == whole.sketch.steps.tolist()
    assert np.array_equal(resumed.sketch.weights(), whole.sketch.weights())
    assert np.array_equal(resumed.sketch.gradients(), whole.sketch.gradients())


def test_a_trace_finds_the_sketch_of_its_recording(tmp_path):
    train = Training()
    geomprobe.record(train, tmp_path / "run", seed=0, sketch=2000).close()
    trace = geomprobe.replay(train, tmp_path / "run", curvature_every=0)
    np.testing.assert_allclose(trace.sketch.cosine().value, trace["cosine"], rtol=1e-9)


def test_both_passes_in_one_call_keep_a_sketch_and_inspect_says_so(tmp_path, capsys):
    trace = geomprobe.two_pass(Training(), tmp_path / "run", seed=0, sketch=64, sketch_every=5, curvature_every=0)
    assert (trace.sketch.size, trace.sketch.steps.tolist()) == (64, [0, 5, 10, 15])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "64 numbers of the weights and of the gradient, every 5 steps" in capsys.readouterr().out


def test_a_run_without_a_sketch_says_how_to_get_one(tmp_path):
    record = geomprobe.record(Training(), tmp_path / "run", seed=0)
    with pytest.raises(RunError, match="has no sketch: record it with --sketch 4096"):
        _ = record.sketch


@pytest.mark.parametrize("size", [1, -5, 65537])
def test_a_size_that_makes_no_sense_is_refused(tmp_path, size):
    with pytest.raises(UsageError, match="neither 0 nor a whole number from 2 to 65536"):
        geomprobe.record(Training(), tmp_path / "run", sketch=size)


def changed(run, edit):
    with h5py.File(run / "record.h5", "r+") as file:
        manifest = json.loads(file.attrs["manifest"])
        edit(file, manifest)
        file.attrs["manifest"] = json.dumps(manifest)


def without_final_bias(file, manifest):
    del file["references/final/0.bias"]


DAMAGE = {
    "no rows": lambda file, manifest: file.__delitem__("sketch"),
    "rows of another length": lambda file, manifest: (
        file.__delitem__("sketch/rows"),
        file.create_dataset("sketch/rows", data=np.zeros((3, 128))),
    ),
    "another width": lambda file, manifest: manifest["sketch"].update(size=60),
    "a size without bound": lambda file, manifest: manifest["sketch"].update(size=1 << 40, every=1 << 30),
    "no size": lambda file, manifest: manifest["sketch"].pop("size"),
    "no names": lambda file, manifest: manifest["model"].pop("parameters"),
    "a name too many": lambda file, manifest: manifest["model"]["parameters"].append("x"),
    "ranks that are not there": lambda file, manifest: manifest["sketch"].update(sharded=True),
    "a reference without a parameter": without_final_bias,
    "another shape": lambda file, manifest: manifest["sketch"]["shapes"].reverse(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path, damage, capsys):
    geomprobe.record(Training(), tmp_path / "run", seed=0, sketch=64).close()
    changed(tmp_path / "run", DAMAGE[damage])
    assert main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "out.png"), "--sketch"]) in (1, 2)
    assert capsys.readouterr().err.count("\n") <= 3
    assert not (tmp_path / "out.png").exists()
