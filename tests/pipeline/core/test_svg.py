from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from pipeline.core import plots, svg
from pipeline.core.plots import Curve, Point, Words
from pipeline.core.svg import Box, Scale

WORDS = Words("title", "description", "x (ms)", "y (%)")


def test_text_and_attributes_are_escaped() -> None:
    made = svg.label(1, 2, "<b>&", class_='a"b')
    assert made == '<text x="1" y="2" text-anchor="start" class="a&quot;b">&lt;b&gt;&amp;</text>'


def test_element_leaves_out_none_and_names_attributes() -> None:
    assert svg.element("g", class_="c", stroke_width=1.25, id=None) == (
        '<g class="c" stroke-width="1.2"/>'
    )


@pytest.mark.parametrize(("value", "text"), [(1.0, "1"), (1.26, "1.3"), (-0.01, "0"), (10, "10")])
def test_pixels(value: float, text: str) -> None:
    assert svg.pixels(value) == text


def test_scale_maps_ends_and_stays_within() -> None:
    scale = Scale(0, 10, 100, 200)
    assert [scale(v) for v in (0, 5, 10, 20, -3)] == [100, 150, 200, 200, 100]


def test_logarithmic_scale_gives_equal_ratios_equal_lengths() -> None:
    scale = Scale(1, 100, 0, 200, log=True)
    assert scale(10) == pytest.approx(100)


def test_ticks_are_round_and_within() -> None:
    assert Scale(0.1, 1.02, 0, 100).ticks() == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(88.7, 91.3, 0, 100).ticks() == [89.0, 89.5, 90.0, 90.5, 91.0]
    assert Scale(0.5, 200, 0, 100, log=True).ticks() == [1, 3, 10, 30, 100]


def test_the_last_tick_is_not_cut_off_at_the_right_edge() -> None:
    """As in a training of 12,000 steps: the text of the last tick is wider than the margin."""
    plot = Box(48, 24, 450, 206)
    made = svg.axes(plot, Scale(0, 12000, 48, 450), Scale(0, 1, 206, 24), "steps", "loss")
    texts = re.findall(r'<text x="([\d.]+)" y="222" text-anchor="middle"[^>]*>([\d,]+)<', made)
    assert texts[-1][1] == "12,000"
    ends = [float(x) + svg.CHARACTER * len(text) / 2 for x, text in texts]
    assert max(ends) <= plot.right + svg.MARGIN
    starts = [float(x) - svg.CHARACTER * len(text) / 2 for x, text in texts]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1.0001), (3, 4), (0.001, 0.0012), (1e-9, 1e9), (7, 7000)]
)
@pytest.mark.parametrize("log", [False, True])
def test_every_scale_has_some_ticks(low: float, high: float, log: bool) -> None:
    ticks = Scale(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 20
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)


def test_scale_of_one_value_of_none_and_of_infinite_ones() -> None:
    for values in ([5.0], [], [math.inf, math.nan], [0.0, 0.0]):
        scale = svg.scale(values, 0, 100)
        assert scale.low < scale.high
    assert svg.scale([2.0], 0, 100, log=True).log
    assert not svg.scale([0.0, 2.0], 0, 100, log=True).log


def test_scale_does_not_pad_beyond_what_is_possible() -> None:
    assert svg.scale([0.0, 1.0], 0, 100, limits=(0, math.inf)).low == 0


def test_boxes() -> None:
    box = Box(0, 0, 10, 10)
    assert box.overlap(Box(5, 5, 20, 20)) == 25
    assert box.overlap(Box(20, 0, 30, 10)) == 0
    assert box.holds(Box(1, 1, 9, 9))
    assert not box.holds(Box(1, 1, 11, 9))


def test_labels_avoid_each_other() -> None:
    plot, taken = Box(0, 0, 400, 400), [Box(195, 195, 205, 205)]
    for _ in range(8):
        box, _ = svg.place("trt/fp16", 200, 200, plot, taken)
        assert all(box.overlap(other) == 0 for other in taken)
        assert plot.holds(box)
        taken.append(box)


