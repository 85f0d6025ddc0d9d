import importlib
import itertools
import os
import sys

import numpy as np
import pytest
from support.part_cases import TRACE_COLUMNS, TRACE_TABLES, expected, flip_bit, open_part, write_part

from geomprobe.errors import GeomprobeError, RunError, UsageError
from geomprobe.trace import schema
from geomprobe.trace.reader import open_trace
from geomprobe.trace.schema import UnknownColumn
from geomprobe.trace.seal import seal_trace
from geomprobe.trace.stream.writer import PartWriter, Table

CERTIFICATE = {
    "steps_recorded": 40,
    "steps_compared": 40,
    "steps_equal": 40,
    "final_weights_equal": True,
    "components": ["rng", "weights"],
}


def column(name, steps):
    return expected(TRACE_TABLES[0], steps)[:, TRACE_COLUMNS.index(name)]


def sealed(folder, **facts):
    facts = {
        "status": "complete",
        "num_parameters": 7,
        "manifest": {"seed": 3},
        "certificate": CERTIFICATE,
        **facts,
    }
    seal_trace(sorted((folder / "stream").glob("*.h5")), folder / "trace.h5", **facts)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "stream").mkdir()
    write_part(folder / "stream" / "p.h5", stop=40)
    return sealed(folder)


def test_a_sealed_trace_gives_its_facts(run):
    trace = open_trace(str(run))
    assert (trace.path, trace.status, trace.num_steps, trace.num_parameters) == (run, "complete", 40, 7)
    assert trace.manifest == {"seed": 3}
    assert trace.certificate == CERTIFICATE
    assert type(trace.certificate["steps_equal"]) is int
    assert trace.certificate["final_weights_equal"] is True
    assert (trace.references, trace.parameters) == (["final"], [])
    assert trace.columns == [column.name for column in schema.STEP_COLUMNS]
    assert open_trace(run / "trace.h5").path == run / "trace.h5"
    assert "complete, 40 steps" in repr(trace)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("loss", "steps/loss"),
        ("steps/loss", "steps/loss"),
        ("inner_products/g.d", "inner_products/g.d"),
        ("references/final/inner_products/g.d", "inner_products/g.d"),
        ("groups/0/lr", "groups/0/lr"),
        ("lr", "groups/0/lr"),
    ],
)
def test_names_and_paths_lead_to_the_same_columns(run, name, path):
    trace = open_trace(run)
    assert name in trace
    np.testing.assert_array_equal(trace[name], column(path, np.arange(40)))


def test_columns_are_the_callers_own_arrays(run):
    for trace in (open_trace(run), open_trace(run / "stream" / "p.h5")):
        trace["loss"][:] = 0
        np.testing.assert_array_equal(trace["loss"], column("steps/loss", np.arange(40)))


def test_a_live_trace_has_the_very_columns_of_the_sealed_one(run):
    live, whole = open_trace(run / "stream" / "p.h5"), open_trace(run)
    assert (live.status, live.certificate, live.num_parameters) == ("incomplete", {}, 7)
    assert live.columns == whole.columns
    names = [*whole.columns, *TRACE_COLUMNS, *schema.FINAL_LINKS, "inner_products/Hg.Hg"]
    for name in names:
        np.testing.assert_array_equal(live[name], whole[name])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cosin", "did you mean cosine"),
        ("g.d", "did you mean inner_products/g.d"),
        ("references/final/rsj", "references/final/rsi"),
        ("zzz", "/steps has step, epoch"),
        ("inner_products/step", "no column"),
        ("same", "no column"),
    ],
)
def test_an_unknown_name_is_a_key_error_with_near_matches(run, name, words):
    trace = open_trace(run)
    assert name not in trace
    with pytest.raises(UnknownColumn, match=words) as caught:
        trace[name]
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, GeomprobeError)
    assert 3 not in trace


def test_references_and_parameters_are_listed_by_their_own_names(tmp_path):
    paths = [schema.product_column("g.d", name) for name in ("best", "a/b")]
    paths += [schema.parameter_column(name, "g.g") for name in ("fc.weight", "odd/one")]
    table = Table("values", tuple(paths), "float64")
    (tmp_path / "stream").mkdir()
    with PartWriter(tmp_path / "stream" / "p.h5", schema=schema.TRACE_SCHEMA, tables=[table], attributes={}) as part:
        part.append({"values": np.ones((2, 4))})
    for trace in (open_trace(tmp_path), open_trace(sealed(tmp_path))):
        assert trace.references[0] == "final"
        assert sorted(trace.references[1:]) == ["a/b", "best"]
        assert trace.parameters == ["fc.weight", "odd/one"]
        assert trace[schema.parameter_column("odd/one", "g.g")].tolist() == [1, 1]


