"""A replay that is not the same run is caught at the first step that differs, with the cause by name."""

import functools
import random
import shutil

import numpy as np
import pytest
import torch
from support.faulty_training import FAULTS, STEPS, STYLES, at_step, one_step, one_ulp, state, trainer

import geomprobe
from geomprobe.errors import EnvironmentMismatch, ReplayDiverged
from geomprobe.trace.blame import FINAL_STATE, STATE_STEPS

DEEP = 65  # past the first block of rows, and the first step of an epoch
STATE = STATE_STEPS.every  # the first step of a block, at which the optimizer's state is compared

replay = functools.partial(geomprobe.replay, curvature_every=8)  # no fault has to do with it, and it takes longest


def in_style(quick):
    """A test in each style; the quick ones only in this one."""
    return pytest.mark.parametrize("style", [style if style == quick else slow(style) for style in STYLES])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and a fault may change the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded:
    """Recordings without a fault, and their undisturbed replays; each made once."""

    def __init__(self, folder):
        self.folder = folder

    def run(self, style, **options):
        name = "-".join([style, *(getattr(value, "__name__", str(value)) for value in options.values())])
        run = self.folder / name
        if not run.exists():
            train = trainer(style, **options)
            geomprobe.record(train, run, seed=1)
            replay(train, run)
        return run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return Recorded(tmp_path_factory.mktemp("recorded"))


def replayable(recorded_run, folder):
    """A run that has been recorded as another was, and not replayed yet."""
    run = folder / "run"
    run.mkdir()
    shutil.copy(recorded_run / "record.h5", run)
    return run


def diverge(recorded, folder, style, fault, **options):
    """The divergence of a replay with a fault, and the run that it leaves."""
    run = replayable(recorded.run(style, **options), folder)
    with pytest.raises(ReplayDiverged) as caught:
        replay(trainer(style, fault=fault, **options), run)
    return caught.value, run


def assert_caught(found, run, recorded_run, step, component, tensor):
    """The divergence names what it must; the trace holds the rows before it, as they should be."""
    assert (found.step, found.component, found.tensor) == (step, component, tensor)
    assert found.exit_code == 3
    assert f"geomprobe inspect {run}" in str(found)
    assert f"geomprobe replay {run} --force --uncertified" in str(found)
    trace, whole = geomprobe.open_trace(run), geomprobe.open_trace(recorded_run)
    assert (trace.status, trace.num_steps) == ("diverged", step)
    assert trace.certificate["first_difference"] == {"step": step, "component": component, "tensor": tensor}
    assert trace.certificate["steps_equal"] == step
    assert trace.certificate["steps_recorded"] == STEPS
    for column in whole.columns:
        np.testing.assert_array_equal(trace[column], whole[column][:step])


STEP_OF = {"batches": DEEP, "attach": 3, "unmodified": DEEP}


@pytest.mark.parametrize(
    ("name", "style"),
    [
        (name, style) if style == STYLES[number % len(STYLES)] else slow(name, style)
        for number, name in enumerate(FAULTS)
        for style in STYLES
    ],
)
def test_a_fault_is_caught_at_its_step_with_its_cause(recorded, tmp_path, name, style):
    fault, step = FAULTS[name], STEP_OF[style]
    if fault.component == "optimizer" and step == DEEP:
        step = STATE
    found, run = diverge(recorded, tmp_path, style, at_step(step, fault.point, fault.do), momentum=0.9)
    expected = fault.expected(style)
    assert_caught(found, run, recorded.run(style, momentum=0.9), step, *expected)
    assert f"at step {step} of {STEPS}: first the {expected[0]} ({expected[1]})" in str(found)


@in_style("batches")
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "step"])
def test_an_ulp_in_a_state_of_adam_is_caught(recorded, tmp_path, style, moment):
    fault = at_step(STATE, "fetch", state("4.bias", moment))
    found, run = diverge(recorded, tmp_path, style, fault, optimizer=torch.optim.Adam)
    recorded_run = recorded.run(style, optimizer=torch.optim.Adam)
    assert_caught(found, run, recorded_run, STATE, "optimizer", "4.bias")


@in_style("attach")
def test_a_state_that_changed_after_it_was_compared_is_caught_at_the_end_where_no_weight_shows_it(
    recorded, tmp_path, style
):
    fault = at_step(DEEP, "fetch", state("0.weight", "momentum_buffer"))
    found, run = diverge(recorded, tmp_path, style, fault, momentum=0.9)
    assert_caught(found, run, recorded.run(style, momentum=0.9), STEPS, "optimizer", FINAL_STATE)
    assert f"reached the end, but the optimizer's state after step {STEPS - 1} is another one" in str(found)
    assert f"changed the optimizer's state after step {STATE}, when it was last compared" in str(found)


@in_style("unmodified")
def test_a_label_that_changed_is_the_batch_where_it_is_shown_and_the_loss_elsewhere(recorded, tmp_path, style):
    fault = at_step(DEEP, "fetch", lambda t: t.data.y.add_(1).remainder_(3))
    found, run = diverge(recorded, tmp_path, style, fault, momentum=0.9)
    expected = ("batch", "fetched") if style == "batches" else ("loss", "loss")
    assert_caught(found, run, recorded.run(style, momentum=0.9), DEEP, *expected)


@in_style("batches")
def test_another_gradient_is_caught_in_its_own_step(recorded, tmp_path, style):
    fault = at_step(DEEP, "update", lambda t: t.model[0].weight.grad.mul_(2))
    found, run = diverge(recorded, tmp_path, style, fault, momentum=0.9)
    assert_caught(found, run, recorded.run(style, momentum=0.9), DEEP, "gradient", "0.weight")
    assert "an operation of the backward pass has no deterministic form" in str(found)


