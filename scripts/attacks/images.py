"""Images: whole files of every format with a few bytes changed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from attacks.attempt import Attempt
from pipeline.core.preprocess import FORMATS, Preprocess, decode

SPEC = Preprocess(16, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
MODES = {"RGB": FORMATS, "L": FORMATS, "P": ("PNG", "GIF", "BMP", "TIFF"), "CMYK": ("JPEG", "TIFF")}
OTHERS = {"RGBA": ("PNG", "WEBP", "TIFF"), "I;16": ("PNG", "TIFF"), "1": ("PNG", "BMP", "TIFF")}


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Images with one to twenty bytes replaced, or cut off."""
    del folder
    rng = np.random.default_rng(seed)
    whole = [
        (f"{mode} {kind}", encoded(rng, mode, kind))
        for mode, kinds in {**MODES, **OTHERS}.items()
        for kind in kinds
    ]
    for number in range(count):
        name, data = whole[number % len(whole)]
        yield Attempt(f"{name} {number}", partial(run, damaged(rng, data)))
    for data in (b"", b"\0", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%!PS"):
        yield Attempt(repr(data), partial(run, data), hostile=True)


def run(data: bytes) -> None:
    """Decode and preprocess."""
    SPEC(decode(data, "odd image"))


def encoded(rng: np.random.Generator, mode: str, kind: str) -> bytes:
    """A small image of noise."""
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16))
    buffer = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


def damaged(rng: np.random.Generator, whole: bytes) -> bytes:
    """A file with some bytes replaced, more of them near the beginning; or cut short."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 20)):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
        data[rng.integers(reach)] = rng.integers(256)
    if rng.random() < 0.1:
        del data[rng.integers(len(data)) :]
    return bytes(data)