def test_columns_that_only_some_runs_have_are_read_where_they_are(tmp_path):
    names = [column.name for column in schema.OPTIONAL_STEP_COLUMNS]
    table = Table("values", tuple(f"steps/{name}" for name in names), "float64")
    (tmp_path / "stream").mkdir()
    with PartWriter(tmp_path / "stream" / "p.h5", schema=schema.TRACE_SCHEMA, tables=[table], attributes={}) as part:
        part.append({"values": expected(table, np.arange(3))})
    for trace in (open_trace(tmp_path), open_trace(sealed(tmp_path))):
        assert trace.columns[len(schema.STEP_COLUMNS) :] == names
        for name, values in zip(names, expected(table, np.arange(3)).T, strict=True):
            np.testing.assert_array_equal(trace[name], values)


def test_per_epoch_agrees_with_a_plain_loop(tmp_path):
    rng = np.random.default_rng(0)
    rows = 60
    values = rng.normal(size=(rows, 2))
    values[:, 0] = np.repeat([0, 1, 2, np.nan, 5], rows // 5)
    values[rng.random(rows) < 0.3, 1] = np.nan
    values[values[:, 0] == 2, 1] = np.nan
    table = Table("values", ("steps/epoch", "steps/loss"), "float64")
    with PartWriter(tmp_path / "p.h5", schema=schema.TRACE_SCHEMA, tables=[table], attributes={}) as part:
        part.append({"values": values})
    found = open_trace(tmp_path / "p.h5").per_epoch("loss")
    assert found.epoch.tolist() == [0, 1, 2, 5]
    for i, epoch in enumerate(found.epoch):
        inside = [loss for at, loss in values if at == epoch and loss == loss]
        assert found.count[i] == len(inside)
        if inside:
            np.testing.assert_allclose(found.mean[i], sum(inside) / len(inside), rtol=1e-14)
            assert (found.minimum[i], found.maximum[i]) == (min(inside), max(inside))
        else:
            assert np.isnan([found.mean[i], found.minimum[i], found.maximum[i]]).all()


def test_to_xarray_equals_the_file_that_xarray_opens(run):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    made = open_trace(run).to_xarray()
    with xarray.open_dataset(run / "trace.h5", group="steps") as opened:
        xarray.testing.assert_identical(made.drop_attrs(deep=False), opened.load())
    assert made.attrs["status"] == "complete"


def test_without_xarray_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(UsageError, match=r"pip install 'geomprobe\[xarray\]'"):
        open_trace(run).to_xarray()


def test_nothing_stays_open(run):
    trace = open_trace(run)
    trace["loss"]
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
    assert not any(str(run) in link for link in links)


def _is_link(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_several_live_parts_show_each_step_once(tmp_path):
    """As a parallel replay leaves them, or one that was killed and resumed from an earlier checkpoint."""
    stream = tmp_path / "stream"
    stream.mkdir()
    for start, stop in [(0, 30), (20, 50), (25, 28), (80, 90), (90, 90)]:
        write_part(stream / f"{start}-{stop}.h5", start=start, stop=stop)
    (stream / "just-created.h5").touch()
    trace = open_trace(tmp_path)
    steps = np.array([*range(50), *range(80, 90)])
    assert trace.num_steps == 60
    np.testing.assert_array_equal(trace["step"], steps)
    np.testing.assert_array_equal(trace["loss"], column("steps/loss", steps))


def test_a_trace_that_is_sealed_while_it_is_opened_is_read_from_the_sealed_file(tmp_path, monkeypatch):
    source = importlib.import_module("geomprobe.trace.locate")
    stream = tmp_path / "stream"
    stream.mkdir()
    write_part(stream / "p.h5", stop=5)
    find, calls = source.find, itertools.count()

    def find_then_seal(path, kind):
        found = find(path, kind)
        if next(calls) == 0:
            sealed(tmp_path)
            (stream / "p.h5").unlink()
        return found

    monkeypatch.setattr(source, "find", find_then_seal)
    assert open_trace(tmp_path).status == "complete"


def test_the_trace_of_a_living_replay_grows(tmp_path):
    (tmp_path / "stream").mkdir()
    with open_part(tmp_path / "stream" / "p.h5", schema.TRACE_SCHEMA) as writer:
        with pytest.raises(RunError, match="nowhere does not exist"):
            open_trace(tmp_path / "nowhere")
        assert open_trace(tmp_path).num_steps == 0
        writer.append({"values": expected(TRACE_TABLES[0], np.arange(3))})
        assert open_trace(tmp_path).num_steps == 3


def test_a_damaged_column_of_a_sealed_trace_is_named(run, tmp_path):
    (tmp_path / "trace.h5").write_bytes((run / "trace.h5").read_bytes())
    flip_bit(tmp_path / "trace.h5", "steps/loss")
    trace = open_trace(tmp_path)
    assert len(trace["lr"]) == 40
    with pytest.raises(RunError, match=r"steps/loss in .*trace\.h5 is damaged"):
        trace["loss"]
