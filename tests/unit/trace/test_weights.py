import h5py
import numpy as np
import pytest
from support.part_cases import flip_bit, write_part

from geomprobe.errors import RunError
from geomprobe.trace.record import open_record
from geomprobe.trace.seal import seal_record
from geomprobe.trace.weights import chunk_shape, write_reference

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv.weight": (RNG.normal(size=(8, 3, 3, 3)).astype(np.float32), "float32"),
    "large": (RNG.normal(size=(700, 900)), "float64"),
    "half": (RNG.integers(0, 65536, 33).astype(np.uint16), "bfloat16"),
    "f16": (np.array([1.5, np.nan], np.float16), "float16"),
    "scale": (np.array(2.5, np.float32), "float32"),
    "empty": (np.empty((0, 4), np.float32), "float32"),
    "odd/name %": (np.ones(3, np.float32), "float32"),
}


def record(tmp_path, arrays=ARRAYS):
    write_reference(tmp_path / "reference-final.h5", arrays)
    part = write_part(tmp_path / "p.h5", "geomprobe-record")
    references = {"final": tmp_path / "reference-final.h5"}
    out = tmp_path / "record.h5"
    seal_record([part], out, status="complete", num_parameters=1, manifest={}, references=references)
    return out


def test_every_dtype_shape_and_name_comes_back_bit_for_bit(tmp_path):
    with open_record(record(tmp_path)) as opened:
        assert opened.references == ["final"]
        found = opened.reference("final")
    assert set(found) == set(ARRAYS)
    for name, (array, dtype) in ARRAYS.items():
        back, torch_dtype = found[name]
        assert (back.shape, back.dtype, torch_dtype) == (array.shape, array.dtype, dtype)
        assert back.tobytes() == array.tobytes()


def test_every_dataset_with_values_is_chunked_and_checked(tmp_path):
    with h5py.File(record(tmp_path)) as file:
        for name, dataset in file["references/final"].items():
            assert dataset.fletcher32 == (name != "empty")
            assert isinstance(dataset.attrs["torch_dtype"], str)


@pytest.mark.parametrize("name", ["conv.weight", "large", "half", "scale"])
def test_a_flipped_bit_is_an_error_that_names_the_parameter(tmp_path, name):
    out = record(tmp_path)
    flip_bit(out, f"references/final/{name}")
    with (
        open_record(out) as opened,
        pytest.raises(RunError, match=f"'{name}' of /references/final in .* is damaged"),
    ):
        opened.reference("final")


def test_a_reference_taken_again_replaces_the_first_at_once(tmp_path):
    path = tmp_path / "reference-best.h5"
    for value in (1.0, 2.0):
        write_reference(path, {"w": (np.full(3, value), "float64")})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["w"][:], [2, 2, 2])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_an_error_half_way_leaves_the_earlier_reference(tmp_path):
    path = tmp_path / "reference-best.h5"
    write_reference(path, {"w": (np.ones(3), "float64")})
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_reference(path, {"w": (np.zeros(3), "float64"), "v": (None, "float64")})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("shape", [(1,), (3, 0x40000), (64, 3, 7, 7), (2, 5_000_000), (10_000_000,), (4096, 4097)])
def test_chunks_fit_the_array_and_about_a_mebibyte(shape):
    chunk = chunk_shape(shape, 4)
    assert all(1 <= part <= whole for part, whole in zip(chunk, shape, strict=True))
    assert 4 * np.prod(chunk) <= 1 << 20
    assert 4 * np.prod(chunk) > 1 << 18 or chunk == shape
