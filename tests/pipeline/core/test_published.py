from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.core.published import DEVICES, PUBLISHED, Published

README = (Path(__file__).parents[3] / "README.md").read_text()


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.title)
def test_the_readme_shows_the_same_figures(row: Published) -> None:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row.title} ")]
    figures = [float(cell) for cell in re.findall(r"[0-9.]+", line.split("|", 2)[2])]
    latencies = [row.latency_ms[device] for device in DEVICES]
    assert figures == [row.gmacs, row.parameters, *latencies, row.top1]
