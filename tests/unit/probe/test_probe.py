"""The probe reports a loop's events in order, stays out of the way where nothing runs, and refuses what it must."""

from __future__ import annotations

import contextlib
import os
import pty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cases import BATCH, CASES, Case, PlainProbe, Watch, classified, mlp, train
from support.command_server import Command, python, server
from support.oracle import seeded
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import geomprobe
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.probe import progress_bar as progress
from geomprobe.probe.events import observe, observing
from geomprobe.probe.inert import InertProbe
from geomprobe.probe.listeners import UpdateChecks
from geomprobe.probe.loops import Position
from geomprobe.probe.parameters import measured_parameters
from geomprobe.probe.probe import Probe, attach


class Log:
    """An observer that writes down what it is told, of a run that begins at its start."""

    goal = None

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.gradients: list[list[Tensor | None]] = []
        self.positions: list[Position] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self.events.append(name)

    def iterating(self, loader: Any, position: Any) -> int:
        self.events.append("iterating")
        return 0

    def between_steps(self, position: Position) -> None:
        self.events.append("between_steps")
        self.positions.append(position)

    def backward(self, losses: Any, run: Callable[[], None], plain: bool, **_: Any) -> None:
        self.events.append("backward")
        run()

    def before_update(self, gradients: Any, grad_scale: Any) -> None:
        assert not torch.is_grad_enabled()
        self.events.append("before_update")
        self.gradients.append([None if g is None else g.clone() for g in gradients])


@pytest.fixture
def log() -> Iterator[Log]:
    """A pass that only writes down; it is over when the test is."""
    made = Log()
    before = observe(made)  # type: ignore[arg-type]
    yield made
    observe(before)


class Training:
    """A model, an optimizer, a loader of three batches and a probe."""

    def __init__(self, **stateful: Any) -> None:
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loader = DataLoader(classified(), 8)
        self.probe = attach(self.model, self.optimizer, **stateful)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        self.probe.backward(self.loss(batch))
        self.optimizer.step()


FETCHED = ["fetching", "fetch_ended", "fetched"]
STEP = ["entered", "backward", "before_update", "updated", "after_update"]


# What is reported


def test_a_loop_reports_its_events_in_order(log: Log) -> None:
    training = Training()
    for _ in training.probe.epochs(1):
        for batch in training.probe.batches(training.loader):
            training.step(batch)
    training.probe.remove()
    start = ["attached", "begin", "between_steps", "fetching", "iterating"]  # making the iterator may draw
    end = ["between_steps", "fetching", "fetch_ended", "weights_will_change", "detached"]
    assert log.events == [*start, *3 * ["between_steps", *FETCHED, *STEP], *end]


def test_every_place_between_two_steps_has_a_position_of_its_own(log: Log) -> None:
    training = Training()
    for _ in range(2):
        for _ in training.probe.epochs(2):
            with torch.no_grad():
                list(training.probe.batches(training.loader))  # takes no steps, but counts as a pass
            for batch in training.probe.batches(training.loader):
                training.step(batch)
    wanted = [
        (loop, epoch, *place)
        for loop in (0, 1)
        for epoch in (0, 1)
        for place in ((-1, 0), (1, 0), (1, 1), (1, 2), (1, 3))
    ]
    assert log.positions == wanted


def test_the_gradients_are_those_before_the_update_and_the_step_counts_after_it(log: Log) -> None:
    training = Training()
    steps = []
    for batch in training.loader:
        steps.append(training.probe.step)
        training.step(batch)
        assert all(torch.equal(a, p.grad) for a, p in zip(log.gradients[-1], training.model.parameters(), strict=True))
    assert (steps, training.probe.step) == ([0, 1, 2], 3)


def test_a_missing_gradient_is_reported_as_missing(log: Log) -> None:
    training = Training()
    training.model[0].weight.requires_grad_(False)
    training.step(next(iter(training.loader)))
    assert [g is None for g in log.gradients[0]] == [True, False, False, False]


def test_training_begins_once_at_whatever_comes_first(log: Log) -> None:
    for begin in (
        lambda t: next(iter(t.probe.epochs(1))),
        lambda t: next(iter(t.probe.batches(t.loader))),
        lambda t: t.model(torch.randn(1, 6)),
        lambda t: t.optimizer.step(),
    ):
        log.events.clear()
        training = Training()
        assert log.events == ["attached"]
        begin(training)
        assert log.events[1] == "begin"
        training.step(next(iter(training.loader)))
        assert log.events.count("begin") == 1


