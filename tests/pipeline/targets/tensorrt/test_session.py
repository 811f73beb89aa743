"""What TensorRT-RTX compiled on the GPU: kept, verified, ignored where it was changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.targets.tensorrt.api import Library
from pipeline.targets.tensorrt.session import Session, digest_path

Start = Callable[[], list[str]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "fp16-sm89.cache"


@pytest.fixture(params=["tensorrt_rtx"])
def library(
    request: pytest.FixtureRequest,
    cuda: Any,
    fake_library: Callable[..., Library],
    monkeypatch: pytest.MonkeyPatch,
) -> Library:
    monkeypatch.setattr("pipeline.targets.tensorrt.builder._LOGGERS", {})
    return fake_library(cuda, request.param, (3, 2, 2), 4)


@pytest.fixture
def start(library: Library, cache: Path) -> Start:
    """Opens and closes a session; gives what it said."""

    def run() -> list[str]:
        lines: list[str] = []
        engine = cache.with_name("model.engine")
        Session(library, b"engine", engine, cache=cache, log=lines.append).close()
        return lines

    return run


def test_kernels_compiled_on_the_gpu_are_kept(start: Start, library: Library, cache: Path) -> None:
    assert start() == []
    assert cache.read_bytes() == b"compiled"
    digest = hashlib.sha256(b"compiled").hexdigest()
    assert digest_path(cache).read_text() == f"{digest}  fp16-sm89.cache\n"
    assert library.module.caches_read == []
    assert start() == []
    assert library.module.caches_read == [b"compiled"]
    assert library.module.config.cuda_graph_strategy == "whole"
    assert library.module.config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert sorted(cache.parent.iterdir()) == [cache, digest_path(cache)]


@pytest.mark.parametrize("library", ["tensorrt"], indirect=True)
def test_full_tensorrt_compiles_nothing(start: Start, cache: Path) -> None:
    assert start() == []
    assert list(cache.parent.iterdir()) == []


def flip_a_bit(cache: Path) -> None:
    cache.write_bytes(b"compileD")


def truncate(cache: Path) -> None:
    cache.write_bytes(b"")


def take_the_digest(cache: Path) -> None:
    digest_path(cache).unlink()


def cut_the_digest(cache: Path) -> None:
    path = digest_path(cache)
    path.write_text(path.read_text()[:10])


def take_the_digest_of_another(cache: Path) -> None:
    path = digest_path(cache)
    path.write_text(path.read_text().replace("sm89", "sm86"))


def damage_the_digest(cache: Path) -> None:
    digest_path(cache).write_bytes(b"\xff\x00")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        truncate,
        take_the_digest,
        cut_the_digest,
        take_the_digest_of_another,
        damage_the_digest,
    ],
)
def test_what_is_not_what_was_written_is_ignored(
    start: Start, library: Library, cache: Path, damage: Callable[[Path], None]
) -> None:
    start()
    damage(cache)
    assert start() == [
        f"{cache} does not match fp16-sm89.cache.sha256: ignored, compiling anew",
    ]
    assert library.module.caches_read == [], "the library never saw it"
    assert start() == [], "it was written anew"
    assert library.module.caches_read == [b"compiled"]


def test_a_cache_of_another_driver(start: Start, library: Library, cache: Path) -> None:
    content = b"of another driver"
    cache.write_bytes(content)
    digest_path(cache).write_text(f"{hashlib.sha256(content).hexdigest()}  {cache.name}\n")
    assert start() == [f"{cache} is of another GPU, driver or version: compiling anew"]
    assert library.module.caches_read == [content]
    assert cache.read_bytes() == b"compiled"


def test_a_cache_that_cannot_be_read(
    start: Start, library: Library, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert start() == [f"{cache} cannot be read (Permission denied): compiling anew"]
    assert library.module.caches_read == []


def test_a_cache_that_cannot_be_kept_costs_no_result(
    start: Start, cuda: Any, library: Library, cache: Path
) -> None:
    cache.mkdir()
    (cache / "mine").write_text("somebody's")
    said = start()
    assert len(said) == 1
    assert said[0].startswith(f"what was compiled on the GPU is not kept: {cache} is in the way")
    assert (cache / "mine").read_text() == "somebody's"
    assert cuda.calls == ["engine freed"]


def test_a_stop_between_cache_and_digest(
    start: Start, library: Library, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    digest_path(cache).write_text("")
    written: list[Path] = []

    def stop(path: Path, content: str | bytes) -> None:
        written.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.targets.tensorrt.session.write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert written == [cache]
    assert start() == [f"{cache} does not match fp16-sm89.cache.sha256: ignored, compiling anew"]
    assert library.module.caches_read == []
