from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipeline.core.figures import LatencySummary, Number, Ratio, State
from pipeline.report import view
from pipeline.report.facts import Pairs
from pipeline.report.model import Run
from pipeline.steps.artifact import FileRecord
from pipeline.steps.facts.accuracy import ByClass
from pipeline.steps.facts.bench import EndToEnd
from tests.pipeline.report.changed import artifact_of, measured_of, with_artifact, with_build

EMULATED = Number(0.9, State.EMULATED, by="emulated: strict executor", why="no GPU", samples=600)


def card(run: Run, name: str) -> view.Card:
    return view.card(run, artifact_of(run, name))


def test_a_figure_with_value_interval_and_origin() -> None:
    number = Number(0.5, State.MEASURED, by="ONNX Runtime", samples=8, interval=(0.4, 0.6))
    expected = view.Figure("top-1", "50.00 %", "40.00 to 60.00 %", "measured", "ONNX Runtime")
    assert view.figure(view.TOP1, number) == expected
    earlier = view.figure(view.TOP1, number, earlier=True)
    assert earlier.origin == "ONNX Runtime, from an earlier run"


def test_a_figure_that_is_missing_says_why() -> None:
    missing = Number.not_measured("no GPU")
    expected = view.Figure("top-5", "", "", "not measured", "no GPU")
    assert view.figure(view.TOP5, missing) == expected
    assert view.figure(view.TOP5, missing, earlier=True) == expected
    assert view.figure(view.TOP5, None).origin == "not validated"


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (view.TOP1_DROP, 0.025, "2.50 points"),
        (view.AGREEMENT, 0.75, "75.00 %"),
        (view.FLIPS, 1234.0, "1,234 of 600"),
        (view.COSINE, 0.12345678, "0.123457"),
        (view.MAX_DIFFERENCE, 0.012345, "0.0123"),
        (view.LATENCY, 1.234, "1.23 ms"),
    ],
)
def test_figures_in_words(kind: view.Kind, value: float, words: str) -> None:
    assert view.figure(kind, replace(EMULATED, value=value)).value == words


def test_the_origin_of_an_emulation_says_what_it_stands_for() -> None:
    assert view.origin(EMULATED) == "by strict executor, since no GPU"
    assert view.origin(replace(EMULATED, why="")) == "by strict executor"


def test_a_card_has_every_figure(run: Run) -> None:
    found = card(run, "ort/int8")
    assert (found.name, found.title, found.anchor) == ("ort/int8", "ONNX Runtime", "a-ort-int8")
    assert (found.failure, found.standing, found.size) == ("", "", "1.00 MB")
    assert [figure.title for figure in found.figures] == [
        "top-1",
        "top-1 drop",
        "top-5",
        "same top-1 class as PyTorch",
        "images with another top-1 class",
        "cosine of the logits",
        "largest difference of logits",
    ]
    assert [figure.value for figure in found.figures][3:5] == ["94.50 %", "33 of 600"]
    assert found.accuracy == found.figures[0]
    assert found.drop == found.figures[1]
    assert found.agreement == found.figures[3]
    assert found.latency.value == "0.60 ms"
    assert found.cold_start == "41.0 ms"
    assert found.tools == (("some-builder", "1.2.3"),)
    assert [file[:2] for file in found.files] == [("model.bin", "1.00 MB")]
    assert [link.name for link in found.chain][-1] == "ort/int8"


def test_a_card_of_what_was_not_built(run: Run) -> None:
    found = card(run, "coreml/mixed")
    assert found.failure.startswith("coremltools refuses")
    assert (found.size, found.files, found.facts, found.chain) == ("", (), (), ())
    assert (found.timings, found.comparisons, found.ratio, found.cold_start) == ((), (), None, "")


def test_measurements_of_an_earlier_build_are_left_out(run: Run) -> None:
    latency = Number.not_measured("bench/ort is of an earlier build of ort/int8", unit="ms")
    found = card(with_artifact(run, "ort/int8", latency=latency), "ort/int8")
    assert (found.timings, found.comparisons, found.ratio, found.cold_start) == ((), (), None, "")
    assert found.latency.origin.startswith("bench/ort is of an earlier build")


def test_timings_end_with_the_whole_way_at_its_own_batch(run: Run) -> None:
    measured = measured_of(run, "ort")
    measured = replace(measured, end_to_end=EndToEnd(8, measured.end_to_end.latency))
    found = [(t.batch, t.phase) for t in view.timings(measured, "fp32")]
    assert found == [("1", "engine"), ("8", "engine"), ("8", "end to end")]
    assert [t.runner for t in view.timings(measured, "pytorch")] == ["PyTorch"] * 3
    assert list(view.timings(measured, "other")) == []


def test_percentiles_without_enough_calls_say_so(run: Run) -> None:
    measured = measured_of(run, "ort")
    whole = LatencySummary(10, 1.0, (0.9, 1.1), None, None, 1.05, 0.8, 2.0)
    measured = replace(measured, end_to_end=EndToEnd(1, {"fp32": whole}))
    *_, found = view.timings(measured, "fp32")
    assert (found.p50, found.interval, found.p90) == ("1.000", "0.900 to 1.100", "too few samples")
    assert (found.p99, found.mean, found.samples) == ("too few samples", "1.050", 10)