def test_evaluation_is_not_part_of_a_step(log: Log) -> None:
    training = Training()
    with torch.no_grad():
        training.model(torch.randn(2, 6))
    assert log.events == ["attached"]
    with torch.inference_mode():
        training.model(torch.randn(2, 6))
    assert log.events == ["attached"]


def test_loading_a_state_dict_is_reported(log: Log) -> None:
    training = Training()
    training.model.load_state_dict(training.model.state_dict())
    assert log.events == ["attached", "weights_will_change"]


def test_references_are_passed_on(log: Log) -> None:
    training = Training()
    training.probe.reference("best")
    assert log.events[-1] == "reference"


def test_options_of_backward_reach_torch(log: Log) -> None:
    training = Training()
    loss = training.loss(next(iter(training.loader)))
    training.probe.backward(loss, retain_graph=True)
    training.probe.backward(loss)


# Epochs and batches


def test_epochs_are_named_from_0(log: Log) -> None:
    training = Training()
    assert training.probe.epoch is None
    seen = [(epoch, training.probe.epoch) for epoch in training.probe.epochs(3)]
    assert seen == [(0, 0), (1, 1), (2, 2)]


def epochs_of(training: Training, loops: int, body: Callable[[Any], None]) -> list[int]:
    found = []
    for _ in range(loops):
        for batch in training.probe.batches(training.loader):
            body(batch)
            found.append(training.probe.epoch)
    return found


def test_without_epochs_a_pass_over_the_loader_is_an_epoch(log: Log) -> None:
    training = Training()
    assert epochs_of(training, 3, training.step) == [0] * 3 + [1] * 3 + [2] * 3


def test_a_pass_that_is_cut_short_is_an_epoch_too(log: Log) -> None:
    training = Training()
    found = []
    for _ in range(3):
        for batch in training.probe.batches(training.loader):
            training.step(batch)
            found.append(training.probe.epoch)
            if len(found) % 2 == 0:
                break
    assert found == [0, 0, 1, 1, 2, 2]


def test_an_evaluation_loop_is_no_epoch_also_in_mid_epoch(log: Log) -> None:
    training = Training()

    def step_and_evaluate(batch: Any) -> None:
        training.step(batch)
        with torch.no_grad():
            for held_out in training.probe.batches(training.loader):
                training.loss(held_out)

    assert epochs_of(training, 2, step_and_evaluate) == [0] * 3 + [1] * 3


def test_epochs_that_are_named_are_not_counted_by_loaders(log: Log) -> None:
    training, found = Training(), []
    for _ in training.probe.epochs(2):
        found += epochs_of(training, 2, training.step)  # two passes over the loader an epoch
    assert found == [0] * 6 + [1] * 6


def test_leaving_the_epochs_early_still_says_that_the_weights_may_change(log: Log) -> None:
    training = Training()
    for epoch in training.probe.epochs(5):
        training.step(next(iter(training.loader)))
        if epoch == 1:
            break
    assert log.events[-1] == "weights_will_change"


def test_any_iterable_gives_batches(log: Log) -> None:
    probe = Training().probe
    assert list(probe.batches(i * i for i in range(3))) == [0, 1, 4]
    assert list(probe.batches([])) == []


def test_batches_are_fetched_one_at_a_time(log: Log) -> None:
    drawn = []
    probe = Training().probe

    def source() -> Iterator[int]:
        for i in range(3):
            drawn.append(i)
            yield i

    for batch in probe.batches(source()):
        assert drawn == list(range(batch + 1))


def test_an_error_of_the_loader_comes_through(log: Log) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        list(Training().probe.batches(source()))


# Closures


