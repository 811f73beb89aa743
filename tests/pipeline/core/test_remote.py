"""Files at addresses: what drivers do wrong is told, without secrets, and not waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.core import remote
from pipeline.core.errors import DataError
from pipeline.core.remote import RemotePath, common_folder, located

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def file() -> Iterator[RemotePath]:
    files = MemoryFileSystem()
    files.pipe_file("/lent/a.tar", CONTENT)
    yield RemotePath.at("memory://lent/a.tar")
    files.rm("/lent", recursive=True)


def test_reading(file: RemotePath) -> None:
    with file.open("rb") as stream:
        assert stream.read(10) == CONTENT[:10]
        stream.seek(5000)
        assert stream.read(7) == CONTENT[5000:5007]
        assert stream.read() == CONTENT[5007:]
    assert file.part(300, 5) == CONTENT[300:305]
    assert file.part(len(CONTENT) - 2, 5) == CONTENT[-2:]
    assert file.part(0, 0) == b""


def test_places(file: RemotePath) -> None:
    assert (file.name, str(file.parent), str(file)) == (
        *("a.tar", "memory://lent", "memory://lent/a.tar"),
    )
    assert file.with_name("b.tar") == RemotePath.at("memory://lent/b.tar")
    assert file / "." is file
    assert file.parent.names() == ["a.tar"]
    deep = RemotePath.at("memory://lent/x/y/b.tar")
    folder = common_folder([file, deep])
    assert (str(folder), deep.below(folder)) == ("memory://lent", "x/y/b.tar")
    assert located("/data/a.tar") == located("/data/a.tar").absolute()


def test_what_stands_for_a_version(file: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.stat()
    assert (before, before.st_size) == (file.stat(), len(CONTENT))
    MemoryFileSystem().pipe_file("/lent/a.tar", CONTENT)
    assert file.stat() != before
    told: dict[str, Any] = {"size": 3, "ETag": "x"}
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: told)
    assert file.stat() == file.stat()
    told["ETag"] = "y"
    changed = file.stat()
    told["ETag"] = ""
    assert len({file.stat(), file.stat(), changed}) == 3, "what tells nothing is read again"
    told["size"] = None
    with pytest.raises(DataError, match="tells no size"):
        file.stat()


def test_what_a_driver_raises_is_told(file: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*more: Any, **options: Any) -> Any:
        raise PermissionError("403 for the key")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(
        DataError, match=r"a\.tar cannot be read: PermissionError: 403 .*: see that"
    ):
        file.part(0, 5)


def test_a_connection_that_breaks_while_it_is_read(
    file: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = MemoryFileSystem().open("/lent/a.tar", "rb")

    class Breaking:
        def read(self, size: int) -> bytes:
            data: bytes = opened.read(size)
            if opened.tell() == len(CONTENT):
                raise ConnectionError("reset by peer")
            return data

        def close(self) -> None:
            opened.close()

    monkeypatch.setattr(MemoryFileSystem, "open", lambda self, *more, **options: Breaking())
    with (
        file.open("rb") as stream,
        pytest.raises(DataError, match="cannot be read: ConnectionError"),
    ):
        stream.read()


def test_what_does_not_answer_is_not_waited_for(
    file: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = threading.Event()
    monkeypatch.setattr(remote, "LIMIT_S", 0.05)
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: ends.wait(60))
    with pytest.raises(DataError, match=r"lent/a\.tar does not answer within 0\.05 s"):
        file.stat()
    ends.set()


def test_a_user_is_no_password() -> None:
    assert remote.why_no_address("sftp://me@host/data/val.tar") is None
    assert remote.why_no_address("abfs://container@account/val.tar") is None
    assert "no password" in str(remote.why_no_address("sftp://me:word@host/val.tar"))
