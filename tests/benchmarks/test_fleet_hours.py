"""Hours on paper: the page's table is what the formulae give."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet_hours import EAGER_MS, EFFICIENCY, IMAGES, SHARD, STEP_S, Site, cost, rates, table

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_page_shows_what_is_computed() -> None:
    text = PAGE.read_text()
    shown = text.partition("<!-- fleet hours -->\n")[2].partition("\n<!-- end of fleet hours -->")[
        0
    ]
    assert shown == table()


def test_one_worker_does_all_of_it() -> None:
    seconds = IMAGES * sum(sum(each.values()) for each in rates().values())
    shards = len(EAGER_MS) * 7 * IMAGES / SHARD
    expected = seconds / (2 * EFFICIENCY) + shards * STEP_S
    assert cost(Site(1)).computing * 3600 == pytest.approx(expected)


def test_workers_share_computing_alone() -> None:
    one, eight, many = (cost(Site(count)) for count in (1, 8, 1000))
    assert eight.computing == pytest.approx(one.computing / 8, rel=0.01)
    assert eight.alone == one.alone == many.alone
    assert many.computing < eight.computing < one.computing
    assert many.terabytes > eight.terabytes > one.terabytes
    assert many.moving > 10 * cost(Site(1000, store=400e9)).moving
    assert one.orders == many.orders == 4 * 7 * 51
