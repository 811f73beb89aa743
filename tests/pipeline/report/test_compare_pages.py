from __future__ import annotations

import html
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.report import compare_pages as pages
from pipeline.report.compare import ChangedImage
from pipeline.report.html import policy
from tests.pipeline.report.test_compare import compared, pair

ODD = ChangedImage(0, "<b>|a.png", "cat", "cat", "<script>")


def test_the_table_says_what_is_proven() -> None:
    text = pages.text(compared(pair(), versions={"onnx": ("1", "2")}, machines=("x", "y")))
    for part in (
        "90.00 → 80.00",
        "+10.00 (+2.00 to +18.00)",
        "worse",
        "size of ort/int8: 2.00 → 1.00 MB",
    ):
        assert part in text
    assert "onnx: 1 → 2" in text
    assert "machines: x → y" in text
    assert "no regression is proven" in pages.text(compared(pair(interval=(-0.1, 0.1))))


def test_latency_of_two_runs_is_not_compared() -> None:
    assert "latency is not comparable" in pages.text(compared(pair(latency=(1.0, 2.0))))
    assert "latency" not in pages.text(compared(pair(latency=(1.0, None))))


def test_operations_that_changed_are_told_by_kind() -> None:
    before, after = {"conv": 70, "add": 31}, {"conv": 72, "add": 31, "gather": 1}
    words = "operations of ort/int8: 101 → 104 (conv 70 → 72, gather 0 → 1)"
    assert words in " ".join(pages.text(compared(pair(operations=(before, after)))).split())
    assert words in pages.markdown(compared(pair(operations=(before, after))))
    for nothing in ((before, before), (before, {}), ({}, after)):
        assert "operations" not in pages.text(compared(pair(operations=nothing)))


def test_markdown_escapes_what_would_be_a_cell_or_a_tag() -> None:
    shown = pages.markdown(compared(pair(name="a|b<c")))
    assert "a\\|b&lt;c" in shown
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 3


def test_junit_fails_where_a_regression_is_proven() -> None:
    tree = ElementTree.fromstring(
        pages.junit(
            compared(
                pair(),
                pair(name="b", interval=(-0.1, 0.1)),
                pair(name="c", drop=None, interval=None, why_not="other images"),
            )
        )
    )
    assert (tree.get("tests"), tree.get("failures")) == ("3", "1")
    assert [case.get("name") for case in tree if case.find("failure") is not None] == ["ort/int8"]
    skipped = tree.find("testcase[@name='c']/skipped")
    assert skipped is not None
    assert skipped.get("message") == "other images"


def test_the_page_shows_changed_images_and_escapes_names() -> None:
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    page = pages.html(compared(pair(changed=(ODD,))), pixels)
    assert page.count("data:image/png;base64,") == 1
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert pages.html(compared(pair(changed=(ODD,))), None).count("<img") == 0


def test_the_page_runs_nothing() -> None:
    page = pages.html(compared(pair(changed=(ODD,))), None)
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    assert html.unescape(page).count(f'content="{policy(style)}"') == 1
    assert "script-src" not in page


def test_the_page_shows_so_many_and_says_of_how_many() -> None:
    many = tuple(ChangedImage(i, f"{i}.png", "cat", "cat", "dog") for i in range(100))
    page = pages.html(compared(pair(changed=many)), np.zeros((100, 8, 8, 1), np.uint8))
    assert page.count("<img") == pages.MOST_SHOWN
    assert f"The first {pages.MOST_SHOWN} of 100" in page


@pytest.mark.parametrize("make", [pages.markdown, pages.junit, lambda c: pages.html(c, None)])
def test_files_carry_a_mark(make: object, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(make(compared(pair())))  # type: ignore[operator]
    assert pages.is_ours(path)
    path.write_text("somebody's notes")
    assert not pages.is_ours(path)
