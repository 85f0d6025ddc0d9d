"""Every figure of the papers has an experiment, whose runs are the papers', made once, resumed, and certified."""

from __future__ import annotations

import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.command_server import python
from support.paths import EXAMPLES, ROOT

import geomprobe

pytest.importorskip("matplotlib")


def catalog():
    from catalog.catalog import EXPERIMENTS

    return EXPERIMENTS


def with_runs():
    from catalog.entry import Experiment

    return [each for each in catalog().values() if isinstance(each, Experiment)]


def test_every_figure_of_the_papers_has_an_experiment():
    figures = {match.groups() for name in catalog() if (match := re.match(r"(nwt|cg)-fig(\d+)", name))}
    expected = {("nwt", str(n)) for n in range(1, 15)} | {("cg", str(n)) for n in range(1, 10)}
    assert figures == expected
    panels = {name for name in catalog() if name.startswith("nwt-fig1-")}
    assert panels == {f"nwt-fig1-{what}" for what in ("depth-width", "batch-size", "optimizer", "architecture")}


def test_there_are_experiments_on_what_the_papers_leave_open():
    assert {"share-of-corridors", "clr-generalization", "held-out-gradients"} <= set(catalog())


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_the_training_scripts_take_every_runs_arguments(monkeypatch, scale):
    parsers = {
        name: runpy.run_path(str(EXAMPLES / name), run_name="imported")["parse"]
        for name in ("images.py", "language.py", "segmentation.py")
    }
    for experiment in with_runs():
        for runs in experiment.at(scale).values():
            for run in runs:
                monkeypatch.setattr(sys, "argv", [run.script, *run.arguments])
                options = vars(parsers[run.script]())
                assert {name: options[name] for name in run.options} == dict(run.options)
                named = options.get("dataset", options.get("corpus"))
                assert (named in ("digits", "stdlib")) == (scale == "tiny")


@pytest.mark.parametrize(
    ("experiment", "values"),
    [
        ("nwt-fig1-batch-size", {"batch_size": [32, 64, 128, 256], "epochs": [20], "weight_decay": [1e-5]}),
        ("nwt-fig1-optimizer", {"optimizer": ["adam", "momentum", "sgd"], "lr": [1e-3], "batch_size": [256]}),
        ("nwt-fig1-depth-width", {"width": [0.5, 1, 2], "lr": [0.1], "warmup": [3], "epochs": [180]}),
        ("nwt-fig1-architecture", {"model": ["segnet", "unet"], "lr": [0.01], "batch_size": [10]}),
        ("nwt-fig4-seed", {"lr": [0.01], "weight_decay": [1e-6], "epochs": [190], "batch_size": [256]}),
        (
            "nwt-fig6",
            {"lr": [0.005, 0.005 * 2**0.5, 0.01, 0.005 * 8**0.5], "batch_size": [64, 128, 256, 512]},
        ),
        ("nwt-fig14", {"model": ["medium-mlp", "resnet18"], "epochs": [150], "width": [2]}),
        ("cg-fig2", {"batch_size": [4096], "model": ["resnet18"], "optimizer": ["clr", "sgd"]}),
        ("cg-fig8", {"max_lr": [10], "model": ["resnet50"], "dataset": ["imagenet"]}),
    ],
)
def test_at_full_scale_the_values_are_the_papers(experiment, values):
    runs = [run for runs in catalog()[experiment].at("paper").values() for run in runs]
    for name, expected in values.items():
        found = sorted({run.options[name] for run in runs if name in run.options and run.options[name] != 1})
        assert found == pytest.approx([value for value in expected if value != 1])


def test_at_full_scale_the_lrs_of_wikitext_2_grow_with_the_square_root_of_the_batch_size():
    runs = [run for (run,) in catalog()["nwt-fig1-batch-size"].at("paper").values()]
    ratio = [run.options["lr"] / run.options["batch_size"] ** 0.5 for run in runs]
    assert ratio == pytest.approx([1e-4 / 32**0.5] * 4)


def test_rates_decays_and_schedules_stay_the_papers_at_the_tiny_scale():
    from catalog.tiny import MLP_WIDTH

    for experiment in with_runs():
        scales = zip(experiment.at("paper").values(), experiment.at("tiny").values(), strict=True)
        for paper, tiny in ((a, b) for large, small in scales for a, b in zip(large, small, strict=True)):
            for name in ("model", "optimizer", "lr", "max_lr", "weight_decay", "momentum", "clip", "augment"):
                assert paper.options.get(name) == tiny.options.get(name)
            assert tiny.seed == paper.seed
            assert tiny.hg == paper.hg
            if "width" in paper.options and paper.options.get("model") != "medium-mlp":
                assert tiny.options["width"] / paper.options["width"] == 1 / 8
    assert MLP_WIDTH * 4096 == 544


def test_medium_mlp_and_resnet_18_2_have_about_as_many_parameters_at_both_scales():
    from catalog.tiny import MLP_WIDTH, WIDTH
    from workloads import medium_mlp, resnet

    def size(model):
        return sum(parameter.numel() for parameter in model.parameters())

    assert size(medium_mlp()) == pytest.approx(size(resnet(18, width=2)), rel=0.05)
    assert size(medium_mlp(inputs=192, width=MLP_WIDTH)) == pytest.approx(size(resnet(18, width=2 * WIDTH)), rel=0.05)


