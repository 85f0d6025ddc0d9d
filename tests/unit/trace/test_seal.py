import itertools
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from support.part_cases import RECORD_TABLES, TRACE_COLUMNS, TRACE_TABLES, expected, open_part, write_part

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.seal import seal_record, seal_trace, write_reference
from geomprobe.trace.stream.writer import PartWriter, Table

TRACE, RECORD = "geomprobe-trace", "geomprobe-record"
STEP_NAMES = {column.name for column in schema.STEP_COLUMNS}


def seal(parts, out, **facts):
    seal_trace(parts, out, **{"status": "complete", "num_parameters": 7, "manifest": {"seed": 1}, **facts})
    return out


def raw(steps):
    return dict(zip(TRACE_COLUMNS, expected(TRACE_TABLES[0], steps).T, strict=True))


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    return seal([write_part(folder / "p.h5", stop=50)], folder / "trace.h5")


def test_the_sealed_file_holds_what_was_streamed_and_the_columns_it_makes(trace):
    with h5py.File(trace) as file:
        for path, values in raw(np.arange(50)).items():
            np.testing.assert_array_equal(file[path][:], values)
        g_d, d_d, g_g = (raw(np.arange(50))[f"inner_products/{name}"] for name in ("g.d", "d.d", "g.g"))
        np.testing.assert_allclose(file["steps/cosine"][:], g_d / np.sqrt(d_d * g_g), rtol=1e-14)
        assert set(file["steps"]) == STEP_NAMES
        assert np.isnan(file["steps/hg_norm"][:]).all()
        assert set(file["inner_products"]) == {column.name for column in schema.INNER_PRODUCTS} | {"step"}


def test_every_dataset_is_a_checked_float_column_with_its_four_attributes(trace):
    def check(path, item):
        if isinstance(item, h5py.Dataset):
            assert (item.shape, item.dtype, item.fletcher32) == ((50,), np.float64, True)
            column = schema.describe("steps/step" if item.name.endswith("/step") else path)
            for name in ("long_name", "units", "formula", "source"):
                assert item.attrs[name] == getattr(column, name)

    with h5py.File(trace) as file:
        file.visititems(check)


def test_step_is_the_dimension_scale_of_every_column(trace):
    with h5py.File(trace) as file:
        step = file["steps/step"]
        assert step.is_scale
        for group in (
            "steps",
            "inner_products",
            "groups/0",
            "references/final",
            "references/final/inner_products",
        ):
            assert file[group]["step"] == step
            for name, dataset in file[group].items():
                if isinstance(dataset, h5py.Dataset) and name != "step":
                    assert dataset.dims[0][0] == step


def test_the_final_reference_is_the_same_datasets_by_hard_links(trace):
    with h5py.File(trace) as file:
        for path in schema.FINAL_LINKS:
            assert file[path] == file[schema.canonical(path)]
            assert isinstance(file.get(path, getlink=True), h5py.HardLink)


def test_the_root_says_what_the_file_is(tmp_path):
    manifest = {"sources": {f"file{i}.py": "0" * 64 for i in range(2000)}, "seed": 3}
    assert len(json.dumps(manifest)) > 1 << 17
    out = seal([write_part(tmp_path / "p.h5")], tmp_path / "t.h5", status="diverged", manifest=manifest)
    with h5py.File(out) as file:
        attributes = dict(file.attrs)
    assert json.loads(attributes.pop("manifest")) == manifest
    assert attributes == {
        "schema": TRACE,
        "schema_version": 1,
        "status": "diverged",
        "num_steps": 10,
        "num_parameters": 7,
    }


def test_the_certificate_is_attributes_of_its_group(tmp_path):
    certificate = {
        "steps_recorded": 10,
        "steps_compared": 4,
        "final_weights_equal": False,
        "components": ["rng", "batch"],
        "first_difference": {"step": 4, "component": "rng", "tensor": "cpu"},
        "unknown": None,
    }
    out = seal([write_part(tmp_path / "p.h5")], tmp_path / "t.h5", certificate=certificate)
    with h5py.File(out) as file:
        attributes = dict(file["certificate"].attrs)
    assert attributes["steps_compared"] == 4
    assert attributes["final_weights_equal"] == np.False_
    assert json.loads(attributes["components"]) == ["rng", "batch"]
    assert json.loads(attributes["first_difference"])["step"] == 4
    assert "unknown" not in attributes


