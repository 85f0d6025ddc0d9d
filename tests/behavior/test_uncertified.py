"""A run that cannot be repeated: replayed all the same, marked from the first difference on, and never certified."""

import json
import os

import numpy as np
import pytest
import torch
from support.command_server import run as geomprobe_command
from support.faulty_training import STEPS, STYLES, at_step, one_ulp, trainer

import geomprobe
from geomprobe.errors import ReplayDiverged
from geomprobe.trace.reader import open_trace
from geomprobe.trace.schema import COMPONENTS

FIRST = 40  # in the middle of a block of rows


def noise(t):
    """What nobody can repeat: bytes from the operating system."""
    t.model[4].bias.data += torch.tensor([byte / 256 for byte in os.urandom(3)])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("style", STYLES)
def test_rows_are_the_same_until_the_first_difference_and_never_after_it(tmp_path, style):
    train = trainer(style, fault=at_step(FIRST, "forward", noise))
    geomprobe.record(train, tmp_path, seed=0)
    with pytest.raises(ReplayDiverged):
        geomprobe.replay(train, tmp_path)
    trace = geomprobe.replay(train, tmp_path, uncertified=True, force=True)
    assert trace.status == "uncertified"
    assert trace["same"].tolist() == [1.0] * FIRST + [0.0] * (STEPS - FIRST)
    assert trace.certificate == {
        "steps_recorded": STEPS,
        "steps_compared": STEPS,
        "steps_equal": FIRST,
        "steps_attempted": STEPS,
        "final_weights_equal": False,
        "components": list(COMPONENTS),
        "first_difference": {"step": FIRST, "component": "weights", "tensor": "4.bias"},
    }
    assert np.isfinite(trace["cosine"]).all()


def test_a_row_that_is_equal_again_stays_marked(tmp_path):
    train = trainer("batches")
    geomprobe.record(train, tmp_path, seed=0)
    # A count of batches that is put back: what follows is the recorded run bit for bit.
    there = at_step(3, "forward", lambda t: t.model[1].num_batches_tracked.add_(1))
    back = at_step(4, "fetch", lambda t: t.model[1].num_batches_tracked.sub_(1))

    def both(t, point):
        there(t, point)
        back(t, point)

    trace = geomprobe.replay(trainer("batches", fault=both), tmp_path, uncertified=True)
    assert trace["same"].tolist() == [1.0] * 3 + [0.0] * (STEPS - 3)
    assert trace.certificate["final_weights_equal"] is True
    assert trace.status == "uncertified"


def test_a_replay_without_a_difference_is_certified_though_nobody_asked(tmp_path):
    train = trainer("batches")
    geomprobe.record(train, tmp_path, seed=0)
    trace = geomprobe.replay(train, tmp_path, uncertified=True)
    assert trace.status == "complete"
    assert trace["same"].all()


@pytest.mark.parametrize("more", [-1, 1])
def test_a_replay_of_another_length_goes_on_to_its_own_end(tmp_path, more):
    geomprobe.record(trainer("batches"), tmp_path, seed=0)
    fault = at_step(0, "start", lambda t: setattr(t, "epochs", t.epochs + more))
    trace = geomprobe.replay(trainer("batches", fault=fault), tmp_path, uncertified=True)
    ends = STEPS + 5 * more
    assert (trace.status, trace.num_steps) == ("uncertified", ends)
    assert trace["same"].tolist() == [1.0] * min(ends, STEPS) + [0.0] * max(0, ends - STEPS)
    assert trace.certificate["first_difference"]["component"] == "length"


def test_a_last_update_that_differs_is_not_certified(tmp_path):
    def built(t):
        def alter(*_):
            if t.step == STEPS - 1:
                one_ulp(t.model[0].bias)

        t.optimizer.register_step_post_hook(alter)

    geomprobe.record(trainer("batches"), tmp_path, seed=0)
    train = trainer("batches", fault=at_step(0, "built", built))
    trace = geomprobe.replay(train, tmp_path, uncertified=True)
    assert trace.status == "uncertified"
    assert trace["same"].all()
    assert trace.certificate["final_weights_equal"] is False
    first = {"step": STEPS, "component": "weights", "tensor": "final weights"}
    assert trace.certificate["first_difference"] == first


def test_another_environment_is_no_obstacle(tmp_path):
    geomprobe.record(trainer("batches"), tmp_path, seed=0)
    fault = at_step(0, "start", lambda t: setattr(t, "batch_size", 10))
    trace = geomprobe.replay(trainer("batches", fault=fault), tmp_path, uncertified=True)
    assert trace.status == "uncertified"
    assert not trace["same"].any()


SCRIPT = """
import os, torch
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(20):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 3)).square().mean()
    if step >= 8:
        loss = loss * (1 + os.urandom(1)[0] / 256)
    loss.backward()
    optimizer.step()
"""


def test_every_command_says_uncertified(tmp_path):
    def command(*argv):
        return geomprobe_command(*argv, cwd=tmp_path)

    (tmp_path / "train.py").write_text(SCRIPT)
    assert command("record", "-o", "run", "train.py").code == 0
    stopped = command("replay", "run")
    assert stopped.code == 3
    assert f"`geomprobe replay {tmp_path / 'run'} --force --uncertified` goes on past it" in stopped.err
    went_on = command("replay", "run", "--force", "--uncertified")
    assert went_on.code == 0
    assert "Wrote run/trace.h5: 8 of 20 steps equal: UNCERTIFIED" in went_on.out
    assert "UNCERTIFIED" in command("inspect", "run").out
    summary = json.loads(command("inspect", "run", "--json").out)
    assert summary["trace"]["status"] == "uncertified"
    assert summary["trace"]["certificate"]["first_difference"]["step"] == 8
    assert open_trace(tmp_path / "run")["same"].tolist() == [1.0] * 8 + [0.0] * 12
    assert "uncertified" in command("verify", "run").out
