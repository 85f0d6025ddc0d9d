"""CONTRIBUTING.md is true: its files and names exist, and a quantity that is added as it says is in the trace."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.documents import ROOT, blocks

import geomprobe
from geomprobe.measure.measurement import Measurement
from geomprobe.trace import schema

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WALKS = TEXT.partition("## Three walks")[2].partition("\n## ")[0]


def test_the_tree_shows_folders_and_files_that_exist():
    (tree,) = (text for _, text in blocks(TEXT) if text.startswith("geomprobe/\n"))
    above, missing = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:[\w.]+(?:/|\.py) {0,2})+)", line)[1].split():
            above[depth:] = [name]
            if not ROOT.joinpath(*above).exists():
                missing.append("".join(above))
    assert missing == []


def test_every_file_that_it_names_exists():
    named = re.findall(r"`([\w/.]+/[\w.]*)`", TEXT)
    assert len(named) > 40
    made_by_a_run = {"stream/", "fingerprints/"}
    places = (ROOT, ROOT / "geomprobe")
    lost = {name for name in named if not any((place / name).exists() for place in places)}
    assert lost == made_by_a_run


@pytest.mark.parametrize("line", re.findall(r"^\d+\. .*$", WALKS, re.MULTILINE))
def test_each_stage_of_a_walk_names_what_is_in_its_files(line):
    quoted = re.findall(r"`([^`]+)`", line)
    files = [name for name in quoted if name.endswith(".py")]
    source = "".join((ROOT / "geomprobe" / name).read_text() for name in files)
    parts = [part for name in quoted if name not in files for part in re.split(r"[./]", name) if part]
    assert files
    assert [part for part in parts if not re.search(rf"\b{part}\b", source)] == []


def test_each_walk_has_ten_stages():
    assert re.findall(r"^(\d+)\. ", WALKS, re.MULTILINE) == [str(n) for n in range(1, 11)] * 3


def train():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).square().sum().backward()
        optimizer.step()
        sums.append(sum(p.grad.abs().sum().item() for p in model.parameters()))


sums: list[float] = []


def test_a_quantity_that_is_added_as_it_says_is_in_the_trace(tmp_path, monkeypatch):
    (code,) = (text for info, text in blocks(TEXT) if info == "python quantity")
    names: dict = {}
    exec(code, names)
    (described,) = re.findall(r"^ +\| (grad_l1 \| .*) \|$", TEXT, re.MULTILINE)
    column = schema.Column(*described.split(" | "))
    *others, quantities = Measurement.__init__.__defaults__
    monkeypatch.setattr(Measurement.__init__, "__defaults__", (*others, (*quantities, names["GradientL1"])))
    monkeypatch.setattr(schema, "OPTIONAL_STEP_COLUMNS", (*schema.OPTIONAL_STEP_COLUMNS, column))
    sums.clear()
    trace = geomprobe.two_pass(train, tmp_path / "run", seed=0)
    np.testing.assert_allclose(trace["grad_l1"], sums[3:], rtol=1e-6)
