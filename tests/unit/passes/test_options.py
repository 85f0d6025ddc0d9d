"""The options of the passes: written once, so that nothing that is made of them can forget one."""

import inspect
import json
import shlex
from argparse import ArgumentTypeError
from dataclasses import dataclass, fields, replace

import pytest
import torch

import geomprobe
from geomprobe.cli import build_parser, jobs
from geomprobe.errors import RunError, UsageError
from geomprobe.measure.option_fields import Options, option
from geomprobe.measure.options import MeasureOptions
from geomprobe.passes.options import RecordOptions, ReplayOptions, require_same_options
from geomprobe.report.summary.text import again

PASSES = {RecordOptions: ["record", "-o", "run"], ReplayOptions: ["replay", "run"]}
TEXTS = "7", "0.5", "500steps", "best=/tmp/best.pt", "2/3"  # of which each option takes at least one


def own_value(field):
    """A value of a field that is not its default, found by its own parser, so that a new field needs no test."""
    if isinstance(field.default, bool):
        return not field.default
    for text in TEXTS:
        try:
            value = field.metadata["option"].parse(text)
        except ArgumentTypeError:
            continue
        return dict([value]) if field.name == "references" else value
    raise AssertionError(f"TEXTS has none for {field.name}")


def of_each_field(*classes, lasting=False):
    """A case for each field, in which it alone has a value of its own."""
    cases = [(kind, field) for kind in classes or PASSES for field in fields(kind)]
    return pytest.mark.parametrize(
        "options",
        [
            pytest.param(kind(**{field.name: own_value(field)}), id=f"{kind.PURPOSE}-{field.name}")
            for kind, field in cases
            if field.metadata["option"].lasting or not lasting
        ],
    )


@of_each_field()
def test_the_command_line_of_options_asks_for_the_same_options(options):
    kind = type(options)
    assert options != kind()
    assert kind.parse(options.argv()) == options
    whole = [*PASSES[kind], *options.argv(), *["train.py"] * (kind is RecordOptions)]
    assert kind.of_arguments(build_parser().parse_args(whole)) == options


@of_each_field(lasting=True)
def test_the_manifest_keeps_every_option_that_says_what_a_pass_makes(options):
    (name,) = options.asked()
    manifest = json.loads(json.dumps(options.described()))
    if name not in ("seed", "strict"):  # at the manifest's top
        assert manifest[name] == json.loads(json.dumps(getattr(options, name)))
    assert type(options).parse(manifest["argv"]) == options


@of_each_field(RecordOptions)
def test_how_an_attempt_is_run_is_no_part_of_the_manifest(options):
    if not options.asked():
        assert options.described() == RecordOptions().described()


@of_each_field(ReplayOptions)
def test_a_segment_gets_every_option_of_the_whole_replay(options):
    if options.uncertified:
        with pytest.raises(UsageError, match="replay the run whole"):
            jobs.command("run", options, 1, 3)
        return
    _, *start = jobs.command("run", options, 1, 3)
    assert start[:4] == ["-m", "geomprobe", "replay", "run"]
    assert ReplayOptions.parse(start[4:]) == replace(options, segment=(1, 3), force=False, resume=False)


@of_each_field(lasting=True)
@pytest.mark.parametrize("processes", [1, 4])
def test_the_commands_that_make_a_run_again_name_every_option(options, processes):
    manifest = {"script": {"kind": "module", "path": "project.train", "argv": ["--lr", "0.1"], "cwd": "/w"}}
    if processes > 1:
        manifest["ranks"] = {"world_size": processes}
    trace = None
    if isinstance(options, RecordOptions):
        manifest["recording"] = options.described()
    else:
        trace = {"measure": options.described()}
    _, *lines = again({"path": "/runs/a", "manifest": manifest, "trace": trace})
    verbs = [shlex.split(line) for line in lines]
    launcher = ["torchrun", "--nproc-per-node", str(processes), "-m"] * (processes > 1)
    assert [line[: len(launcher)] for line in verbs[:2]] == [launcher, launcher]
    record, replay = (line[len(launcher) + 1 :] for line in verbs[:2])
    asked = build_parser().parse_args(record)
    assert asked.module == ["project.train", "--lr", "0.1"]
    made = {RecordOptions: RecordOptions.of_arguments(asked)}
    made[ReplayOptions] = ReplayOptions.of_arguments(build_parser().parse_args(replay))
    assert made == {RecordOptions: RecordOptions(), ReplayOptions: ReplayOptions(), type(options): options}


@pytest.mark.parametrize(("function", "kind"), [(geomprobe.record, RecordOptions), (geomprobe.replay, ReplayOptions)])
def test_the_functions_show_every_option_in_their_signature_and_help(function, kind):
    names = [field.name for field in fields(kind)]
    assert list(inspect.signature(function).parameters) == ["train", "run", *names]
    assert [name for name in names if f"\n        {name}: " not in function.__doc__] == []
    assert "**options" not in function.__doc__


