"""What was seen of a part of the calibration images, as files: exact, so that parts can be merged.

    write_part(folder, observe(graph, images, between=(0, 256)))
    merge([read_part(folder), …])   # to the bit what was seen of all of them

observed.json   for every tensor its extremes, as hexadecimal floats, and where its bins begin
counts.npy      the counts of all histograms, one after the other
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.histogram import Doubles, Histogram
from calibration.observe import Statistics
from pipeline.core.errors import ArtifactError
from pipeline.core.plain import read_json

OBSERVED, COUNTS = "observed.json", "counts.npy"


def write_part(folder: Path, statistics: Mapping[str, Statistics]) -> None:
    """Write what was seen.

    Args:
        folder: Where to; it is there.
        statistics: See `calibration.observe.observe`.
    """
    entries = [_entry(seen) for seen in statistics.values()]
    (folder / OBSERVED).write_text(json.dumps(entries) + "\n")
    counts = [seen.histogram.counts for seen in statistics.values()]
    np.save(folder / COUNTS, np.concatenate([np.zeros(0, np.int64), *counts]))


def read_part(folder: Path) -> dict[str, Statistics]:
    """The inverse of `write_part`.

    Raises:
        ArtifactError: It is not there, or damaged.
    """
    try:
        entries = read_json(folder / OBSERVED)
        counts = np.load(folder / COUNTS)
        found: dict[str, Statistics] = {}
        start = 0
        for entry in entries:
            end = start + int(entry["bins"])
            if not start <= end <= len(counts):
                raise ValueError("it holds other counts than it says")
            found[str(entry["name"])] = _statistics(entry, counts[start:end])
            start = end
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ArtifactError(f"{folder} holds no part of a calibration: {error}") from error
    if start != len(counts):
        raise ArtifactError(f"{folder} is damaged: it holds counts of no tensor")
    return found


def _entry(seen: Statistics) -> dict[str, Any]:
    histogram = seen.histogram
    return {
        "name": seen.name,
        "axis": seen.axis,
        "low": histogram.low.hex(),
        "high": histogram.high.hex(),
        "exponent": histogram.exponent,
        "first": histogram.first,
        "bins": len(histogram.counts),
        "nan": seen.nan,
        "infinite": seen.infinite,
        "channel_low": _as_hex(seen.channel_low),
        "channel_high": _as_hex(seen.channel_high),
    }


def _statistics(entry: Mapping[str, Any], counts: Any) -> Statistics:
    seen = Statistics(str(entry["name"]), entry["axis"])
    low, high = float.fromhex(entry["low"]), float.fromhex(entry["high"])
    exponent, first = int(entry["exponent"]), int(entry["first"])
    seen.histogram = Histogram.restored(low, high, exponent, first, counts)
    seen.nan, seen.infinite = int(entry["nan"]), int(entry["infinite"])
    seen.channel_low = _from_hex(entry["channel_low"])
    seen.channel_high = _from_hex(entry["channel_high"])
    return seen


def _as_hex(values: Doubles | None) -> list[str] | None:
    return None if values is None else [float(value).hex() for value in values]


def _from_hex(values: list[str] | None) -> Doubles | None:
    return None if values is None else np.array([float.fromhex(value) for value in values])