@pytest.mark.parametrize("kind", [TRACE, RECORD])
def test_parts_that_join_seal_into_one_file_in_whatever_order_they_come(tmp_path, kind):
    bounds = [0, 64, 6001, 9000]
    parts = [write_part(tmp_path / f"{start}.h5", kind, start, stop) for start, stop in itertools.pairwise(bounds)]
    parts.append(write_part(tmp_path / "empty.h5", kind, 9000, 9000))
    out, steps = tmp_path / "out.h5", np.arange(9000)
    if kind == TRACE:
        seal(parts[::-1], out)
        with h5py.File(out) as file:
            for path, values in raw(steps).items():
                np.testing.assert_array_equal(file[path][:], values)
            np.testing.assert_array_equal(file["steps/step"][:], steps)
        return
    seal_record(parts[::-1], out, status="complete", num_parameters=7, manifest={}, references={})
    with h5py.File(out) as file:
        for table in RECORD_TABLES[1:]:
            np.testing.assert_array_equal(file[table.name][:], expected(table, steps))
        np.testing.assert_array_equal(file["steps/loss"][:], expected(RECORD_TABLES[0], steps)[:, 1])


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 10), (12, 20)], "steps are missing from 10 to 11"),
        ([(3, 10)], "begins at step 3"),
        ([], "nothing was streamed"),
    ],
)
def test_parts_that_do_not_join_are_refused_by_name(tmp_path, ranges, words):
    parts = [write_part(tmp_path / f"{start}-{stop}.h5", start=start, stop=stop) for start, stop in ranges]
    with pytest.raises(RunError, match=words) as caught:
        seal(parts, tmp_path / "t.h5")
    assert all(str(part) in str(caught.value) for part in parts)
    assert not (tmp_path / "t.h5").exists()


def test_where_two_parts_hold_a_step_it_is_sealed_once(tmp_path):
    ranges = [
        (0, 10),
        (8, 20),
        (12, 15),
        (20, 21),
    ]  # as attempts leave them that went over the same steps again
    parts = [write_part(tmp_path / f"{start}.h5", start=start, stop=stop) for start, stop in ranges]
    seal(parts, tmp_path / "t.h5")
    steps = np.arange(21)
    with h5py.File(tmp_path / "t.h5") as file:
        np.testing.assert_array_equal(file["steps/step"][:], steps)
        for path, values in raw(steps).items():
            np.testing.assert_array_equal(file[path][:], values)


def test_only_so_many_steps_are_sealed_as_are_asked_for(tmp_path):
    parts = [write_part(tmp_path / f"{start}.h5", start=start, stop=stop) for start, stop in [(0, 10), (30, 40)]]
    facts = {"status": "diverged", "num_parameters": 7, "manifest": {}}
    seal_trace(parts, tmp_path / "t.h5", num_steps=6, **facts)
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["steps/step"][:].tolist() == [*range(6)]


def test_parts_of_other_columns_or_another_kind_are_refused_by_name(tmp_path):
    first = write_part(tmp_path / "a.h5")
    other = tmp_path / "b.h5"
    table = Table("values", ("steps/loss",), "float64")
    with PartWriter(other, schema=TRACE, tables=[table], attributes={}, first_step=10) as writer:
        writer.append({"values": np.ones((1, 1))})
    with pytest.raises(RunError, match=r"b\.h5 hold different columns"):
        seal([first, other], tmp_path / "t.h5")
    with pytest.raises(RunError, match=r"a\.h5 holds geomprobe-trace version 1, not geomprobe-record"):
        seal_record([first], tmp_path / "r.h5", status="failed", num_parameters=1, manifest={}, references={})


