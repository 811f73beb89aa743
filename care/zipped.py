"""Zip archives as `torch.save` writes them: each record is held against its CRC-32.

PyTorch itself does not look at it, so that a flipped bit in a tensor would load as another weight.
"""

from __future__ import annotations

import io
import zipfile
import zlib

from pipeline.core.words import shown

SIGNATURE = b"PK\x03\x04"

_PIECE = 1 << 20

# How zipfile meets damaged directories, and records that it cannot read.
_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    OSError,
)


def is_zip(data: bytes) -> bool:
    """Whether a file's content begins as such an archive does."""
    return data[: len(SIGNATURE)] == SIGNATURE


def why_damaged(data: bytes, most: int) -> str | None:
    """What is wrong with an archive; None if every record is as it was written.

    An archive that states no checksum at all, as `torch.save` writes it after
    `set_crc32_options(False)`, is only required to be readable.

    Args:
        data: The whole archive.
        most: Bytes that its records may have, unpacked and together.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            if sum(record.file_size for record in records) > most:
                return f"it unpacks to more than {most / 1e9:.3g} GB"
            if not any(record.CRC for record in records):
                return None
            damaged = next((r for r in records if not _is_whole(archive, r)), None)
    except _DAMAGES as error:
        return f"its directory is damaged: {' '.join(str(error).split())[:80]}"
    if damaged is None:
        return None
    return f"its record {shown(damaged.filename)} differs from its CRC-32"


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as stream:
            while stream.read(_PIECE):
                pass
    except _DAMAGES:
        return False
    return True