def test_label_stays_inside_at_the_edge() -> None:
    plot = Box(0, 0, 100, 100)
    box, anchor = svg.place("abcdefgh", 95, 50, plot, [])
    assert anchor == "end"
    assert plot.holds(box)


@pytest.mark.parametrize(
    ("wanted", "heights"),
    [
        ([50.0], [50]),
        ([50.0, 52, 90], [44.5, 57.5, 90]),
        ([95.0, 96, 97], [74, 87, 100]),
        ([-20.0, 300], [0, 100]),
        ([], []),
    ],
)
def test_lines_of_text_are_spread(wanted: list[float], heights: list[float]) -> None:
    assert svg.spread(wanted, 0, 100) == heights


def test_too_many_lines_come_closer() -> None:
    heights = svg.spread([50.0] * 21, 0, 100)
    assert heights == pytest.approx([5.0 * i for i in range(21)])


@pytest.mark.parametrize("shape", [*svg.MARKERS, "cross"])
def test_markers_are_elements(shape: str) -> None:
    assert ElementTree.fromstring(svg.marker(shape, 5, 5, "mark")).get("class") == "mark"


def test_scatter_tells_measured_from_emulated_and_sets_missing_aside() -> None:
    points = [
        Point("a", 1.0, 90.0, plots.MEASURED, 0, (0.9, 1.1), (89.0, 91.0)),
        Point("b", None, 88.0, plots.EMULATED, 1),
        Point("c", 3.0, 80.0, plots.PUBLISHED, 5),
    ]
    made = plots.scatter("plot", points, WORDS)
    root = ElementTree.fromstring(made)
    assert root.get("role") == "img"
    kinds = [str(e.get("class")) for e in root if str(e.get("class", "")).startswith("mark")]
    assert sorted(kind.split()[1] for kind in kinds) == ["emulated", "measured", "published"]
    assert made.count('class="interval') == 2
    assert 'class="aside"' in made
    assert ">not measured<" in made


def test_scatter_without_any_x() -> None:
    points = [Point(f"p{i}", None, 88.0 + i, plots.EMULATED, i) for i in range(4)]
    made = plots.scatter("plot", points, WORDS)
    ElementTree.fromstring(made)
    assert "x (ms)" not in made


def test_scatter_of_a_single_point() -> None:
    ElementTree.fromstring(plots.scatter("p", [Point("a", 1, 50, "measured", 0)], WORDS, log=True))


def test_ecdf_ends_at_all_calls_and_drops_none() -> None:
    made = plots.ecdf("plot", [Curve("a", [3.0, 1.0, 2.0, 50.0], 0)], WORDS)
    path = re.search('<path d="(.*?)"', made)
    assert path
    heights = [float(y) for y in re.findall(r"V([\d.]+)", path[1])]
    assert heights == sorted(heights, reverse=True)
    assert len(heights) == 4
    assert heights[-1] == 24  # the top of the plot
    assert "logarithmic" in made


def test_long_ecdf_keeps_both_ends_and_stays_small() -> None:
    samples = [1 + i / 10_000 for i in range(10_000)]
    made = plots.ecdf("plot", [Curve("a", samples, 0)], WORDS)
    assert len(made) < 15_000
    assert "V24" in made


def test_histogram_marks_the_chosen_range() -> None:
    made = plots.histogram("h", [0, 4, 100, 1], (-2.0, 2.0), (-1.0, 2.0))
    root = ElementTree.fromstring(made)
    (bars,) = root.findall("path")
    # A bar for each part with values, from the bottom up; that of most values fills the height.
    assert re.findall(r"M(\S+) 26v(\S+)h39.4V26z", bars.attrib["d"]) == [
        ("40", "-9.1"),
        ("80", "-26"),
        ("120", "-3.9"),
    ]
    assert len(root.findall("line")) == 1  # the other end is that of what was seen


def test_histogram_of_a_constant() -> None:
    ElementTree.fromstring(plots.histogram("h", [10], (1.0, 1.0), (1.0, 1.0)))
