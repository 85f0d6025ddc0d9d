"""What a run or a training loop may hold that cannot be recorded or replayed, and what the user is told."""

import fcntl
import math
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import geomprobe
from geomprobe.errors import EnvironmentMismatch, RunError, UnsupportedTraining, UsageError
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record
from geomprobe.trace.schema import VERSIONS

STEPS = 5


class Loop:
    """A loop of five SGD steps on a linear model, with or without a probe."""

    def __init__(self, attach=False, optimizer=torch.optim.SGD, features=3):
        self.model = nn.Linear(features, 1)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.probe = geomprobe.attach(self.model, self.optimizer) if attach else None

    def loss(self):
        return self.model(torch.randn(4, self.model.in_features)).square().mean()

    def step(self, closure=None):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step(closure)

    def run(self, steps=STEPS):
        for _ in range(steps):
            self.step()


def plain():
    Loop().run()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """A run of `plain`, recorded and replayed; copy it before changing it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    geomprobe.two_pass(plain, run, seed=0)
    return run


@pytest.fixture
def recorded(replayed, run):
    """A run of `plain` that has been recorded and not replayed."""
    run.mkdir()
    shutil.copy(replayed / "record.h5", run)
    return run


def refused(kind, call, *words):
    """The error of a call, whose text must hold every one of ``words``."""
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value)
    return caught.value


def record(train, run, **options):
    return lambda: geomprobe.record(train, run, seed=0, **options)


# What steps, and how


@pytest.mark.parametrize("attach", [False, True])
def test_a_script_in_which_no_optimizer_steps_leaves_nothing_in_the_way(run, attach):
    def train():
        loop = Loop(attach)
        loop.loss().backward()

    refused(UnsupportedTraining, record(train, run), "No optimizer stepped", "torch.optim.Optimizer.step")
    assert record(plain, run)().num_steps == STEPS  # without --force


def test_two_optimizers_are_refused_with_both_named(run):
    def train():
        first, second = Loop(), Loop(optimizer=torch.optim.Adam, features=7)
        for _ in range(STEPS):
            first.step()
            second.step()

    refused(
        UnsupportedTraining,
        record(train, run),
        "SGD with 2 tensors (4 values) and Adam with 2 tensors (8 values) (at step 1)",
        "geomprobe record --optimizer NAME",
        "geomprobe.attach(model, optimizer)",
    )


def test_two_optimizers_of_one_model_are_refused_though_one_is_attached(run):
    def train():
        loop = Loop(attach=True)
        other = torch.optim.Adam([loop.model.bias])
        for _ in range(STEPS):
            loop.step()
            other.step()

    words = "SGD with 2 tensors (4 values) and Adam with 1 tensor (1 value) (at step 1)"
    refused(UnsupportedTraining, record(train, run), words)
    assert open_record(run).status == "failed"
    assert open_record(run).num_steps == 1


def test_an_optimizer_of_another_model_may_step_beside_the_attached_one(run):
    def train():
        loop, critic = Loop(attach=True), Loop(optimizer=torch.optim.Adam)
        for _ in range(STEPS):
            critic.step()
            loop.step()

    assert geomprobe.two_pass(train, run, seed=0).status == "complete"


@pytest.mark.parametrize("attach", [False, True])
def test_lbfgs_is_refused(run, attach):
    def train():
        loop = Loop(attach, torch.optim.LBFGS)
        loop.step(lambda: loop.loss())

    words = "LBFGS evaluates its closure several times a step", "one gradient a step"
    refused(UnsupportedTraining, record(train, run), *words)


class Twice(torch.optim.SGD):
    """An optimizer that evaluates its closure twice a step."""

    def step(self, closure):
        closure()
        closure()
        return super().step()


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("attach", [False, True])
def test_an_optimizer_that_evaluates_its_closure_twice_is_refused(run, attach, swallow):
    def train():
        loop = Loop(attach, Twice)
        for _ in range(STEPS):
            try:
                loop.step(lambda: loop.loss().backward())
            except Exception:
                if not swallow:
                    raise

    words = ("Twice.step raised in step 0",) if swallow else ("Twice evaluated its closure twice in step 0",)
    refused(UnsupportedTraining, record(train, run), *words)


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_its_parents_is_one_step(run, attach, closure):
    class Shrinking(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(0.99)
            return loss

    def train():
        Loop()  # torch hooks SGD.step when there is an SGD
        loop = Loop(attach, Shrinking)
        for _ in range(STEPS):
            if closure:
                loop.optimizer.step(lambda: (loop.optimizer.zero_grad(), loop.loss().backward()))
            else:
                loop.step()

    trace = geomprobe.two_pass(train, run, seed=0)
    assert (trace.status, trace.num_steps) == ("complete", STEPS)


def test_an_update_that_raises_ends_the_recording_though_the_script_goes_on(run):
    class Moody(torch.optim.SGD):
        updates = 0

        def step(self, closure=None):
            Moody.updates += 1
            if Moody.updates == 3:
                raise FloatingPointError("a bad mood")
            return super().step(closure)

    def train():
        loop = Loop(optimizer=Moody)
        for _ in range(STEPS):
            try:
                loop.step()
            except FloatingPointError:
                continue

    words = "Moody.step raised in step 2, and the script went on", "Mend what raised"
    refused(UnsupportedTraining, record(train, run), *words)
    assert (open_record(run).status, open_record(run).num_steps) == ("failed", 2)


# What is trained


def add_a_parameter(loop):
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def resize_a_parameter(loop):
    loop.model.weight.data = torch.ones(1, 6)
    loop.model.in_features = 6
    loop.model.weight.grad = None


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_a_parameter, "parameter groups held [2] tensors and now hold [2, 1]"),
        (resize_a_parameter, "weight had shape (1, 3) and now has (1, 6)"),
    ],
)
def test_parameters_that_change_during_training_are_refused(run, change, words, attach, swallow):
    def train():
        loop = Loop(attach)
        loop.run(3)
        change(loop)
        try:
            loop.run()
        except UnsupportedTraining:
            if not swallow:
                raise

    refused(
        UnsupportedTraining,
        record(train, run),
        "The parameters changed before step 3",
        words,
        "Create all of them before",
        "separate runs",
    )
    with open_record(run) as left:
        assert (left.status, left.num_steps, left.references) == ("failed", 3, [])


@pytest.mark.parametrize("attach", [False, True])
def test_a_parameter_frozen_during_training_counts_with_a_gradient_of_zero(run, attach):
    def train():
        loop = Loop(attach)
        loop.run(3)
        loop.model.bias.requires_grad_(False)
        loop.model.bias.grad = None
        loop.run(3)

    geomprobe.record(train, run, seed=0)
    trace = geomprobe.replay(train, run, per_parameter=True)
    assert trace.status == "complete"
    assert (trace["parameters/bias/g.g"] > 0).tolist() == [True] * 3 + [False] * 3
    assert (trace["parameters/bias/d.d"][3:] == 0).all()
    assert (trace["distance"][:3] ** 2 > trace["parameters/weight/d.d"][:3]).all()


@pytest.mark.parametrize("attach", [False, True])
def test_complex_parameters_are_refused(run, attach):
    def train():
        phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        optimizer = torch.optim.SGD([phase], lr=0.1)
        if attach:
            geomprobe.attach(None, optimizer)
        phase.abs().sum().backward()
        optimizer.step()

    words = "group0.parameter0 is complex (torch.complex64)", "torch.view_as_real"
    refused(UnsupportedTraining, record(train, run), *words)


def test_an_optimizer_without_parameters_is_refused(run):
    def train():
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        optimizer.param_groups[0]["params"] = []
        geomprobe.attach(None, optimizer)

    refused(UnsupportedTraining, record(train, run), "SGD holds no parameters: there is nothing to measure")


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    "batch",
    [
        lambda x: {"x": x, "name": "seven", "ids": [1, 2]},
        lambda x: (x, ["a", "b"], None),
        lambda x: [x, {"nested": (np.arange(3), 1.5)}],
    ],
    ids=["dict", "tuple", "list"],
)
def test_batches_may_be_nested_and_hold_strings(run, batch, shown):
    class Reader(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["x"] if isinstance(batch, dict) else batch[0])

    def train():
        model = Reader(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = geomprobe.attach(model, optimizer)
        batches = [batch(torch.randn(4, 3)) for _ in range(STEPS)]
        for each in probe.batches(batches) if shown else batches:
            optimizer.zero_grad()
            model(each).square().mean().backward()
            optimizer.step()

    trace = geomprobe.two_pass(train, run, seed=0)
    assert (trace.status, trace.num_steps) == ("complete", STEPS)


# Numbers that are not finite


def test_a_loss_that_is_not_finite_is_recorded_as_it_is(run):
    def train():
        loop = Loop()
        for step in range(STEPS):
            loop.optimizer.zero_grad()
            (loop.loss() + (math.inf if step == 1 else math.nan if step == 3 else 0.0)).backward()
            loop.optimizer.step()

    with geomprobe.record(train, run, seed=0) as left:
        assert left.steps["loss"][1] == math.inf
        assert np.isnan(left.steps["loss"]).tolist() == [False, False, False, True, False]
    trace = geomprobe.replay(train, run)
    assert trace.status == "complete"
    assert trace["loss"][1] == math.inf
    assert np.isnan(trace["loss"][3])
    assert np.isfinite(trace["distance"]).all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_recorded_and_not_replayed(run, value):
    def train():
        loop = Loop()
        loop.run(3)
        with torch.no_grad():
            loop.model.weight[0, 1] = value
        loop.run(2)

    with geomprobe.record(train, run, seed=0) as left:
        assert (left.status, left.num_steps) == ("complete", STEPS)
    refused(
        RunError,
        lambda: geomprobe.replay(train, run),
        "Reference 'final'",
        "is not finite",
        "values of",
        "Nothing was replayed",
        "geomprobe inspect",
    )
    assert not (run / "trace.h5").exists()


# A script that fails


@pytest.mark.parametrize("attach", [False, True])
def test_a_script_that_fails_half_way_leaves_what_it_did_readable(run, replayed, attach):
    def train():
        loop = Loop(attach)
        loop.run(3)
        raise ZeroDivisionError("half way")

    refused(ZeroDivisionError, record(train, run), "half way")
    with open_record(run) as left, open_record(replayed) as whole:
        assert (left.status, left.num_steps, left.references) == ("failed", 3, [])
        np.testing.assert_array_equal(left.steps["loss"], whole.steps["loss"][:3])
    refused(
        RunError,
        lambda: geomprobe.replay(train, run),
        "cannot be replayed",
        "its script failed after 3 steps, so it has no final weights",
        "geomprobe inspect",
        "geomprobe record --force",
    )


def test_a_script_that_fails_before_it_steps_leaves_nothing_in_the_way(run):
    def train():
        Loop(attach=True).probe.reference("early")
        raise ZeroDivisionError

    refused(ZeroDivisionError, record(train, run))
    assert record(plain, run, force=True)().num_steps == STEPS


def test_what_stopped_a_pass_comes_before_what_the_script_makes_of_it(run):
    def train():
        loop = Loop()
        loop.run(3)
        add_a_parameter(loop)
        try:
            loop.run()
        except Exception as error:
            raise SystemError("training failed") from error

    refused(UnsupportedTraining, record(train, run), "The parameters changed before step 3")


def test_an_interrupt_within_the_probe_ends_the_recording_though_the_script_goes_on(run, monkeypatch):
    def train():
        loop = Loop()
        loop.run(3)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(geomprobe.reproducibility.fingerprint.StepFingerprint, "take", interrupted)
                loop.step()
        except KeyboardInterrupt:
            loop.run(2)

    def interrupted(*_):
        raise KeyboardInterrupt

    refused(KeyboardInterrupt, record(train, run))
    assert open_record(run).status == "incomplete"


@pytest.mark.parametrize("attach", [False, True])
def test_weights_altered_after_the_last_step_lose_the_final_iterate(run, attach):
    def train():
        loop = Loop(attach)
        loop.run()
        with torch.no_grad():
            loop.model.weight.mul_(2)

    refused(
        UnsupportedTraining,
        record(train, run),
        f"changed the weights after the last step ({STEPS - 1})",
        "probe.epochs(n)",
    )
    assert open_record(run).status == "failed"


# The probe


def test_a_second_probe_in_a_run_is_refused(run):
    def train():
        loop = Loop(attach=True)
        loop.run()
        Loop(attach=True, optimizer=torch.optim.Adam)

    words = "attach was called twice in one run", "first on SGD with 2 tensors", "then on Adam with 2 tensors"
    refused(UsageError, record(train, run), *words)


def test_a_second_probe_on_the_same_optimizer_is_refused(run):
    def train():
        loop = Loop(attach=True)
        geomprobe.attach(loop.model, loop.optimizer)

    refused(UsageError, record(train, run), "attach was called twice in one run")


@pytest.mark.parametrize("recording", [False, True])
def test_a_stateful_object_without_a_state_dict_is_refused_even_where_nothing_is_recorded(run, recording):
    def train():
        model = nn.Linear(1, 1)
        geomprobe.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), scheduler=[1])

    call = record(train, run) if recording else train
    refused(UsageError, call, "scheduler=list", "no state_dict and load_state_dict", "or leave it out")


@pytest.mark.parametrize("name", ["final", "", "a/b", ".hidden", "with space", "../up"])
def test_a_reference_cannot_have_every_name(run, name):
    def train():
        loop = Loop(attach=True)
        loop.run(2)
        loop.probe.reference(name)

    words = f"probe.reference({name!r})", "letters, digits", "'final' is the final iterate"
    refused(UsageError, record(train, run), *words)


def test_a_pass_cannot_run_inside_another_and_touches_nothing(run, recorded):
    before = (recorded / "record.h5").read_bytes()

    def train():
        geomprobe.record(plain, recorded, force=True)

    refused(UsageError, record(train, run.with_name("outer")), "running in this process already")
    assert (recorded / "record.h5").read_bytes() == before
    assert not (recorded / "stream").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused_before_anything_is_removed(recorded, seed):
    call = lambda: geomprobe.record(plain, recorded, seed=seed, force=True)  # noqa: E731
    refused(UsageError, call, f"seed {seed} is outside 0 .. 4294967295")
    assert open_record(recorded).status == "complete"


def test_a_replay_measures_at_least_some_steps(recorded):
    refused(UsageError, lambda: geomprobe.replay(plain, recorded, every=0), "every=0", "at least 1")


def test_reference_steps_beyond_the_end_are_told(run):
    with geomprobe.record(plain, run, seed=0, reference_steps=[2, STEPS, 100]) as left:
        assert left.references == ["final", "step-2"]
        assert left.manifest["missed_reference_steps"] == [STEPS, 100]


def test_an_operation_without_a_deterministic_form_says_how_to_go_on(run):
    def train():
        loop = Loop()
        target = torch.zeros(3)
        target.put_(torch.tensor([0, 0]), torch.ones(2))  # which of the two wins is not defined
        loop.run()

    words = "put_ does not have a deterministic implementation", "--no-strict", "strict=False"
    refused(UnsupportedTraining, record(train, run), *words)
    assert geomprobe.record(train, run, seed=0, strict=False).manifest["strict"] is False
    assert geomprobe.replay(train, run).status == "complete"


# The run folder


def test_a_folder_that_holds_something_is_not_recorded_into(recorded):
    words = "exists and is not empty", "nothing was recorded", "--force"
    refused(UsageError, record(plain, recorded), recorded, *words)
    assert record(plain, recorded, force=True)().num_steps == STEPS


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints/epoch-90.pt", "stream/water.h5"])
def test_a_folder_that_is_no_run_is_never_emptied(run, name):
    foreign = run / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    words = "is no run of geomprobe", "--force will not empty it"
    refused(UsageError, record(plain, run, force=True), run, *words)
    assert foreign.read_text() == "years of work"


def test_a_foreign_file_in_a_run_survives_force(recorded):
    (recorded / "notes.txt").write_text("the good one")
    record(plain, recorded, force=True)()
    assert (recorded / "notes.txt").read_text() == "the good one"


def test_a_file_is_no_folder_to_record_into(run):
    run.write_text("a file")
    refused(UsageError, record(plain, run), f"{run} is a file", "name a folder")


def test_a_folder_that_cannot_be_made_is_told(run):
    run.write_text("a file")
    refused(RunError, record(plain, run / "below"), run / "below", "cannot be written", "Nothing was started")


def test_a_second_writer_is_told_who_is_first(recorded):
    (recorded / "stream").mkdir()
    with open(recorded / "stream" / "lock", "w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711 on elsewhere\n")
        lock.flush()
        for call in (record(plain, recorded, force=True), lambda: geomprobe.replay(plain, recorded)):
            refused(RunError, call, recorded, "another process (process 4711 on elsewhere)", "Wait for it")
    assert geomprobe.replay(plain, recorded).status == "complete"


def test_a_pass_names_itself_in_its_lock_and_takes_it_away(run):
    def train():
        plain()
        assert (run / "stream" / "lock").read_text().startswith(f"process {os.getpid()} on ")

    record(train, run)()
    assert not (run / "stream").exists()


# What cannot be replayed


def streaming(run):
    """The run as it is while it is being recorded."""
    copy = run.with_name("streaming")

    def train():
        loop = Loop()
        loop.run(70)
        shutil.copytree(run, copy)

    geomprobe.record(train, run, seed=0)
    return copy


def test_a_recording_that_is_unfinished_is_not_replayed(run):
    words = "cannot be replayed", "unfinished (64 steps so far)", "geomprobe record --force"
    refused(RunError, lambda: geomprobe.replay(plain, streaming(run)), *words)


def test_a_folder_that_is_no_run_is_not_replayed(run):
    refused(RunError, lambda: geomprobe.replay(plain, run), run, "does not exist")
    run.mkdir()
    words = "is no run of geomprobe", f"geomprobe record -o {run} train.py"
    refused(RunError, lambda: geomprobe.replay(plain, run), *words)


def test_a_record_of_another_schema_version_is_not_replayed(recorded):
    with h5py.File(recorded / "record.h5", "r+") as file:
        file.attrs["schema_version"] = 99
    words = "schema version 99", "Open it with the geomprobe that wrote it"
    refused(RunError, lambda: geomprobe.replay(plain, recorded), *words)


def test_a_recording_of_the_version_before_that_was_cut_off_is_refused_and_kept(run, monkeypatch):
    def cut_off():
        loop = Loop()
        loop.run(3)
        raise KeyboardInterrupt

    with monkeypatch.context() as earlier:
        earlier.setitem(VERSIONS, "geomprobe-record", 1)
        refused(KeyboardInterrupt, record(cut_off, run))
    (part,) = (run / "stream").glob("record-*.h5")
    words = "is a record of schema version 1, which has no digests of gradients", "geomprobe record --force"
    refused(RunError, lambda: geomprobe.record(plain, run, resume=True), part, *words)
    assert part.exists()


def test_an_earlier_trace_is_kept_without_force_and_where_the_replay_is_refused(recorded):
    geomprobe.replay(plain, recorded)
    before = (recorded / "trace.h5").read_bytes()
    words = "trace.h5 exists", "nothing was replayed", "geomprobe inspect", "--force"
    refused(UsageError, lambda: geomprobe.replay(plain, recorded), *words)

    def another():
        Loop().run()

    refused(EnvironmentMismatch, lambda: geomprobe.replay(another, recorded, force=True), "script.path")
    assert (recorded / "trace.h5").read_bytes() == before
    assert geomprobe.replay(plain, recorded, force=True).status == "complete"


def test_a_trace_of_another_model_is_refused(recorded, monkeypatch):
    monkeypatch.setattr(Loop.__init__, "__defaults__", (False, torch.optim.SGD, 4))
    words = "model.num_parameters = 4, but here it is 5", "nothing was replayed"
    refused(EnvironmentMismatch, lambda: geomprobe.replay(plain, recorded), *words)
    refused(RunError, lambda: open_trace(recorded), "was recorded, but not replayed yet")
