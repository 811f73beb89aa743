"""Tar files: headers with bytes replaced, sizes that cannot be, members that are no files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from attacks import ground
from attacks.attempt import Attempt
from attacks.images import encoded
from care.data import open_dataset

FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "time": (136, 12),
    "type": (156, 1),
}
SIZES = (
    *(
        b"00000000000\0",
        b"77777777777\0",
        b"99999999999\0",
        b"-0000000001\0",
        b"\x80" + b"\xff" * 11,
    ),
    *(b"\xff" * 12, b"\x80" + bytes(10) + b"\1", b" " * 12, b"\0" * 12, b"0x1\0" + bytes(8)),
)
PAX = (
    *({"size": "abc"}, {"size": "-1"}, {"size": "9" * 30}, {"size": "1e400"}, {"mtime": "nan"}),
    *(
        {"mtime": "x"},
        {"uid": "9" * 5000},
        {"path": "a" * 5000},
        {"path": "../x.png"},
        {"path": ""},
    ),
    *(
        {"GNU.sparse.map": "1,2,3"},
        {"GNU.sparse.size": "x"},
        {"hdrcharset": "x"},
        {"path": "\x1b/x.png"},
    ),
)


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Archives of images in class folders, damaged in many ways."""
    for name, data in inputs(seed, count):
        yield made(folder, name, data)
    for uri in ("tar:/dev/zero", "tar:a\0b", f"tar:{300 * 'x'}", "wds:{0..99999999999}", "wds:/**"):
        yield Attempt(uri[:40], partial(open_dataset, uri), hostile=True)
    for pattern in (
        "{0..9}{0..999999999}",
        "{",
        "{a",
        "a}",
        "{{a}}",
        "*[",
        "~nobody-at-all/x",
        "a\0",
    ):
        yield Attempt(f"wds:{pattern}", partial(open_dataset, f"wds:{pattern}"), hostile=True)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """As many of them, random and listed, through the real command."""
    ground.lay_out(folder)
    path = folder / "odd.tar"
    every = list(inputs(seed, count))
    listed = np.random.default_rng(seed).permutation(np.arange(count, len(every)))
    chosen = [*range(count - count // 2), *listed[: count // 2]]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        ground.look_at(folder, ground.LOOKED_AT % ("random", f"tar:{path.name}"))

    for index in chosen:
        name, data = every[index]
        yield Attempt(name, partial(run, data))


def inputs(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Archives: `count` random ones, then all that are listed."""
    rng = np.random.default_rng(seed)
    image = encoded(rng, "RGB", "PNG")
    whole = {kind: archive(image, kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)}
    whole[tarfile.PAX_FORMAT] = archive(image, tarfile.PAX_FORMAT, {"comment": "x"})
    for number in range(count):
        data = whole[list(whole)[number % len(whole)]]
        yield f"mutation {number}", damaged(rng, data, repaired=number % 2 == 0)
    ustar = whole[tarfile.USTAR_FORMAT]
    for size in SIZES:
        yield f"size {size!r}", changed(ustar, "size", size)
    for code in range(256):
        yield f"type {code}", changed(ustar, "type", bytes([code]))
    for headers in PAX:
        name = f"extended header {headers!r:.60}"
        yield name, archive(image, tarfile.PAX_FORMAT, headers)
    for name in ("a", "/a/b.png", "a/b.png/c.png", "\x1b[2J/x.png", "a/" * 40 + "x.png", "ä/x.png"):
        yield f"name {name[:30]!r}", archive(image, names=(name,))
    for length in (0, 1, 511, 512, 1024, len(ustar) // 2):
        yield f"{length} bytes", ustar[:length]


def made(folder: Path, name: str, data: bytes) -> Attempt:
    """Open an archive as a dataset, and as a shard, and read all its images."""
    path = folder / "odd.tar"

    def run() -> None:
        path.write_bytes(data)
        dataset = open_dataset(f"tar:{path}")
        for index in range(len(dataset)):
            dataset.image(index)

    return Attempt(name, run)


def archive(
    image: bytes,
    kind: int = tarfile.USTAR_FORMAT,
    headers: dict[str, str] | None = None,
    names: tuple[str, ...] = ("a/1.png", "a/2.png", "b/1.png"),
) -> bytes:
    """A tar file of images."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(image)
            member.pax_headers = dict(headers or {})
            tar.addfile(member, io.BytesIO(image))
    return buffer.getvalue()


def damaged(rng: np.random.Generator, whole: bytes, *, repaired: bool) -> bytes:
    """An archive with bytes of its headers replaced, with a checksum that fits or not."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 8)):
        block = 512 * int(rng.integers(len(data) // 512))
        start, length = list(FIELDS.values())[rng.integers(len(FIELDS))]
        data[block + start + rng.integers(length)] = rng.integers(256)
        if repaired:
            _sum(data, block)
    return bytes(data)


def changed(whole: bytes, field: str, value: bytes) -> bytes:
    """An archive whose first header has another value, with a checksum that fits."""
    data = bytearray(whole)
    start, length = FIELDS[field]
    data[start : start + length] = value[:length].ljust(length, b"\0")
    _sum(data, 0)
    return bytes(data)


def _sum(data: bytearray, block: int) -> None:
    header = data[block : block + 512]
    header[148:156] = b" " * 8
    data[block + 148 : block + 156] = b"%06o\0 " % sum(header)
