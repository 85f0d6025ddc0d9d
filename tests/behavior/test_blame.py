"""`replay` and `diff` blame the same cause for the same fault."""

import pytest
import torch
from support.faulty_training import FAULTS, at_step, trainer

import geomprobe
from geomprobe.errors import ReplayDiverged
from geomprobe.report.diff import diff

STEP = 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """By training, a recording without a fault."""
    runs, folder = {}, tmp_path_factory.mktemp("recorded")

    def run(name, train):
        if name not in runs:
            runs[name] = folder / name
            geomprobe.record(train, runs[name], seed=1)
        return runs[name]

    return run


def blamed_by_both(run, train, folder):
    """What replay and diff say of a faulty training: step, component and tensor."""
    geomprobe.record(train, folder / "faulty", seed=1)
    with pytest.raises(ReplayDiverged) as caught:
        geomprobe.replay(train, run, force=True)
    step, found = diff(run, folder / "faulty").first
    said = caught.value
    return (said.step, said.component, said.tensor), (step, found.component, found.tensor), str(said)


def one_epoch(fault=None):
    """The training ends after its first epoch, whatever else happens to it."""

    def both(training, reached):
        training.epochs = 1
        if fault is not None:
            fault(training, reached)

    return both


@pytest.mark.parametrize("name", FAULTS)
def test_both_blame_the_same_cause_for_a_fault(recorded, tmp_path, name):
    fault = FAULTS[name]
    run = recorded("batches", trainer("batches", momentum=0.9, fault=one_epoch()))
    train = trainer("batches", momentum=0.9, fault=one_epoch(at_step(STEP, fault.point, fault.do)))
    replay, difference, _ = blamed_by_both(run, train, tmp_path)
    assert replay == difference == (STEP, *fault.expected("batches"))


def without_loader(draw_before=None):
    """A loop that makes its batches itself, which may draw a number too many before a step."""

    def train():
        model = torch.nn.Linear(3, 1)
        probe = geomprobe.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
        for step in range(10):
            if step == draw_before:
                torch.rand(1)
            probe.optimizer.zero_grad()
            probe.backward(model(torch.randn(8, 3)).square().mean())
            probe.optimizer.step()

    return train


def test_a_number_drawn_too_many_is_blamed_on_the_rng_where_there_is_no_loader(recorded, tmp_path):
    run = recorded("without loader", without_loader())
    replay, difference, message = blamed_by_both(run, without_loader(draw_before=7), tmp_path)
    assert replay == difference == (7, "rng", "step/torch")
    assert "Likely, something drew a different number of random numbers" in message