@pytest.mark.parametrize(
    ("function", "asked", "near"),
    [
        (geomprobe.record, "emas", "of record; the nearest is ema"),
        (geomprobe.replay, "per_ranks", "of replay; the nearest is per_rank"),
        (geomprobe.two_pass, "held_out", "of replay; the nearest is held_out_every"),
        (geomprobe.replay, "xyz", "of replay; there are every, curvature_every, "),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(tmp_path, function, asked, near):
    with pytest.raises(UsageError, match=f"there is no option {asked} {near}"):
        function(print, tmp_path / "run", **{asked: 1})
    assert not (tmp_path / "run").exists()


WRONG = [
    (RecordOptions, {"checkpoint_every": "10"}, "'10' is not epoch, never, or a number of steps or minutes"),
    (RecordOptions, {"checkpoint_every": "0steps"}, "'0steps' is not epoch"),
    (RecordOptions, {"keep_checkpoints": 1}, "no whole number of at least 2, and not 'all'"),
    (RecordOptions, {"ema": (0.9, 1.5)}, "a decay between 0 and 1"),
    (RecordOptions, {"ema": 0.9}, "ema=0.9: "),
    (RecordOptions, {"reference_steps": [4, -1]}, "steps are counted from 0"),
    (RecordOptions, {"patience": 0}, "no number of seconds above 0"),
    (RecordOptions, {"force": True, "resume": True}, "force and resume exclude each other"),
    (ReplayOptions, {"every": 2.5}, "every=2.5: '2.5' is no whole number of at least 1"),
    (ReplayOptions, {"sharpness_every": -1}, "sharpness_every=-1: '-1' is no whole number of at least 0"),
    (ReplayOptions, {"segment": (4, 3)}, "is none of 1/K to K/K"),
    (ReplayOptions, {"segment": (1, 3), "resume": True}, "leave out --force and --resume"),
    (ReplayOptions, {"uncertified": True, "resume": True}, "replay the run whole"),
    (ReplayOptions, {"references": {"best": ""}}, "is not NAME=PATH"),
]


@pytest.mark.parametrize(("kind", "asked", "words"), WRONG, ids=str)
def test_a_value_that_means_nothing_is_refused(kind, asked, words):
    with pytest.raises(UsageError, match=words):
        kind.of(**asked)


def test_values_of_other_types_become_those_of_the_command_line(tmp_path):
    options = RecordOptions(reference_steps=range(2, 4), ema=[0.5], keep_checkpoints=None)
    assert (options.reference_steps, options.ema, options.keep_checkpoints) == ((2, 3), (0.5,), None)
    assert RecordOptions(reference_steps=[]) == RecordOptions()
    assert ReplayOptions(references={"a": tmp_path / "a.pt"}).references == {"a": str(tmp_path / "a.pt")}


@pytest.mark.parametrize(
    ("options", "interval", "required"),
    [
        ({}, 1, False),
        ({"curvature_every": 1}, 1, True),
        ({"curvature_every": 0}, 0, True),
        ({"sharpness_every": 2}, 1, True),
    ],
)
def test_hg_is_left_out_without_an_exact_route_unless_it_was_asked_for(options, interval, required):
    measure = MeasureOptions(**options)
    assert (measure.curvature_interval, measure.curvature_required) == (interval, required)


def test_continuing_with_another_option_names_it_and_both_values_and_what_to_do():
    then, now = RecordOptions(ema=(0.9,)).described(), RecordOptions(ema=(0.99,)).asked()
    words = r"runs/a was recorded with ema = \[0\.9\], and now it is \[0\.99\]: .* same options .* --force"
    with pytest.raises(RunError, match=words):
        require_same_options("runs/a was recorded", json.loads(json.dumps(then)), now)


def test_a_recording_that_was_cut_off_keeps_its_options_and_refuses_others(tmp_path):
    steps = iter([*range(3), KeyboardInterrupt, *range(10)])

    def train():
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            if next(steps) is KeyboardInterrupt:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        geomprobe.record(train, run, seed=1, ema=[0.5], strict=False)
    with pytest.raises(RunError, match=r"run was recorded with ema = \[0\.5\], and now it is \[0\.9\]"):
        geomprobe.record(train, run, resume=True, ema=[0.9])
    with geomprobe.record(train, run, resume=True, ema=[0.5]) as record:
        assert record.references == ["final", "ema-0.5"]
        recording = record.manifest["recording"]
        assert (record.manifest["seed"], record.manifest["strict"]) == (1, False)
    assert recording["argv"] == ["--seed", "1", "--no-strict", "--ema", "0.5"]
    trace = geomprobe.replay(train, run, every=2, held_out_every=0, references={})
    assert trace.manifest["measure"]["argv"] == ["--every", "2"]


def test_an_option_that_is_on_by_default_is_switched_off_by_its_negation():
    @dataclass(frozen=True, kw_only=True)
    class Bake(Options):
        turn_over: bool = option(True, "turn it over")

    assert Bake(turn_over=False).argv() == ["--no-turn-over"]
    assert Bake.parse(["--no-turn-over"]) == Bake(turn_over=False)
