"""Images on a real S3 server, on the loopback address; needs the extra `s3-test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from care.data import open_dataset
from pipeline.core.errors import DataError
from pipeline.core.hashes import HashCache, identify
from pipeline.core.listing import list_split
from tests.care.test_data import shards, write_tar

s3fs = pytest.importorskip("s3fs")
server_module = pytest.importorskip("moto.server")

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket; keys and the server's address come from the environment, as for a worker."""
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "visible-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = s3fs.S3FileSystem()
    bucket.makedirs("bucket", exist_ok=True)  # of all servers of a process there is one
    yield bucket
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def filled(files: Any, folder: Path) -> str:
    for path in folder.iterdir():
        files.pipe_file(f"bucket/{path.name}", path.read_bytes())
    return "s3://bucket"


@pytest.mark.parametrize("pattern", ["val-{00..01}.tar", "val-*.tar"])
def test_shards_on_s3_are_those_of_a_disk(files: Any, tmp_path: Path, pattern: str) -> None:
    shards(tmp_path)
    at = filled(files, tmp_path)
    here, there = (open_dataset(f"wds:{place}/{pattern}") for place in (tmp_path, at))
    assert there.identity() == here.identity()
    assert [there.encoded(i)[0] for i in range(len(there))] == [  # type: ignore[index]
        here.encoded(i)[0]  # type: ignore[index]
        for i in range(len(here))
    ]


def test_a_tar_file_on_s3_is_known_until_it_changes(files: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    cache = tmp_path / "hashes.sqlite"

    def identity(at: str) -> str:
        split = list_split(f"tar:{at}/images.tar", "validation", tmp_path)
        return identify(split, HashCache(cache), "content").digest

    for size in (1, 2):
        content = {"a/1.png": b"1" * size, "b/2.png": b"2"}
        write_tar(tmp_path / "data" / "images.tar", content)
        at = filled(files, tmp_path / "data")
        assert identity(at) == identity(str(tmp_path / "data"))


def test_a_server_that_is_gone_is_told_without_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "visible-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/val\.tar") as caught:
        open_dataset("tar:s3://bucket/val.tar")
    assert "topsecret" not in str(caught.value)
