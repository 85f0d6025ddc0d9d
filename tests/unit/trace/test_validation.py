"""A file that a pass wrote is found good in one walk; what else is in it is not touched."""

import time

import h5py
import numpy as np
import pytest
from support.part_cases import RECORD_TABLES, TRACE_COLUMNS, TRACE_TABLES, expected, write_part

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.reader import open_trace
from geomprobe.trace.seal import seal_record, seal_trace, write_reference
from geomprobe.trace.stream.writer import PartWriter, Table
from geomprobe.trace.validation import part_header, reference_names, sealed_facts

STEP_COLUMNS = [column.name for column in schema.STEP_COLUMNS]


def checked(check, path):
    with h5py.File(path, "r", libver="latest", swmr=check is part_header) as file:
        known = [STEP_COLUMNS] if check is sealed_facts else []
        return check(file, path.stat().st_size, *known)


@pytest.fixture
def trace(tmp_path):
    seal_trace([write_part(tmp_path / "p.h5", stop=40)], tmp_path / "trace.h5", **FACTS)
    return tmp_path / "trace.h5"


FACTS = {"status": "incomplete", "num_parameters": 7, "manifest": {"seed": 3}}


def test_what_a_pass_sealed_is_good(tmp_path, trace):
    found = checked(sealed_facts, trace)
    assert {name: found[name] for name in FACTS} == FACTS
    assert set(TRACE_COLUMNS) <= set(found["columns"])
    assert found["final"] == list(schema.FINAL_LINKS)
    assert (found["num_steps"], found["part"], found["certificate"]) == (40, False, {})
    weights = {"w": (np.ones((2, 3), np.float32), "float32"), "b": (np.ones(3, np.uint16), "bfloat16")}
    weights |= {
        "scalar": (np.ones(()), "float64"),
        "none": (np.ones((0, 3)), "float64"),
        "a/b": (np.ones(1), "float64"),
    }
    write_reference(tmp_path / "final.h5", weights)
    assert sorted(checked(reference_names, tmp_path / "final.h5")["names"]) == ["a%2Fb", "b", "none", "scalar", "w"]
    part = write_part(tmp_path / "r.h5", schema.RECORD_SCHEMA)
    seal_record([part], tmp_path / "record.h5", references={"final": tmp_path / "final.h5"}, **FACTS)
    assert checked(sealed_facts, tmp_path / "record.h5")["num_steps"] == 10


@pytest.mark.parametrize(
    ("kind", "tables"), [(schema.TRACE_SCHEMA, TRACE_TABLES), (schema.RECORD_SCHEMA, RECORD_TABLES)]
)
def test_what_a_pass_streams_is_good(tmp_path, kind, tables):
    found = checked(part_header, write_part(tmp_path / "p.h5", kind, 3, 9))
    assert (found["schema"], found["first_step"], found["rows"]) == (kind, 3, 6)
    assert list(found["tables"]) == [table.name for table in tables]


def test_what_is_no_column_is_not_touched(trace):
    with h5py.File(trace, "r+") as file:
        file["steps/mine"] = h5py.ExternalLink("/dev/zero", "/x")
        file["notes"] = h5py.SoftLink("/nowhere")
        file["parameters/x/mine"] = np.zeros(3, "c16")
    assert "steps/mine" not in checked(sealed_facts, trace)["columns"]
    assert len(open_trace(trace)["loss"]) == 40


def test_a_column_of_the_final_iterate_is_counted_once_though_it_has_two_names(trace):
    with h5py.File(trace) as file:
        stored = sum(file[path].id.get_storage_size() for path in checked(sealed_facts, trace)["columns"])
        again = sum(file[path].id.get_storage_size() for path in schema.FINAL_LINKS)
        with pytest.raises(RunError, match="for which this file is too small"):
            sealed_facts(file, stored - 1, STEP_COLUMNS)
        assert again
        sealed_facts(file, stored, STEP_COLUMNS)


@pytest.mark.parametrize(
    ("dtype", "name"), [("f4", "load"), ("f4", "float64"), ("u2", "float8_e4m3fn"), ("f8", "float"), ("S4", "float32")]
)
def test_weights_whose_type_is_another_than_they_say_are_refused(tmp_path, dtype, name):
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file.create_dataset("w", data=np.zeros(3, dtype)).attrs["torch_dtype"] = name
    with pytest.raises(RunError, match="w is damaged"):
        checked(reference_names, tmp_path / "r.h5")


def test_many_columns_are_found_good_in_little_time(tmp_path):
    products = [each.name for each in schema.INNER_PRODUCTS]
    names = [schema.parameter_column(f"layer{i}.weight", name) for i in range(250) for name in products]
    table = Table("values", tuple(names), "float64")
    with PartWriter(tmp_path / "p.h5", schema=schema.TRACE_SCHEMA, tables=[table], attributes={}) as part:
        part.append({"values": expected(table, np.arange(3))})
    seal_trace([tmp_path / "p.h5"], tmp_path / "trace.h5", **FACTS)
    began = time.process_time()
    assert len(checked(sealed_facts, tmp_path / "trace.h5")["columns"]) > 2000
    assert time.process_time() - began < 5
    print(time.process_time() - began)