class TwiceADay(torch.optim.SGD):
    """Evaluates its closure twice, as line searches do."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_measured_after_it_ran_and_its_loss_is_returned(log: Log, by_name: bool) -> None:
    training = Training()
    x = training.loader.dataset[:8]

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(x)
        training.probe.backward(loss)
        log.events.append("closure ends")
        return loss

    result = training.optimizer.step(closure=closure) if by_name else training.optimizer.step(closure)
    inside = ["entered", "backward", "closure ends", "before_update", "updated", "after_update"]
    assert log.events == ["attached", "begin", *inside]
    assert isinstance(result, Tensor)
    assert training.probe.step == 1


def test_a_closure_that_is_evaluated_twice_is_refused(log: Log) -> None:
    model = mlp()
    optimizer = TwiceADay(model.parameters(), lr=0.1)
    attach(model, optimizer)
    with pytest.raises(UnsupportedTraining, match=r"TwiceADay evaluated its closure twice in step 0"):
        optimizer.step(lambda: model(torch.randn(2, 6)).sum())


# Attaching and removing


def test_removing_takes_every_hook_off_once(log: Log) -> None:
    training = Training()
    hooks = (
        training.optimizer._optimizer_step_pre_hooks,
        training.optimizer._optimizer_step_post_hooks,
        training.model._forward_pre_hooks,
        training.model._load_state_dict_pre_hooks,
    )
    assert [len(found) for found in hooks] == [1, 2, 1, 1]
    training.probe.remove()
    training.probe.remove()
    assert [len(found) for found in hooks] == [0, 0, 0, 0]
    assert log.events == ["attached", "detached"]
    training.optimizer.step()
    assert training.probe.step == 0


def test_a_probe_is_a_context_manager_also_when_an_error_leaves_it(log: Log) -> None:
    def fail() -> None:
        with Training().probe as probe:
            assert isinstance(probe, Probe)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert log.events == ["attached", "detached"]


@pytest.mark.parametrize("recording", [False, True])
def test_an_object_without_a_state_is_refused_by_its_name(recording: bool, log: Log) -> None:
    if not recording:
        observe(None)
    with pytest.raises(UsageError, match=r"attach\(\.\.\., sampler=list\): it has no state_dict"):
        Training(sampler=[1, 2])
    assert log.events == []


def test_further_objects_are_kept_by_name_and_none_is_left_out(log: Log) -> None:
    ema = mlp()
    probe = Training(scheduler=None, ema=ema).probe
    assert isinstance(probe, Probe)
    assert probe.stateful == {"ema": ema}


class Accelerated(torch.optim.Optimizer):
    """An optimizer around an optimizer, as accelerate makes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Wrapper:
    """No optimizer itself, as Lightning's is none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_a_wrapped_optimizer_is_unwrapped(log: Log) -> None:
    model = mlp()
    raw = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrapped in (Accelerated(raw), Wrapper(raw), Wrapper(Accelerated(raw))):
        with attach(model, wrapped) as probe:  # type: ignore[arg-type]
            assert isinstance(probe, Probe)
            assert probe.optimizer is raw


def test_parameters_are_the_optimizers_by_the_models_names_each_once() -> None:
    model = mlp()
    model.add_module("again", model[0])
    stranger = nn.Parameter(torch.zeros(2))
    groups = [{"params": [model[2].weight]}, {"params": [stranger, model[0].bias]}]
    found = measured_parameters(model, torch.optim.SGD(groups, lr=0.1))
    assert list(found) == ["2.weight", "group1.parameter0", "0.bias"]
    assert [id(p) for p in found.values()] == [id(model[2].weight), id(stranger), id(model[0].bias)]


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (lambda: torch.optim.LBFGS(mlp().parameters()), "LBFGS evaluates its closure several times a step"),
        (
            lambda: torch.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], lr=0.1),
            r"group0.parameter0 is complex \(torch.complex64\)",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(log: Log, optimizer: Any, says: str) -> None:
    with pytest.raises(UnsupportedTraining, match=says):
        attach(None, optimizer())
    assert log.events == []


@pytest.mark.parametrize("change", ["added", "resized"])
def test_parameters_that_change_are_told(log: Log, change: str) -> None:
    training = Training()
    checks = UpdateChecks(training.probe)
    checks.before_update([], None)
    if change == "added":
        training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    else:
        training.model[0].bias.data = torch.zeros(9)
    says = {
        "added": r"held \[4\] tensors and now hold \[4, 1\]",
        "resized": r"0.bias had shape \(8,\) and now has",
    }
    with pytest.raises(UnsupportedTraining, match=says[change]):
        checks.before_update([], None)


# Where nothing is recorded or replayed


def test_without_a_pass_the_probe_is_inert() -> None:
    assert observing() is None
    training = Training(scaler=None)
    probe = training.probe
    assert isinstance(probe, InertProbe)
    assert not probe.active
    assert probe.epochs(3) == range(3)
    assert probe.batches(training.loader) is training.loader
    assert probe.reference("any name at all / even this") is None
    training.step(next(iter(training.loader)))
    assert not training.optimizer._optimizer_step_pre_hooks
    assert not training.model._forward_pre_hooks
    with probe as same:
        assert same is probe
    probe.remove()


def test_an_inert_probe_passes_the_options_of_backward() -> None:
    training = Training()
    loss = training.loss(next(iter(training.loader)))
    training.probe.backward(loss, closure=lambda: loss, retain_graph=True)
    training.probe.backward(loss)


def test_every_loop_trains_to_the_same_bits_with_an_inert_probe() -> None:
    class Inert(Watch):
        def attach(self, *things: Any, **stateful: Any) -> Any:
            return geomprobe.attach(*things, **stateful)

    def trained(case: Case, watch: Watch) -> dict[str, str]:
        with seeded(3):
            train(case, watch)
        return watch.final

    chosen = ("closure", "dropout", "GradScaler, fused SGD, unscaled and clipped", "several references")
    cases = [case for case in CASES if str(case) in chosen]
    assert len(cases) == len(chosen)
    for case in cases:
        assert trained(case, Inert()) == trained(case, Watch())


def test_the_inert_probe_does_all_that_the_probe_does() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    of_passes = {"resume_from", "weights", "buffers", "optimizer", "moves"}
    assert public(Probe) - of_passes == public(InertProbe)
    assert public(PlainProbe) <= public(InertProbe)


# Progress

BARS = """
import time

