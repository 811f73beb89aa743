from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipeline.core.figures import Number
from pipeline.report import charts
from pipeline.report.charts import Plot
from pipeline.report.model import Run
from pipeline.steps.facts.accuracy import Accuracy
from pipeline.steps.facts.graphs import TriedCompression
from tests.pipeline.report.changed import measured_of, with_artifact, with_build, with_measured

DISTRIBUTIONS = ["Latency distribution, ort, batch 1", "Latency distribution, ort, batch 8"]


def titles(run: Run) -> list[str]:
    return [plot.title for plot in charts.all_plots(run)]


def plot(run: Run, title: str) -> Plot:
    return next(plot for plot in charts.all_plots(run) if plot.title == title)


def description(plot: Plot) -> str:
    found = re.search("<desc[^>]*>(.*?)</desc>", plot.svg, re.DOTALL)
    assert found
    return found[1]


def test_plots_for_which_there_are_figures(run: Run, nothing: Run) -> None:
    both = ["Accuracy against latency", "Accuracy against size"]
    assert titles(run) == [*both, *DISTRIBUTIONS]
    assert titles(nothing) == []


def test_accuracy_against_latency(run: Run) -> None:
    found = plot(run, "Accuracy against latency")
    told = description(found)
    assert "trt/fp16: 90.50 %, not measured (emulated)" in told
    assert re.search(r"ort/int8: 88\.83 % at 0\.\d+ ms", told)
    assert re.search(r"PyTorch: 90\.33 % at 2\.\d+ ms", told)
    assert "coreml" not in told
    assert "median latency (ms), batch 1" in found.svg
    assert "Artifacts whose latency was not measured stand aside." in found.caption
    assert "Measured on: Test runtime 1.0, 2 threads, Test CPU." in found.caption
    assert "Latencies of different devices" not in found.caption


def test_devices_that_do_not_compare_are_told(run: Run) -> None:
    both = replace(run, bench={**run.bench, "trt": run.bench["ort"]})
    caption = plot(both, "Accuracy against latency").caption
    assert "Latencies of different devices do not compare" in caption


def test_without_latencies_the_title_says_so(run: Run) -> None:
    run = replace(run, bench=dict.fromkeys(run.bench))
    for name in ("ort/fp32", "ort/int8"):
        run = with_artifact(run, name, latency=Number.not_measured("no bench", unit="ms"))
    assert titles(run) == ["Accuracy; no latency was measured", "Accuracy against size"]


def test_what_has_no_accuracy_has_no_point(run: Run) -> None:
    run = with_artifact(run, "ort/int8", accuracy=Accuracy.not_measured("not validated"))
    assert "ort/int8" not in description(plot(run, "Accuracy against latency"))
    assert "ort/int8" not in description(plot(run, "Accuracy against size"))
    without = replace(run, reference=None)
    assert "PyTorch" not in description(plot(without, "Accuracy against latency"))


def test_accuracy_against_size(run: Run) -> None:
    told = description(plot(run, "Accuracy against size"))
    assert "ort/fp32: 90.33 % at 3.1 MB" in told
    assert "PyTorch" not in told
    without = with_artifact(run, "ort/fp32", built=None)
    assert "ort/fp32" not in description(plot(without, "Accuracy against size"))


def test_published_rows_stand_beside_a_network_of_the_same_classes(run: Run, imagenet: Run) -> None:
    found = plot(imagenet, "ort beside the published rows (Intel i9)")
    assert "CARE-S0: 78.40 % at 4.3 ms (published)" in description(found)
    assert "ort/fp32" in description(found)
    assert "trt/fp16" not in description(found)
    assert not any("published" in title for title in titles(run))


def test_distributions_name_median_and_calls(run: Run) -> None:
    told = description(plot(run, DISTRIBUTIONS[0]))
    assert re.search(r"fp32: median [01]\.\d{3} ms, 100 calls", told)
    assert re.search(r"PyTorch: median 2\.\d{3} ms, 100 calls", told)


def test_medians_of_an_even_and_an_odd_number_of_calls(run: Run) -> None:
    latency = measured_of(run, "ort").batches[1]
    samples = {"none": (), "even": (4.0, 1.0, 2.0, 3.0), "odd": (9.0, 1.0, 2.0)}
    run = with_measured(run, "ort", batches={1: replace(latency, samples_ms=samples)})
    told = description(plot(run, DISTRIBUTIONS[0]))
    assert told == "even: median 2.500 ms, 4 calls; odd: median 2.000 ms, 3 calls"


@pytest.mark.parametrize("chosen", [True, False])
def test_what_a_search_tried(run: Run, chosen: bool) -> None:
    curve = (TriedCompression(1_700_000, 0.0, {}), TriedCompression(900_000, 0.002, {"int8": 40}))
    run = with_build(run, "coreml/fp16", curve=curve, chosen=curve[1] if chosen else None)
    told = description(plot(run, "What coreml/fp16 could have been"))
    expected = "0.00 % changed at 1.7 MB; 0.20 % changed at 0.9 MB"
    assert told == (f"{expected} chosen" if chosen else expected)