def test_the_budgets_references_end_with_epochs_at_both_scales():
    for scale, per_epoch, epochs in (("paper", 195, (100, 190)), ("tiny", 23, (10, 19))):
        ((run,),) = catalog()["nwt-fig4-epochs"].at(scale).values()
        assert run.reference_steps == tuple(per_epoch * each for each in epochs)


def test_figures_share_their_runs_and_no_two_runs_share_a_folder():
    runs = [run for each in with_runs() for of_line in each.at("tiny").values() for run in of_line]
    names = {run.name for run in runs}
    facts = {(run.script, *run.arguments, run.seed, run.hg, run.reference_steps) for run in runs}
    assert len(names) == len(facts) < len(runs)
    by_name = {name: experiment.at("tiny") for name, experiment in catalog().items() if hasattr(experiment, "at")}
    assert by_name["nwt-fig1-optimizer"] == by_name["nwt-fig8"] == by_name["nwt-fig12"]


def test_of_each_figure_that_is_drawn_here_somebody_has_said_what_it_shows():
    from gallery import found

    assert set(found()) == {each.name for each in with_runs()}


def test_the_gallerys_page_holds_every_figure_and_says_what_it_shows():
    page = (ROOT / "docs" / "gallery" / "papers.md").read_text()
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(catalog())
    for text in sections.values():
        (figure,) = re.findall(r"!\[\S+\]\((\S+)\)", text)
        assert (ROOT / "docs" / "gallery" / figure).stat().st_size < 130_000
        assert "*The paper*:" in text
        assert "NOT" not in text


TRAINING = """
import os, signal, sys
from pathlib import Path
import torch
import geomprobe

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=float(sys.argv[2]))
probe = geomprobe.attach(model, optimizer)
stop = Path(__file__).with_name("stop")
for epoch in probe.epochs(3):
    for _ in range(5):
        loss = (model(torch.randn(8, 4)) - 1).square().mean()
        optimizer.zero_grad()
        probe.backward(loss)
        optimizer.step()
    print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}  held-out accuracy 0.5000")
    if epoch == 1 and stop.exists():
        stop.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An experiment of one small training, which is killed in its second epoch the first time."""
    import command_line
    from catalog import runs
    from catalog.entry import Experiment
    from catalog.runs import Run
    from catalog.tiny import Tiny
    from figures.cg import loss_and_error

    (tmp_path / "train.py").write_text(TRAINING)
    (tmp_path / "stop").touch()
    run = Run(str(tmp_path / "train.py"), {"lr": 0.1})
    entry = Experiment("small", "what it shows", [("rate {lr}", [run])], loss_and_error, Tiny(1, {}))
    monkeypatch.setattr(command_line, "EXPERIMENTS", {"small": entry})

    def in_a_fork(command, *, stdout, **_):
        result = python(*command[1:])
        stdout.write(result.out)
        return SimpleNamespace(returncode=result.code)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=in_a_fork))
    return command_line.main, tmp_path / "runs" / run.name


def test_a_killed_experiment_continues_by_the_same_line_and_a_finished_one_is_only_drawn(tmp_path, small, capfd):
    main, folder = small
    figure = tmp_path / "small.png"
    line = ["run", "small", "-o", str(tmp_path / "runs"), "--figure", str(figure)]
    assert main(line) == 1
    assert "ended with exit code" in capfd.readouterr().err
    assert not figure.exists()
    assert main(line) == 0
    trace = geomprobe.open_trace(folder)
    assert trace.status == "complete"
    assert trace.certificate["steps_equal"] == trace.num_steps == 15
    assert figure.read_bytes().startswith(b"\x89PNG")
    from figures.cg import held_out_error

    np.testing.assert_allclose(held_out_error(folder), 50)

    sealed = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    log = folder.with_name(f"{folder.name}.log").read_text()
    figure.unlink()
    assert main(line) == 0
    assert figure.exists()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == sealed
    assert folder.with_name(f"{folder.name}.log").read_text() == log

    page = tmp_path / "gallery" / "papers.md"
    page.parent.mkdir()
    assert main(["gallery", "-o", str(tmp_path / "runs"), "--page", str(page)]) == 0
    assert "## small" in page.read_text()
    assert "1 run, 15 steps, certified." in page.read_text()
    assert main(["list", "-o", str(tmp_path / "runs")]) == 0
    assert "1/1 runs" in capfd.readouterr().out


def test_missing_data_ends_an_experiment_with_where_to_get_it(tmp_path, monkeypatch, capfd):
    from command_line import main

    monkeypatch.chdir(tmp_path)
    assert main(["run", "nwt-fig4-seed"]) == 1
    said = capfd.readouterr().err
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in said
    assert "Traceback" not in said
    assert len(list(tmp_path.rglob("*.log"))) == 1  # the other seeds were not begun
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_without_a_certificate_is_refused(tmp_path, monkeypatch):
    from catalog import runs
    from support.sealed_runs import certificate, train, write_run

    run = runs.Run("train.py", {"lr": 0.1})
    said = certificate(60, equal=20, weights_equal=False)
    write_run(tmp_path / run.name, train(steps=60), status="uncertified", cert=said)
    monkeypatch.setattr(runs.Run, "commands", lambda *_: [])
    with pytest.raises(runs.RunFailed, match="not certified but uncertified"):
        runs.make(run, tmp_path, {})
