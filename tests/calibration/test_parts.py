"""Parts of a calibration as files: what is read back merges as if it had never been written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.observe import Statistics, merge, observe_callable
from calibration.parts import COUNTS, OBSERVED, read_part, write_part
from pipeline.core.errors import ArtifactError

IMAGES = np.random.default_rng(0).standard_normal((40, 3, 4, 4)).astype(np.float32)
IMAGES[3, 0, 0, 0], IMAGES[4, 1, 0, 0] = np.nan, np.inf


def seen(between: tuple[int, int | None] = (0, None)) -> dict[str, Statistics]:
    def run(images: Any) -> dict[str, Any]:
        with np.errstate(invalid="ignore"):
            return {"whole": images, "large": 1e6 * images, "zero": 0 * np.nan_to_num(images)}

    return observe_callable(run, IMAGES, channels={"whole": 1}, between=between)


def plain(statistics: dict[str, Statistics]) -> dict[str, Any]:
    """All that a statistic holds, to the bit."""
    return {
        name: (
            each.axis,
            each.nan,
            each.infinite,
            *(float(value).hex() for value in (each.low, each.high, each.histogram.width)),
            each.histogram.edges.tobytes(),
            each.histogram.counts.tobytes(),
            None if each.channel_low is None else each.channel_low.tobytes(),
            None if each.channel_high is None else each.channel_high.tobytes(),
        )
        for name, each in statistics.items()
    }


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    whole = seen()
    assert whole["whole"].nan == whole["whole"].infinite == 1
    write_part(tmp_path, whole)
    assert plain(read_part(tmp_path)) == plain(whole)


def test_parts_merge_to_the_bit_in_any_order(tmp_path: Path) -> None:
    parts = []
    for number, between in enumerate([(32, None), (0, 16), (16, 32)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_part(folder, seen(between))
        parts.append(read_part(folder))
    assert plain(merge(parts)) == plain(seen())


def test_a_part_without_values_adds_nothing(tmp_path: Path) -> None:
    nothing = {name: Statistics(name, each.axis) for name, each in seen().items()}
    write_part(tmp_path, nothing)
    assert plain(merge([read_part(tmp_path), seen()])) == plain(seen())


@pytest.mark.parametrize("damage", ["missing", "other", "short", "long", "bins"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    write_part(tmp_path, seen())
    counts = np.load(tmp_path / COUNTS)
    if damage == "missing":
        (tmp_path / COUNTS).unlink()
    elif damage == "other":
        (tmp_path / OBSERVED).write_text('[{"name": "whole"}]')
    elif damage == "bins":
        text = (tmp_path / OBSERVED).read_text()
        (tmp_path / OBSERVED).write_text(text.replace('"bins": ', '"bins": -'))
    else:
        np.save(tmp_path / COUNTS, counts[:-1] if damage == "short" else np.append(counts, 1))
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read_part(tmp_path)
