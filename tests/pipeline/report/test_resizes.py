"""What other ways of preparing images cost, in reports."""

from __future__ import annotations

import dataclasses

from pipeline.core.figures import Number, State
from pipeline.report import resizes
from pipeline.report.html import page as html_page
from pipeline.report.markdown import page as markdown_page
from pipeline.report.model import Part, Run
from pipeline.report.terminal import summary
from pipeline.steps.facts.resizes import ResizesFacts, WayCost


def number(value: float, interval: tuple[float, float] | None = None) -> Number:
    return Number(value, State.MEASURED, by="a toy", samples=100, interval=interval)


NONE = Number.not_measured("nothing")


def cost(name: str, lost: float, interval: tuple[float, float]) -> WayCost:
    return WayCost(name, name, 100, 2.5, number(0.9), number(lost, interval), number(0.95))


FACTS = ResizesFacts(
    "pytorch",
    "a toy",
    "Pillow, bicubic",
    100,
    1000,
    0,
    number(0.95),
    (
        cost("a cheap one", 0.001, (-0.01, 0.012)),
        cost("a dear one", 0.05, (0.02, 0.08)),
        WayCost("x", "one for <JPEG>", 0, 0.0, NONE, NONE, NONE, "no image is a JPEG"),
    ),
)


def with_resizes(run: Run, facts: ResizesFacts = FACTS, made_from: str = "c0ffee") -> Run:
    reference = run.reference
    assert reference is not None
    part = Part("resizes/pytorch", True, 1, "d", "k", {}, {"checkpoint": made_from}, {}, 1.0, facts)
    return dataclasses.replace(
        run,
        resizes=(part,),
        reference=dataclasses.replace(reference, made_from={"checkpoint": "c0ffee"}),
    )


def test_the_table_has_a_row_for_what_means_something(run: Run) -> None:
    ((grid, nothing),) = resizes.tables(with_resizes(run))
    assert [row[0] for row in grid.rows] == [
        "the network's own preprocessing",
        "a cheap one",
        "a dear one",
    ]
    assert grid.rows[2][1:] == (
        "100",
        "2.50",
        "90.00 %",
        "5.00 (2.00 to 8.00)",
        "95.00 %",
        "worse, beyond doubt",
    )
    assert grid.rows[1][-1] == "no difference shown"
    assert nothing == ["means nothing here: one for <JPEG>: no image is a JPEG"]
    assert grid.title.startswith("pytorch, 100 of 1,000 images, against its own")


def test_every_report_has_it(run: Run) -> None:
    found = with_resizes(run)
    html, markdown = html_page(found), markdown_page(found)
    assert 'id="resizes"' in html
    for page in (html, markdown):
        assert "5.00 (2.00 to 8.00)" in page
        assert "one for &lt;JPEG>" in page or "one for &lt;JPEG&gt;" in page
    assert "most is lost by a dear one: 5.00 points (2.00 to 8.00 points)" in " ".join(
        summary(found).split()
    )
    assert 'id="resizes"' not in html_page(run)
    assert "Other ways" not in markdown_page(run)


def test_figures_of_another_checkpoint_are_marked(run: Run) -> None:
    found = with_resizes(run, made_from="decaf")
    ((grid, _),) = resizes.tables(found)
    assert grid.title.endswith(
        "OUTDATED: of an earlier checkpoint: run python -m pipeline resizes again"
    )
    assert list(resizes.lines(found)) == []


def test_images_that_need_no_resize_are_told() -> None:
    assert "no filter does anything" in resizes.words(dataclasses.replace(FACTS, fitting=100))
    assert "7 of them have that size already" in resizes.words(
        dataclasses.replace(FACTS, fitting=7)
    )


def test_results_hold_what_lies_there(run: Run) -> None:
    found = with_resizes(run)
    assert Run.from_dict(found.to_dict(), "results.json") == found