from geomprobe.probe.progress_bar import bar

with bar("epoch", 2) as epoch_done:
    for _ in range(2):
        with bar("batch", None) as batch_done:
            for _ in range(3):
                time.sleep(0.15)
                batch_done()
        epoch_done()
print("done")
"""


def test_epochs_and_batches_advance_a_bar_each(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def bar(label: str, total: int | None, done: int) -> Iterator[Callable[[], None]]:
        seen.append((label, total))
        yield lambda: seen.append(label)
        seen.append(f"end of {label}")

    monkeypatch.setattr(progress, "bar", bar)
    probe = Training().probe
    for _ in probe.epochs(1):
        list(probe.batches([1, 2]))
        list(probe.batches(iter([1])))
    batches = [("batch", 2), "batch", "batch", "end of batch", ("batch", None), "batch", "end of batch"]
    assert seen == [("epoch", 1), *batches, "epoch", "end of epoch"]


def on_a_terminal(code: str, **environment: str) -> tuple[str, str]:
    """Standard output, and what a terminal saw on standard error."""
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80", **environment}
    command = Command(server(), ["-c", code], Path.cwd(), environment, err=os.ttyname(theirs))
    result = command.wait()
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 1024):
            seen += part
    except OSError:  # Linux's way of telling that the other side is closed
        pass
    os.close(ours)
    assert result.code == 0, seen.decode()
    return result.out, seen.decode()


def test_bars_are_shown_on_a_terminal_and_nowhere_else() -> None:
    pytest.importorskip("rich")
    out, seen = on_a_terminal(BARS)
    assert out == "done\n"
    for part in ("epoch", "1/2", "batch", "2/?"):
        assert part in seen
    silent = python("-c", BARS)
    assert (silent.out, silent.err) == ("done\n", "")


def test_without_rich_a_terminal_stays_silent() -> None:
    hidden = "import sys; sys.modules['rich'] = sys.modules['rich.progress'] = None\n"
    assert on_a_terminal(hidden + BARS) == ("done\n", "")


def test_a_frameworks_loop_that_names_batches_and_epochs_is_known_as_the_probes_own(tmp_path: Path) -> None:
    def training(ours: bool) -> Callable[[], None]:
        def train() -> None:
            model = mlp()
            optimizer = SGD(model.parameters(), 0.1)
            probe = geomprobe.attach(model, optimizer)
            loader = DataLoader(classified(), BATCH, shuffle=True)
            for epoch in probe.epochs(2) if ours else range(2):
                if not ours:
                    probe.epoch = epoch
                for batch in probe.batches(loader) if ours else loader:
                    if not ours:
                        probe.fetched(batch)
                    optimizer.zero_grad()
                    probe.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
                    optimizer.step()

        return train

    found = []
    for ours in (True, False):
        with geomprobe.record(training(ours), tmp_path / str(ours), seed=1) as record:
            prints = {name: record.fingerprints(name, 0, 99) for name in ("batch", "rng", "loss")}
            found.append(prints | {"epoch": record.steps["epoch"]})
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name], err_msg=name)