def test_a_damaged_part_is_refused_with_the_step_it_is_damaged_from(tmp_path):
    part = write_part(tmp_path / "p.h5", stop=40)
    content = part.read_bytes()
    value = expected(TRACE_TABLES[0], [31])[0, 1].tobytes()
    part.write_bytes(content.replace(value, bytes(8)))
    with pytest.raises(RunError, match=r"p\.h5 is damaged from step 31"):
        seal([part], tmp_path / "t.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["p.h5"]


def test_a_run_of_no_steps_still_seals(tmp_path):
    out = seal([write_part(tmp_path / "p.h5", stop=0)], tmp_path / "t.h5")
    with h5py.File(out) as file:
        assert file["steps/cosine"].shape == (0,)
    part = write_part(tmp_path / "r.h5", RECORD, stop=0)
    seal_record([part], tmp_path / "r0.h5", status="failed", num_parameters=1, manifest={}, references={})
    with h5py.File(tmp_path / "r0.h5") as file:
        assert file["fingerprints/rng"].shape == (0, 2)


def test_references_and_parameters_get_their_groups_and_odd_names_survive(tmp_path):
    columns = [schema.product_column(product, "best/one") for product in ("g.d", "w.d", "d.d")]
    columns += [schema.parameter_column("a/b.weight", "g.g"), "inner_products/g.g", "steps/same"]
    table = Table("values", tuple(columns), "float64")
    with PartWriter(tmp_path / "p.h5", schema=TRACE, tables=[table], attributes={}) as writer:
        writer.append({"values": expected(table, np.arange(9))})
    out = seal([tmp_path / "p.h5"], tmp_path / "t.h5")
    with h5py.File(out) as file:
        assert set(file["references"]) == {"final", "best%2Fone"}
        names = {column.name for column in schema.REFERENCE_COLUMNS}
        assert set(file["references/best%2Fone"]) == names | {"inner_products", "step"}
        np.testing.assert_array_equal(file["parameters/a%2Fb.weight/g.g"][:], expected(table, np.arange(9))[:, 3])
        assert "same" in file["steps"]


@pytest.mark.slow
def test_sealing_needs_no_more_memory_for_more_rows(tmp_path):
    columns = tuple(schema.parameter_column(f"p{i}", "g.g") for i in range(200))
    table = Table("values", columns, "float64")
    with PartWriter(tmp_path / "p.h5", schema=TRACE, tables=[table], attributes={}) as writer:
        for start in range(0, 120_000, 10_000):
            writer.append({"values": expected(table, np.arange(start, start + 10_000))})
    code = (
        "import resource, sys; from pathlib import Path; from geomprobe.trace.seal import seal_trace\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, folder = peak(), Path(sys.argv[1])\n"
        "facts = {'status': 'complete', 'num_parameters': 1, 'manifest': {}}\n"
        "seal_trace([folder / 'p.h5'], folder / 't.h5', **facts)\n"
        "print((peak() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert (tmp_path / "t.h5").stat().st_size > 190 << 20
    assert int(done.stdout) < 64


@pytest.mark.slow
def test_very_many_columns_share_the_dimension_scale(tmp_path):
    table = Table("values", tuple(schema.parameter_column(f"p{i}", "g.g") for i in range(4500)), "float64")
    with PartWriter(tmp_path / "p.h5", schema=TRACE, tables=[table], attributes={}) as writer:
        writer.append({"values": expected(table, np.arange(2))})
    out = seal([tmp_path / "p.h5"], tmp_path / "t.h5")
    with h5py.File(out) as file:
        assert file["parameters/p4499/g.g"].dims[0][0] == file["steps/step"]


@pytest.mark.parametrize(
    "group", ["steps", "inner_products", "groups/0", "references/final", "references/final/inner_products"]
)
def test_xarray_opens_every_group_with_its_steps(trace, group):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    with xarray.open_dataset(trace, group=group) as data:
        assert data.sizes == {"step": 50}
        np.testing.assert_array_equal(data["step"], np.arange(50))
        for name in data:
            assert data[name].dims == ("step",)
            assert data[name].attrs["units"]


def test_the_record_holds_fingerprints_with_names_steps_and_references(tmp_path):
    part = write_part(tmp_path / "p.h5", RECORD, stop=30)
    arrays = {"fc.weight": (np.arange(6, dtype=np.float32).reshape(2, 3), "float32")}
    write_reference(tmp_path / "reference-final.h5", arrays)
    seal_record(
        [part],
        tmp_path / "record.h5",
        status="complete",
        num_parameters=6,
        manifest={"seed": 1},
        references={"final": tmp_path / "reference-final.h5"},
    )
    with h5py.File(tmp_path / "record.h5") as file:
        assert {key: file.attrs[key] for key in ("schema", "status", "num_steps", "num_parameters")} == {
            "schema": RECORD,
            "status": "complete",
            "num_steps": 30,
            "num_parameters": 6,
        }
        for table in RECORD_TABLES[1:]:
            np.testing.assert_array_equal(file[table.name][:], expected(table, np.arange(30)))
            assert tuple(file[f"{table.name}_names"].asstr()[:]) == table.columns
        assert file["fingerprints/batch"].shape == (30, 0)
        assert set(file["steps"]) == {"step", "epoch", "loss", "lr"}
        assert file["references/final/fc.weight"].fletcher32
        np.testing.assert_array_equal(file["references/final/fc.weight"][:], arrays["fc.weight"][0])


def test_a_reference_that_is_missing_is_refused_by_name(tmp_path):
    part = write_part(tmp_path / "p.h5", RECORD)
    with pytest.raises(RunError, match=r"'best' is missing: .*nowhere\.h5"):
        seal_record(
            [part],
            tmp_path / "record.h5",
            status="complete",
            num_parameters=1,
            manifest={},
            references={"best": tmp_path / "nowhere.h5"},
        )
    assert not (tmp_path / "record.h5").exists()


def test_a_part_can_be_sealed_while_its_writer_is_open(tmp_path):
    with open_part(tmp_path / "p.h5", TRACE) as writer:
        writer.append({"values": expected(TRACE_TABLES[0], np.arange(5))})
        seal([tmp_path / "p.h5"], tmp_path / "t.h5")
        writer.append({"values": expected(TRACE_TABLES[0], np.arange(5, 9))})
    with h5py.File(tmp_path / "t.h5") as file:
        assert file.attrs["num_steps"] == 5
