from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

import pytest
import torch

from care import zipped

MOST = 10**9


@pytest.fixture(scope="module")
def whole() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(1000.0), "b": torch.ones(3)}, buffer)
    return buffer.getvalue()


@pytest.fixture
def without_checksums() -> Iterator[bytes]:
    torch.serialization.set_crc32_options(False)
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(1000.0)}, buffer)
    yield buffer.getvalue()
    torch.serialization.set_crc32_options(True)


def place_of(data: bytes, record: str) -> int:
    """Where the content of a stored record begins."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.getinfo(record).header_offset
    name, extra = (int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28))
    return start + 30 + name + extra


def test_a_whole_archive(whole: bytes) -> None:
    assert zipped.is_zip(whole)
    assert not zipped.is_zip(b"PK")
    assert zipped.why_damaged(whole, MOST) is None


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize(("record", "offset"), [("archive/data/0", 7), ("archive/data/1", 11)])
def test_a_flipped_bit_is_found_and_its_record_named(
    whole: bytes, record: str, offset: int, bit: int
) -> None:
    damaged = bytearray(whole)
    damaged[place_of(whole, record) + offset] ^= 1 << bit
    assert (
        zipped.why_damaged(bytes(damaged), MOST) == f"its record {record} differs from its CRC-32"
    )


def test_a_damaged_directory_is_an_answer_too(whole: bytes) -> None:
    assert str(zipped.why_damaged(whole[:-30], MOST)).startswith("its directory is damaged: ")


def test_an_archive_without_checksums_is_only_read(without_checksums: bytes) -> None:
    assert zipped.why_damaged(without_checksums, MOST) is None


def test_what_it_would_unpack_to_is_limited() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(10**6))
    assert len(buffer.getvalue()) < 10**4
    assert zipped.why_damaged(buffer.getvalue(), 10**6) is None
    assert zipped.why_damaged(buffer.getvalue(), 10**6 - 1) == "it unpacks to more than 0.001 GB"


def test_names_out_of_an_archive_are_printable() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("\x1b[2Jx", b"abcdef")
    damaged = buffer.getvalue().replace(b"abcdef", b"abcdeg")
    assert zipped.why_damaged(damaged, MOST) == "its record \\x1b[2Jx differs from its CRC-32"
