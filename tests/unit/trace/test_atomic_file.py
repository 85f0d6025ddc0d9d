"""A name shows the old file or the new one, whole, and nothing stays aside."""

import h5py
import pytest

from geomprobe.trace.atomic_file import atomic_file, atomic_hdf5, write_json
from geomprobe.trace.hdf5_errors import WriteFailed


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with atomic_file(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), files(tmp_path)) == ("new", ["x.txt"])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with atomic_file(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (path.read_text(), files(tmp_path)) == ("old", ["x.txt"])


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", [1, 2])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert ((tmp_path / "x.json").read_text(), files(tmp_path)) == ("[1, 2]", ["x.json"])


def test_an_error_while_hdf5_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.h5"
    with atomic_hdf5(path) as file:
        file["a"] = 1

    def fail():
        with atomic_hdf5(path) as file:
            file["b"] = 2
            raise OSError("errno = 28, error message = 'No space left on device'")

    with pytest.raises(WriteFailed, match="What was there before is untouched"):
        fail()
    with h5py.File(path) as file:
        assert list(file) == ["a"]
    assert files(tmp_path) == ["x.h5"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WriteFailed, match="cannot create"), atomic_hdf5(tmp_path / "nowhere" / "x.h5"):
        pass
