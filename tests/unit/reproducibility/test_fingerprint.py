"""Each gradient has a digest, as the optimizer gets it; the optimizer's state has one at some steps."""

import pytest
import torch
from torch import nn

from geomprobe.probe.events import Observer
from geomprobe.probe.listeners import LossTracker
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.fingerprint import FinalState, StepFingerprint, StepInputs
from geomprobe.trace.blame import StateSteps


def training(optimizer=torch.optim.SGD, **settings):
    """A fingerprint of a small model and its probe."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4, 2))
    probe = Probe(model, [optimizer(model.parameters(), **{"lr": 0.1, **settings})], {}, Observer())
    fingerprint = StepFingerprint(probe, StepInputs(), LossTracker())
    return fingerprint, probe


def gradients(probe):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=generator) for p in probe.parameters.values()]


def take(fingerprint, found, grad_scale=None):
    return fingerprint.take(fingerprint.reader.read(found, sums=False), grad_scale)


def of_gradients(fingerprint, found):
    return take(fingerprint, found)["gradients"].tolist()


def test_an_ulp_in_a_gradient_changes_its_own_digest_and_no_other():
    fingerprint, probe = training()
    found = gradients(probe)
    before = take(fingerprint, found)
    found[2].view(-1)[7] = torch.nextafter(found[2].view(-1)[7], torch.tensor(9.0))
    after = take(fingerprint, found)
    unlike = [a != b for a, b in zip(before["gradients"].tolist(), after["gradients"].tolist(), strict=True)]
    assert unlike == [False, False, True, False]
    assert before["weights"].tolist() == after["weights"].tolist()


def test_no_gradient_has_the_digest_0_and_one_of_zeros_has_another():
    fingerprint, probe = training()
    assert of_gradients(fingerprint, [None] * 4) == [0] * 4
    assert all(of_gradients(fingerprint, [torch.zeros_like(p) for p in probe.parameters.values()]))


def test_the_order_of_a_gradient_in_memory_is_not_in_its_digest():
    fingerprint, probe = training()
    found = gradients(probe)
    others = [found[0].to(memory_format=torch.channels_last), found[1], found[2].t().contiguous().t(), found[3]]
    assert others[0].stride() != found[0].stride()
    assert others[2].stride() != found[2].stride()
    assert of_gradients(fingerprint, others) == of_gradients(fingerprint, found)
    probe.parameters["0.weight"].data = probe.parameters["0.weight"].data.to(memory_format=torch.channels_last)
    assert of_gradients(fingerprint, others) == of_gradients(fingerprint, found)


def test_a_gradient_that_is_expanded_has_the_digest_of_its_values():
    fingerprint, probe = training()
    ones = [torch.ones(()).expand(p.shape) for p in probe.parameters.values()]
    assert of_gradients(fingerprint, ones) == of_gradients(fingerprint, [each.clone() for each in ones])


def test_an_element_and_an_index_of_a_sparse_gradient_are_both_seen():
    embedding = nn.Embedding(1000, 4, sparse=True)
    probe = Probe(embedding, [torch.optim.SGD(embedding.parameters(), lr=0.1)], {}, Observer())
    fingerprint = StepFingerprint(probe, StepInputs(), LossTracker())

    def gradient(rows, changed=0.0):
        values = torch.arange(4.0 * len(rows)).view(-1, 4)
        values[-1, -1] += changed
        return [torch.sparse_coo_tensor(torch.tensor([rows]), values, (1000, 4), check_invariants=True)]

    found = [of_gradients(fingerprint, gradient(*each)) for each in (([3, 5, 3],), ([3, 5, 4],), ([3, 5, 3], 1.0))]
    assert of_gradients(fingerprint, gradient([3, 5, 3])) == found[0]
    assert len({*map(tuple, found)}) == 3


def test_the_state_is_read_at_the_steps_of_the_rule_only():
    fingerprint, probe = training(torch.optim.Adam)
    fingerprint.state_steps = StateSteps(first=2, every=5)
    for p in probe.parameters.values():
        p.grad = torch.ones_like(p)
    probe.optimizer.step()
    taken = []
    for step in range(12):
        probe.step = step
        row = take(fingerprint, gradients(probe))
        whole = {*row["optimizer"].tolist(), *row["plain state"]}
        assert whole == {0} or 0 not in whole
        if whole != {0}:
            taken.append(step)
    assert taken == [0, 1, 5, 10]
    assert 0 not in fingerprint.state()["optimizer"]  # of a checkpoint, at any step


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda group: group.update(lr=0.2), "lr"),
        (lambda group: group.update(momentum=0.8), "momentum"),
        (lambda group: group.update(initial_lr=0.1), "other hyperparameters"),
    ],
)
def test_each_hyperparameter_has_a_digest_at_each_step(change, column):
    fingerprint, probe = training(momentum=0.9)
    probe.step = 7
    names = fingerprint.layout["hyperparameters"]
    before = take(fingerprint, [None] * 4)["hyperparameters"]
    change(probe.optimizer.param_groups[0])
    after = take(fingerprint, [None] * 4)["hyperparameters"]
    assert [name for name, a, b in zip(names, before, after, strict=False) if a != b] == [column]


def test_a_learning_rate_that_is_a_tensor_has_a_digest_of_its_own():
    fingerprint, probe = training(torch.optim.Adam, lr=torch.tensor(0.1))
    before = take(fingerprint, [None] * 4)["tensor hyperparameters"].tolist()
    probe.optimizer.param_groups[0]["lr"].mul_(2)
    after = take(fingerprint, [None] * 4)["tensor hyperparameters"].tolist()
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)
    scaled = take(fingerprint, [None] * 4, torch.tensor(2.0))["tensor hyperparameters"].tolist()
    assert (scaled[0] == after[0], scaled[1] != after[1]) == (True, True)


def test_the_final_state_is_that_of_the_first_end():
    fingerprint, probe = training(torch.optim.Adam)
    for p in probe.parameters.values():
        p.grad = torch.ones_like(p)
    probe.optimizer.step()
    state = FinalState(fingerprint)
    state.detached()
    first = state.digest
    probe.optimizer.step()
    state.complete()
    assert state.digest == first != fingerprint.optimizer_state()
