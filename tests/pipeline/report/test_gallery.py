"""Images that an artifact answers otherwise than PyTorch."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.gallery import MOST_SHOWN, flipped
from pipeline.report.model import Run
from pipeline.stages.names import LABELS, LOGITS, PIXELS

COUNT = 600


@pytest.fixture
def there(run: Run, tmp_path: Path) -> Run:
    """A run whose images lie there; int8 answers the last 20 otherwise."""
    for name in ("samples", "pytorch", "ort-int8"):
        (tmp_path / "validate" / name).mkdir(parents=True)
    labels = np.arange(COUNT) % 10
    pixels = np.repeat(np.arange(COUNT) % 256, 28 * 28).astype(np.uint8).reshape(COUNT, 28, 28, 1)
    logits = np.eye(10, dtype=np.float32)[labels]
    np.save(tmp_path / "validate/samples" / PIXELS, pixels)
    np.save(tmp_path / "validate/samples" / LABELS, labels)
    np.save(tmp_path / "validate/pytorch" / LOGITS, logits)
    logits[-20:] = np.roll(logits[-20:], 1, 1)
    np.save(tmp_path / "validate/ort-int8" / LOGITS, logits)
    return replace(run, folder=str(tmp_path))


def test_both_answers_stand_beside_the_image(there: Run) -> None:
    (found,) = flipped(there)
    assert (found.name, found.count, len(found.images)) == ("ort/int8", 20, MOST_SHOWN)
    first = found.images[0]
    assert (first.truth, first.before, first.after) == ("class 0", "class 0", "class 1")
    content = base64.b64decode(first.source.partition(",")[2])
    picture = Image.open(io.BytesIO(content))
    assert (picture.size, picture.getpixel((3, 3))) == ((28, 28), 580 % 256)


def test_without_images_there_is_no_gallery(there: Run) -> None:
    (Path(there.folder) / "validate/samples" / PIXELS).unlink()
    assert flipped(there) == []


def test_arrays_of_other_images_give_no_gallery(there: Run) -> None:
    np.save(Path(there.folder) / "validate/ort-int8" / LOGITS, np.zeros((5, 10)))
    assert flipped(there) == []
    (Path(there.folder) / "validate/pytorch" / LOGITS).write_bytes(b"no array")
    assert flipped(there) == []
