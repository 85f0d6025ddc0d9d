"""`replay` and `diff` blame the same cause for the same fault."""

import pytest
import torch
from support.faulty_training import FAULTS, at_step, one_ulp, trainer

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


class SignSGD(torch.optim.Optimizer):
    """Steps by the gradient's sign alone."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def hooked(step):
    """A hook within the backward pass, which perturbs a gradient at one step and leaves its sign."""

    def built(training):
        def perturb(gradient):
            if training.step == step:
                return torch.where(gradient > 0, gradient * 1.001, gradient)
            return None

        training.model[0].bias.register_hook(perturb)

    return built


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [(torch.optim.SGD, 0.05), (SignSGD, 0.01), (torch.optim.SGD, 0.0), (torch.optim.Adam, 0.0)],
    ids=["SGD", "sign SGD hides it", "SGD with lr 0 hides it", "Adam with lr 0 hides it"],
)
def test_a_backward_pass_that_cannot_be_repeated_is_found_in_its_own_step(recorded, tmp_path, optimizer, lr):
    run = recorded(f"{optimizer.__name__} {lr}", trainer("batches", optimizer=optimizer, lr=lr, fault=one_epoch()))
    fault = one_epoch(at_step(0, "built", hooked(step=2)))
    train = trainer("batches", optimizer=optimizer, lr=lr, fault=fault)
    replay, difference, message = blamed_by_both(run, train, tmp_path)
    assert replay == difference == (2, "gradient", "0.bias")
    assert "Likely, all that the gradient is made of was equal, so an operation of the backward pass" in message
    assert geomprobe.open_trace(run).num_steps == 2


def two_epochs(fault=None):
    def both(training, reached):
        training.epochs = 2
        if fault is not None:
            fault(training, reached)

    return both


@torch.no_grad()
def double_momentum(training):
    training.optimizer.state[training.model[0].weight]["momentum_buffer"].mul_(2)


def test_a_state_that_nobody_compared_is_said_to_be_one_of_the_causes(recorded, tmp_path):
    run = recorded("two epochs", trainer("batches", momentum=0.9, fault=two_epochs()))
    fault = two_epochs(at_step(6, "fetch", double_momentum))
    replay, difference, message = blamed_by_both(run, trainer("batches", momentum=0.9, fault=fault), tmp_path)
    assert replay == difference == (7, "weights", "0.weight")
    assert "the gradient, the learning rate and the other hyperparameters of step 6 were equal" in message
    assert "something changed the optimizer's state after step 3, when it was last compared" in message


def test_a_weight_that_something_else_wrote_is_told_from_the_update_where_the_state_is_compared(recorded, tmp_path):
    run = recorded("batches", trainer("batches", momentum=0.9, fault=one_epoch()))
    fault = one_epoch(at_step(3, "fetch", lambda t: one_ulp(t.model[4].weight)))
    replay, difference, message = blamed_by_both(run, trainer("batches", momentum=0.9, fault=fault), tmp_path)
    assert replay == difference == (3, "weights", "4.weight")
    assert "something other than the optimizer wrote to the weights" in message
    assert "the optimizer's state is equal" in message


def embedded(changed=None, unused=False):
    """Training with a sparse gradient, and with a parameter that has none at every other step."""

    def train():
        table, head, rest = torch.nn.Embedding(50, 4, sparse=True), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        model = torch.nn.ModuleList([table, head, rest])
        probe = geomprobe.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(8):
            words = torch.randint(50, (6,))
            loss = head(table(words)).square().mean()
            if step % 2 or (unused and step == 4):
                loss = loss + 0 * rest(table(words).detach()).sum()
            probe.optimizer.zero_grad()
            probe.backward(loss)
            if step == changed:
                one_ulp(table.weight.grad._values())
            probe.optimizer.step()

    return train


def test_sparse_gradients_and_none_are_compared(recorded, tmp_path):
    run = recorded("embedded", embedded())
    assert geomprobe.replay(embedded(), run, force=True).status == "complete"
    replay, difference, _ = blamed_by_both(run, embedded(changed=5), tmp_path / "sparse")
    assert replay == difference == (5, "gradient", "0.weight")
    replay, difference, _ = blamed_by_both(run, embedded(unused=True), tmp_path / "none")
    assert replay == difference == (4, "gradient", "2.weight")