@in_style("attach")
@pytest.mark.parametrize(
    ("stream", "seed"),
    [("python", random.seed), ("numpy", np.random.seed), ("torch", torch.manual_seed)],
)
def test_a_wrong_seed_is_caught_at_the_first_step(recorded, tmp_path, style, stream, seed):
    found, run = diverge(recorded, tmp_path, style, at_step(0, "start", lambda t: seed(2)), momentum=0.9)
    assert_caught(found, run, recorded.run(style, momentum=0.9), 0, "rng", f"fetch/{stream}")


@in_style("unmodified")
def test_a_replay_of_one_step_less_is_caught_where_it_ends(recorded, tmp_path, style):
    fault = at_step(0, "start", lambda t: setattr(t, "stop", STEPS - 1))
    found, run = diverge(recorded, tmp_path, style, fault, momentum=0.9)
    assert_caught(found, run, recorded.run(style, momentum=0.9), STEPS - 1, "length", "steps")
    assert f"recorded with {STEPS} steps, and the replay took {STEPS - 1}" in str(found)


@in_style("batches")
def test_a_replay_of_one_step_more_is_caught_where_the_recording_ended(recorded, tmp_path, style):
    fault = at_step(STEPS, "end", lambda t: one_step(t, style))
    found, run = diverge(recorded, tmp_path, style, fault, momentum=0.9)
    assert_caught(found, run, recorded.run(style, momentum=0.9), STEPS, "length", "steps")
    assert f"recorded with {STEPS} steps, and the replay took more" in str(found)


@in_style("attach")
def test_a_difference_comes_before_the_error_that_it_causes(recorded, tmp_path, style):
    def stop_early(t, point):
        if (t.step, point) == (66, "forward"):
            one_ulp(t.model[4].weight)
        if (t.step, point) == (68, "forward"):
            raise RuntimeError("the loss is not what it was")

    run = replayable(recorded.run(style, momentum=0.9), tmp_path)
    with pytest.raises(ReplayDiverged) as caught:
        replay(trainer(style, fault=stop_early, momentum=0.9), run)
    assert_caught(caught.value, run, recorded.run(style, momentum=0.9), 66, "weights", "4.weight")


@in_style("unmodified")
def test_a_last_update_that_differs_is_caught_by_the_final_weights(recorded, tmp_path, style):
    def built(t):
        def alter(*_):
            if t.step == STEPS - 1:
                one_ulp(t.model[0].bias)

        t.optimizer.register_step_post_hook(alter)

    found, run = diverge(recorded, tmp_path, style, at_step(0, "built", built), momentum=0.9)
    assert_caught(found, run, recorded.run(style, momentum=0.9), STEPS, "weights", "final weights")
    assert f"the weights after step {STEPS - 1} are not w_T bit for bit" in str(found)
    assert geomprobe.open_trace(run).certificate["final_weights_equal"] is False


@in_style("batches")
def test_weights_altered_after_the_last_step_of_a_replay_change_nothing_of_the_run(recorded, tmp_path, style):
    run = replayable(recorded.run(style, momentum=0.9), tmp_path)
    fault = at_step(STEPS, "end", lambda t: one_ulp(t.model[0].weight))
    assert replay(trainer(style, fault=fault, momentum=0.9), run).status == "complete"


@in_style("unmodified")
def test_a_script_that_swallows_exceptions_cannot_hide_a_divergence(recorded, tmp_path, style):
    step = STEP_OF[style]
    fault = at_step(step, "forward", lambda t: one_ulp(t.model[4].weight))
    found, run = diverge(recorded, tmp_path, style, fault, swallow=True, momentum=0.9)
    recorded_run = recorded.run(style, swallow=True, momentum=0.9)
    assert_caught(found, run, recorded_run, step, "weights", "4.weight")


@in_style("attach")
def test_another_set_of_tensors_is_refused_before_the_first_step(recorded, tmp_path, style):
    run = replayable(recorded.run(style, momentum=0.9), tmp_path)
    fault = at_step(0, "built", lambda t: t.model.register_buffer("scale", torch.ones(1)))
    with pytest.raises(EnvironmentMismatch, match=r"3 entries under buffers, and here there are 4 .*scale"):
        replay(trainer(style, fault=fault, momentum=0.9), run)


def threads(t):
    torch.set_num_threads(2)


def nondeterministic(t):
    torch.use_deterministic_algorithms(False)


def other_rate(t):
    t.settings = {**t.settings, "lr": 0.06}


def other_batches(t):
    t.batch_size = 10


MISMATCHES = {
    "flags.num_threads": (threads, "1", "2"),
    "flags.deterministic_algorithms": (nondeterministic, "True", "False"),
    "optimizer.groups[0].lr": (other_rate, "0.05", "0.06"),
    "loader.batch_size": (other_batches, "8", "10"),
}


@pytest.mark.parametrize(("style", "swallow"), [slow("batches", False), slow("attach", False), ("unmodified", True)])
@pytest.mark.parametrize("entry", MISMATCHES)
def test_another_environment_is_refused_before_the_first_step(recorded, tmp_path, style, swallow, entry):
    change, before, now = MISMATCHES[entry]
    options = {"swallow": swallow, "momentum": 0.9}
    run = replayable(recorded.run(style, **options), tmp_path)
    try:
        with pytest.raises(EnvironmentMismatch) as caught:
            replay(trainer(style, fault=at_step(0, "start", change), **options), run)
    finally:
        torch.set_num_threads(1)
    assert f"recorded with {entry} = {before}, but here it is {now}" in str(caught.value)
    assert "nothing was replayed" in str(caught.value)
    assert not (run / "trace.h5").exists()