def test_percentiles_say_what_they_are_at_most_and_whether_they_stand(run: Run) -> None:
    measured = measured_of(run, "ort")  # of 100 calls
    found, *_ = view.timings(measured, "fp32")
    assert re.fullmatch(r"[0-9.]+ \(≤ [0-9.]+\)", found.p90)
    assert found.p99 == "too few samples"
    assert found.valid == "p90 valid; p99 invalid: 100 calls, and 662 are needed"
    busy = replace(measured, load_during=2.0)
    *_, second, whole = view.timings(busy, "fp32")
    assert second.valid.startswith("p90 invalid: other processes kept 2.0 of 2 CPUs busy; p99")
    assert whole.valid == ""
    calls = measured.batches[1].phases["fp32"]["engine"]
    before = replace(calls, p90_bound=None)
    old = replace(measured.batches[1], phases={"fp32": {"engine": before}})
    found, *_ = view.timings(replace(measured, batches={1: old}), "fp32")
    assert re.fullmatch(r"[0-9.]+", found.p90)


def test_comparisons_at_every_batch(run: Run) -> None:
    found = [(c.batch, c.against) for c in view.comparisons(measured_of(run, "ort"), "int8")]
    assert found == [("1", "PyTorch"), ("1", "fp32"), ("8", "PyTorch"), ("8", "fp32")]
    # The baseline is compared with PyTorch only.
    first = [(c.batch, c.against) for c in view.comparisons(measured_of(run, "ort"), "fp32")]
    assert first == [("1", "PyTorch"), ("8", "PyTorch")]
    ratio = card(run, "ort/int8").ratio
    assert ratio is not None
    assert (ratio.batch, ratio.against) == ("1", "PyTorch")


@pytest.mark.parametrize(
    ("interval", "shown", "verdict"),
    [
        ((0.5, 0.9), "0.50 to 0.90", "faster"),
        ((1.1, 1.2), "1.10 to 1.20", "slower"),
        ((0.9, 1.1), "0.90 to 1.10", "no difference shown"),
        ((0.051, 0.062), "0.051 to 0.062", "faster"),
    ],
)
def test_what_a_ratio_shows(
    run: Run, interval: tuple[float, float], shown: str, verdict: str
) -> None:
    measured = measured_of(run, "ort")
    ratios = {"int8": Ratio(sum(interval) / 2, interval)}
    latency = replace(measured.batches[1], ratio_to_pytorch=ratios)
    first, *_ = view.comparisons(replace(measured, batches={1: latency}), "int8")
    assert (first.interval, first.verdict) == (shown, verdict)


def test_the_baseline_and_its_batch_come_from_the_first_measurement(run: Run) -> None:
    assert view.first_batch(run) == "1"
    assert view.baseline(run).value == pytest.approx(3.0, abs=0.1)
    nothing = replace(run, bench=dict.fromkeys(run.bench))
    assert view.first_batch(nothing) == ""
    assert view.baseline(nothing).why == "no target was measured here"


def test_warnings_come_once_with_their_number() -> None:
    assert view.repeated(["a", "b", "a"]) == ("a (2 times)", "b")


def test_the_size_is_that_of_what_is_shipped(run: Run) -> None:
    built = artifact_of(run, "ort/fp32").built
    assert built is not None
    files = {**built.files, "model.blocked.onnx": FileRecord("0" * 64, 3_100_000)}
    both = with_artifact(run, "ort/fp32", built=replace(built, size=6_200_000, files=files))
    both = with_build(both, "ort/fp32", alternatives=("model.blocked.onnx", "gone.onnx"))
    assert artifact_of(both, "ort/fp32").size == 3_100_000
    found = card(both, "ort/fp32")
    assert (found.size, found.alternatives) == ("3.10 MB", "3.10 MB")


def test_class_names_are_left_to_the_graphs_section(run: Run) -> None:
    run = with_build(run, "coreml/fp16", more={"network": {"labels": ["a"]}, "casts": 3})
    assert card(run, "coreml/fp16").facts == (Pairs("Build", (("casts", "3"),)),)
    # What TensorRT tells of its own network stays.
    assert any("Operators" in block.title for block in card(run, "trt/fp16").facts)


def test_anchors_hold_no_special_character() -> None:
    assert view.anchor("trt/fp16 <ü>") == "a-trt-fp16----"


def test_classes_are_counted(run: Run, imagenet: Run) -> None:
    assert (view.class_count(run), view.class_count(imagenet)) == (10, 1000)
    assert view.class_count(replace(run, export=None)) == 0


def test_the_worst_class_and_own_measures_are_figures_like_others(run: Run) -> None:
    one = artifact_of(run, "ort/int8")
    worst = Number(0.5, State.MEASURED, by="x", samples=8, interval=(0.2, 0.8))
    own = Number(12.34567, State.MEASURED, by="x", interval=(1.0, 20.0))
    accuracy = replace(
        one.accuracy, by_class=ByClass("oak", worst, {"oak": 0.5}), metrics={"cost": own}
    )
    shown = view.card(run, replace(one, accuracy=accuracy)).figures[-2:]
    assert [(figure.title, figure.value, figure.interval) for figure in shown] == [
        ("top-1 of the worst class, oak", "50.00 %", "20.00 to 80.00 %"),
        ("cost", "12.35", "1 to 20"),
    ]
