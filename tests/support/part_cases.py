"""Parts whose every number is a known function of its step, so that a wrong row cannot pass for a right one."""

import h5py
import numpy as np

from geomprobe.trace.stream.writer import PartWriter, Table

TRACE_COLUMNS = (
    "steps/epoch",
    "steps/loss",
    "groups/0/lr",
    *(f"inner_products/{name}" for name in ("g.g", "w.g", "w.w", "g.d", "w.d", "d.d")),
)
TRACE_TABLES = [Table("values", TRACE_COLUMNS, "float64")]
RECORD_TABLES = [
    Table("steps", ("epoch", "loss", "lr"), "float64"),
    Table("fingerprints/rng", ("python", "torch"), "int64"),
    Table("fingerprints/weights", tuple(f"layer{i}.weight" for i in range(20)), "int64"),
    Table("fingerprints/loss", ("loss",), "int64"),
    Table("fingerprints/buffers", (), "int64"),
]
TABLES = {"geomprobe-trace": TRACE_TABLES, "geomprobe-record": RECORD_TABLES}


def expected(table, steps):
    """What `table` holds at `steps`, [len(steps), columns]; positive, and different in each place."""
    steps = np.asarray(steps)[:, None]
    places = np.arange(len(table.columns))[None]
    if table.dtype == "int64":
        mixed = (steps.astype(np.uint64) + np.uint64(len(table.columns))) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed ^ (places.astype(np.uint64) << np.uint64(7))).view(np.int64)
    return 1.0 + steps * 0.37 + places * 1e-3 + np.sin(steps + places) ** 2


def blocks(kind, start, stop):
    steps = np.arange(start, stop)
    return {table.name: expected(table, steps) for table in TABLES[kind]}


def open_part(path, kind, first_step=0, **attributes):
    attributes = {"manifest": "{}", "num_parameters": 7, **attributes}
    return PartWriter(path, schema=kind, tables=TABLES[kind], attributes=attributes, first_step=first_step)


def write_part(path, kind="geomprobe-trace", start=0, stop=10):
    with open_part(path, kind, start) as writer:
        writer.append(blocks(kind, start, stop))
    return path


def assert_right(part, first_step=0):
    """Every row of a part that was read is the row that was written for its step."""
    steps = np.arange(first_step, first_step + part.rows)
    assert part.first_step == first_step
    for table in TABLES[part.schema]:
        columns, array = part.tables[table.name]
        assert columns == table.columns
        np.testing.assert_array_equal(array, expected(table, steps))


def flip_bit(path, dataset):
    """Flip one bit of the first number that a chunked dataset keeps on disk."""
    with h5py.File(path) as file:
        place = file[dataset].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
