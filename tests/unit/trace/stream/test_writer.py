import time

import h5py
import numpy as np
import pytest
from support.part_cases import RECORD_TABLES, assert_right, blocks, expected, open_part, write_part

from geomprobe.errors import RunError, UsageError
from geomprobe.trace.schema import UnknownColumn
from geomprobe.trace.stream.reader import part_state, read_part
from geomprobe.trace.stream.writer import PartWriter, Table

KINDS = ("geomprobe-trace", "geomprobe-record")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1], [64] * 5, [1, 63, 0, 65, 200, 7], [5000]])
def test_what_was_appended_reads_back_whatever_the_block_sizes(tmp_path, kind, sizes):
    path = tmp_path / "part.h5"
    with open_part(path, kind, first_step=1000) as writer:
        for size in sizes:
            start = 1000 + writer.rows
            writer.append(blocks(kind, start, start + size))
        assert writer.rows == sum(sizes)
    part = read_part(path)
    assert part.rows == sum(sizes)
    assert_right(part, first_step=1000)


def test_attributes_read_back_and_a_manifest_may_be_large(tmp_path):
    manifest = '{"x": "' + "y" * 300_000 + '"}'
    with open_part(tmp_path / "part.h5", KINDS[0], manifest=manifest, ratio=0.5, count=3):
        pass
    part = read_part(tmp_path / "part.h5")
    assert part.attributes == {"manifest": manifest, "num_parameters": 7, "ratio": 0.5, "count": 3}
    assert part.schema == KINDS[0]


def test_rows_can_be_read_while_the_writer_lives_and_after_it_closed(tmp_path):
    path = tmp_path / "part.h5"
    with open_part(path, KINDS[1]) as writer:
        for stop in (64, 70):
            writer.append(blocks(KINDS[1], writer.rows, stop))
            part = read_part(path)
            assert part.rows == stop
            assert_right(part)
    assert part_state(path) == "streaming"
    assert_right(read_part(path))


def test_special_values_keep_their_bits(tmp_path):
    table = Table("values", ("steps/loss", "inner_products/g.g"), "float64")
    values = np.array([[np.nan, -0.0], [np.inf, -np.inf], [5e-324, 1.7e308]])
    with PartWriter(tmp_path / "p.h5", schema=KINDS[0], tables=[table], attributes={}) as writer:
        writer.append({"values": values})
    np.testing.assert_array_equal(
        read_part(tmp_path / "p.h5").tables["values"][1].view(np.int64), values.view(np.int64)
    )


@pytest.mark.parametrize("columns", [0, 1, 500, 3000, 20_000])
def test_tables_may_have_no_or_very_many_columns(tmp_path, columns):
    table = Table("fingerprints/weights", tuple(f"p{i}" for i in range(columns)), "int64")
    tables = [RECORD_TABLES[0], table]
    with PartWriter(tmp_path / "p.h5", schema=KINDS[1], tables=tables, attributes={}) as writer:
        for start in (0, 64):
            writer.append({each.name: expected(each, np.arange(start, start + 64)) for each in tables})
    names, array = read_part(tmp_path / "p.h5").tables[table.name]
    assert names == table.columns
    np.testing.assert_array_equal(array, expected(table, np.arange(128)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: good.astype(np.float32), "float32"),
        (lambda good: good.astype(np.int64), "int64"),
        (lambda good: good[:, :-1], r"\[4, 2\]"),
        (lambda good: good[0], r"\[3\]"),
        (lambda good: good[:3], "different numbers of rows"),
    ],
)
def test_a_block_of_another_dtype_or_shape_is_refused_and_nothing_is_written(tmp_path, change, words):
    with open_part(tmp_path / "p.h5", KINDS[1]) as writer:
        good = blocks(KINDS[1], 0, 4)
        with pytest.raises(UsageError, match=words):
            writer.append({**good, "steps": change(good["steps"])})
        writer.append(good)
    assert_right(read_part(tmp_path / "p.h5"))


def test_a_missing_or_unknown_table_is_refused_by_name(tmp_path):
    with open_part(tmp_path / "p.h5", KINDS[1]) as writer:
        good = blocks(KINDS[1], 0, 4)
        del good["fingerprints/rng"]
        with pytest.raises(UsageError, match="fingerprints/rng"):
            writer.append(good)
        with pytest.raises(UsageError, match="elsewhere"):
            writer.append({**blocks(KINDS[1], 0, 4), "elsewhere": np.zeros((4, 1))})


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("steps/cosine", "derived"),
        ("references/best/rsi", "derived"),
        ("inner_products/g.q", "inner_products/g.q"),
        ("loss", "no column"),
        ("groups/first/lr", "no column"),
    ],
)
def test_a_trace_part_refuses_columns_that_could_not_be_sealed(tmp_path, column, words):
    table = Table("values", ("steps/loss", column), "float64")
    with pytest.raises(UnknownColumn, match=words):
        PartWriter(tmp_path / "p.h5", schema=KINDS[0], tables=[table], attributes={})
    assert not (tmp_path / "p.h5").exists()


def test_a_part_is_never_written_over(tmp_path):
    path = write_part(tmp_path / "p.h5")
    with pytest.raises(RunError, match="exists"):
        open_part(path, KINDS[0])
    assert_right(read_part(path))
    with pytest.raises(RunError, match="no folder"):
        open_part(tmp_path / "nowhere" / "p.h5", KINDS[0])


def test_a_closed_writer_takes_no_rows_and_closes_twice(tmp_path):
    writer = open_part(tmp_path / "p.h5", KINDS[0])
    writer.close()
    writer.close()
    with pytest.raises(UsageError, match="closed after 0 rows"):
        writer.append(blocks(KINDS[0], 0, 1))


def test_the_step_column_is_the_last_to_grow(tmp_path, monkeypatch):
    """The order on disk, seen by a reader at each flush: a row is marked only when its values are there."""
    path = tmp_path / "p.h5"
    seen = []
    flush = h5py.Dataset.flush

    def watched(dataset):
        flush(dataset)
        part = read_part(path)
        assert_right(part)
        seen.append(part.rows)

    with open_part(path, KINDS[1]) as writer:
        writer.append(blocks(KINDS[1], 0, 3))
        monkeypatch.setattr(h5py.Dataset, "flush", watched)
        writer.append(blocks(KINDS[1], 3, 9))
    filled = sum(bool(table.columns) for table in RECORD_TABLES)
    assert seen == [3] * (filled + 1) + [9]


def test_a_block_of_64_rows_is_cheap_to_append(tmp_path):
    table = Table("values", tuple(f"parameters/p{i}/g.g" for i in range(40)), "float64")
    block = {"values": np.random.default_rng(0).random((64, 40))}
    with PartWriter(tmp_path / "p.h5", schema=KINDS[0], tables=[table], attributes={}) as writer:
        taken = []
        for _ in range(100):
            start = time.perf_counter()
            writer.append(block)
            taken.append(time.perf_counter() - start)
    assert 64 / np.median(taken) > 5000
