from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import DataError
from pipeline.core.inputs import (
    decode_text,
    expanded,
    read_array,
    read_at_most,
    read_input,
    why_no_output,
    why_no_path,
)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_input(path, 5, DataError, "name another") == b"12345"
    with pytest.raises(DataError, match="x is larger than 4e-06 MB: name another"):
        read_input(path, 4, DataError, "name another")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none does not exist: name another"),
        ("", "is a folder: name another"),
        ("pipe", "pipe is a device or a pipe"),
        ("/dev/zero", "/dev/zero is a device or a pipe"),
        ("loop", "cannot read .*loop"),
        ("file/x", "cannot read .*file/x"),
        ("x" * 300, "has a name of 300 bytes, and names end at 255"),
        ("x/" * 2100, "bytes, and paths end at 4096"),
        ("a\0b", r"a\\x00b is no path"),
    ],
)
def test_what_is_no_file(tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=message):
        read_input(tmp_path / name, 10, DataError, "name another")


def test_text_names_the_line_that_is_none() -> None:
    assert decode_text(b"\xef\xbb\xbfa", Path("x"), DataError) == "a"
    with pytest.raises(DataError, match="x:3: it is not UTF-8 text"):
        decode_text(b"a\nb\n\xff", Path("x"), DataError)


def test_paths_that_cannot_be() -> None:
    assert why_no_path("a/b") is None
    assert why_no_path("x" * 255) is None
    assert why_no_path("") == "is no path"
    assert why_no_path("ä" * 128) == "has a name of 256 bytes, and names end at 255"
    assert why_no_path("\ud800") == "has characters that no file name can have"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "to-proc").symlink_to("/proc")
    assert why_no_output(tmp_path / "new" / "folder") is None
    assert why_no_output(Path("relative/folder")) is None
    assert why_no_output(Path("/dev/shm/x")) is None
    assert why_no_output(tmp_path / "file") == f"cannot be a folder: {tmp_path / 'file'} is none"
    assert why_no_output(tmp_path / "file" / "x") is not None
    for place in (
        "/dev/null",
        "/dev/full",
        "/dev",
        "/proc/self/x",
        "/sys",
        str(tmp_path / "to-proc"),
    ):
        problem = why_no_output(Path(place))
        assert problem is not None, place


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == "/home/me/x"
    assert expanded("x/~") == "x/~"
    assert expanded("~nobody-at-all/x") == "~nobody-at-all/x"


def test_memory_is_asked_for_as_it_is_needed() -> None:
    """A limit far above the memory costs nothing where the file is small."""

    class Asked(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.largest = max(self.largest, size)
            return super().read(size)

    stream = Asked(bytes(100))
    assert read_at_most(stream, 2**60) == bytes(100)
    assert stream.largest <= 2**24
    assert read_at_most(Asked(bytes(100)), 99) == bytes(99)
    assert read_at_most(Asked(bytes(100)), 0) == b""
    assert read_at_most(Asked(bytes(2**24 + 5)), 2**24 + 1) == bytes(2**24 + 1)


def test_an_array_is_read_and_nothing_else(tmp_path: Path) -> None:
    array, path = np.arange(6, dtype=np.float32).reshape(2, 3), tmp_path / "x.npy"
    np.save(path, array)
    assert read_array(path, 1000, "array").tobytes() == array.tobytes()
    with pytest.raises(DataError, match="is larger than"):
        read_array(path, 100, "array")
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"x\.npy is no array: .*allow_pickle"):
        read_array(path, 1000, "array")
    np.savez(tmp_path / "two.npz", a=array, b=array)
    with pytest.raises(DataError, match=r"two\.npz is no array: it holds several"):
        read_array(tmp_path / "two.npz", 1000, "array")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(DataError, match=r"pipe\.npy is a device or a pipe"):
        read_array(tmp_path / "pipe.npy", 1000, "array")
