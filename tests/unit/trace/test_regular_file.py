"""Only regular files are opened, at once, whatever else has been put in their place."""

import os
import socket

import pytest

from geomprobe.errors import RunError
from geomprobe.trace.regular_file import open_regular, read_bytes, read_json, require_own_folder


def bound(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


MAKE = {
    "a FIFO": os.mkfifo,
    "a socket": bound,
    "a folder": os.mkdir,
    "a symbolic link": lambda path: path.symlink_to(path.with_name("there")),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT])
def test_what_is_no_regular_file_is_named(tmp_path, monkeypatch, kind, flags):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "there").write_text("mine")
    MAKE[kind](tmp_path / "x" if kind != "a socket" else "x")
    with pytest.raises(RunError, match=f"x is {kind}, and a run has regular files only"):
        open_regular(tmp_path / "x", flags)
    assert (tmp_path / "there").read_text() == "mine"


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "x")


def test_a_file_is_read_up_to_a_length(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(RunError, match="longer than 4 bytes"):
        read_bytes(tmp_path / "x", 4)


@pytest.mark.parametrize("text", ["{", "", "[" * 200_000, '"\ud800', "1" * 5000])
def test_what_is_no_json_is_damaged(tmp_path, text):
    (tmp_path / "x").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(RunError, match="it is no JSON text"):
        read_json(tmp_path / "x")


def test_a_folder_that_is_a_link_is_refused_and_one_that_is_not_there_is_not(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match="is no folder of its own"):
        require_own_folder(tmp_path / "link")
    require_own_folder(tmp_path)
    require_own_folder(tmp_path / "missing")
