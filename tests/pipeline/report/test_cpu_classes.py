"""A line for every class of CPUs, and which precision to use there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.answers import Answers
from pipeline.core.cpu_classes import CLASSES
from pipeline.core.figures import Number, Ratio, State
from pipeline.report import cpu_classes
from pipeline.report.gates import judge_class
from pipeline.report.markdown import page
from pipeline.report.model import BuiltArtifact, GateFailure, GateReport, Part, Run
from pipeline.report.terminal import summary
from pipeline.steps.facts.accuracy import Accuracy
from pipeline.steps.facts.cpu_class import ClassFacts, OnClass
from tests.pipeline.report.making import configured


def number(value: float, unit: str = "") -> Number:
    return Number(value, State.RESTRICTED, unit, by="ort, restricted to AVX2", samples=100)


def on_class(top1: float, same: float, ms: float, ratio: Ratio | None) -> OnClass:
    figures = Accuracy(number(top1), number(top1), number(0.99))
    return OnClass(figures, number(same), number(ms, "ms"), ratio)


def with_class(run: Run, same: float = 1.0, interval: tuple[float, float] = (0.6, 0.7)) -> Run:
    facts = ClassFacts(
        "ort",
        "avx2",
        "AVX2",
        "Intel i9-9900",
        artifacts={
            "fp32": on_class(0.9273, 1.0, 2.0, None),
            "int8": on_class(0.9266, same, 1.3, Ratio(0.65, interval)),
        },
    )
    part = Part("cpu-class/ort-avx2", False, 1, "d", "k", {}, {}, {}, 1.0, facts)
    return replace(run, cpu_classes=(part,), gates=GateReport())


def test_a_line_says_accuracy_agreement_ratio_and_choice(run: Run) -> None:
    (line,) = cpu_classes.lines(with_class(run))
    assert line == (
        "ort on AVX2 (Intel i9-9900), measured here, restricted: fp32 top-1 92.73 %, agreement "
        "99.00 %, same class as here 100.00 %, 2.00 ms, int8 top-1 92.66 %, agreement 99.00 %, "
        "same class as here 100.00 %, 1.30 ms (ratio 0.65, 95 %: 0.60 to 0.70); use int8"
    )


def test_a_line_names_what_was_left_out(run: Run) -> None:
    found = with_class(run)
    (part,) = found.cpu_classes
    facts = replace(part.facts, left_out={"bf16": "CPUs with AVX2 have no bfloat16"})
    (line,) = cpu_classes.lines(replace(found, cpu_classes=(replace(part, facts=facts),)))
    assert line.endswith(
        "0.60 to 0.70), bf16 not measured: CPUs with AVX2 have no bfloat16; use int8"
    )


def test_a_line_of_estimated_times_says_so_and_chooses(run: Run) -> None:
    found = with_class(run)
    (part,) = found.cpu_classes
    facts = replace(part.facts, lacks="this CPU has no avx_vnni")
    (line,) = cpu_classes.lines(replace(found, cpu_classes=(replace(part, facts=facts),)))
    assert line.startswith(
        "ort on AVX2 (Intel i9-9900), emulated and times estimated, since this CPU has no "
        "avx_vnni: fp32 top-1 92.73 %, agreement 99.00 %, same class as here 100.00 %, 2.00 ms, "
    )
    assert line.endswith(" 1.30 ms (ratio 0.65, 95 %: 0.60 to 0.70); use int8")


def test_a_line_of_emulated_answers_chooses_nothing(run: Run) -> None:
    timed = with_class(run)
    (part,) = timed.cpu_classes
    emulated = {
        name: replace(one, latency=Number.not_measured("no avx_vnni", unit="ms"), ratio=None)
        for name, one in part.facts.artifacts.items()
    }
    lacks = "this CPU has no avx_vnni"
    facts = replace(part.facts, lacks=lacks, untimed="it was killed", artifacts=emulated)
    failure = GateFailure("ort", "int8", "top-1", "min_top1", 0.93, 0.9266, State.EMULATED)
    found = replace(timed, cpu_classes=(replace(part, facts=facts),))
    (line,) = cpu_classes.lines(found)
    assert line == (
        "ort on AVX2 (Intel i9-9900), emulated: fp32 top-1 92.73 %, agreement 99.00 %, same class "
        "as here 100.00 %, int8 top-1 92.66 %, agreement 99.00 %, same class as here 100.00 %; "
        "which to use there is not known, since nothing was timed: it was killed"
    )
    found = replace(found, class_failures={part.name: (failure,)})
    (line,) = cpu_classes.lines(found)
    assert "it was killed; int8: a gate does not hold there: top-1 is " in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"interval": (0.6, 1.01)}, "int8: not faster beyond doubt"),
        ({"same": 0.997}, "int8: its answers there are not those that were judged here"),
    ],
)
def test_another_precision_must_hold_and_be_faster(
    run: Run, change: dict[str, Any], reason: str
) -> None:
    (line,) = cpu_classes.lines(with_class(run, **change))
    assert line.endswith(f"; use fp32; {reason}")


def certified(run: Run, *classes: str) -> Run:
    """The run whose int8 artifact says what it is certified for."""
    stated = {"certified_for": list(classes), "measured_on": "avx2", "unsafe_layers": ["a", "b"]}

    def with_it(artifact: BuiltArtifact) -> BuiltArtifact:
        if artifact.name != "ort/int8":
            return artifact
        assert artifact.built is not None
        facts = replace(artifact.built.facts, more={"certificate": stated})
        made_from = {"precision/int8-ort": "x"}
        return replace(artifact, built=replace(artifact.built, facts=facts, made_from=made_from))

    return replace(run, artifacts=tuple(map(with_it, run.artifacts)), cpu_classes=())


def test_the_report_says_where_an_artifact_is_certified(run: Run) -> None:
    assert list(cpu_classes.lines(certified(run, *CLASSES))) == [
        "ort/int8: certified for every class of x86 CPUs, judged on AVX2"
    ]
    told = (
        "(!) ort/int8: certified for AVX-512 + VNNI, AVX2 + VNNI alone, judged on AVX2: elsewhere "
        "8-bit products of 2 layers may saturate"
    )
    partly = certified(run, "avx512-vnni", "avx2-vnni")
    assert list(cpu_classes.lines(partly)) == [told]
    figures = {"state": "emulated: x86 without VNNI", "top1": 0.9264, "agreement": 0.9773}
    form = next(iter(run.forms.values()))
    emulated = replace(
        form,
        name="precision/int8-ort",
        facts=replace(form.facts, more={"certificate": figures}),
    )
    assert list(cpu_classes.lines(replace(partly, forms={"int8-ort": emulated}))) == [
        f"{told} (emulated: x86 without VNNI: top-1 92.64 %, agreement 97.73 % of the calibration "
        "images)"
    ]
    assert told in " ".join(summary(partly).split())
    assert "certified for AVX-512" in page(partly)


def test_a_busy_machine_chooses_nothing(run: Run) -> None:
    found = with_class(run)
    (part,) = found.cpu_classes
    busy = replace(part, facts=replace(part.facts, busy=1.2, cpus=2))
    (line,) = cpu_classes.lines(replace(found, cpu_classes=(busy,)))
    assert line.endswith("use fp32; int8: other processes kept 1.2 of 2 CPUs busy")
    assert "1.30 ms on a busy machine (ratio" in line
    wide = replace(part, facts=replace(part.facts, busy=1.2, cpus=16))
    (line,) = cpu_classes.lines(replace(found, cpu_classes=(wide,)))
    assert "1.30 ms (ratio" in line
    assert line.endswith("use int8")


@pytest.mark.parametrize("wrong", ["fp32", "int8"])
def test_timed_calls_that_answer_otherwise_choose_nothing(run: Run, wrong: str) -> None:
    found = with_class(run)
    (part,) = found.cpu_classes
    facts = replace(part.facts, answers={wrong: Answers(32, 4, 0.9)})
    (line,) = cpu_classes.lines(replace(found, cpu_classes=(replace(part, facts=facts),)))
    assert line.endswith(
        "use fp32; int8: 4 of 32 answers of timed calls are not those of the validation"
    )


def failing(precision: str) -> GateFailure:
    return GateFailure(
        "ort", precision, "agreement", "min_agreement", 0.995, 0.99, State.RESTRICTED
    )


@pytest.mark.parametrize(("precision", "use"), [("int8", "fp32"), ("fp32", "int8")])
def test_a_gate_that_does_not_hold_there_rules_out(run: Run, precision: str, use: str) -> None:
    found = replace(with_class(run), class_failures={"cpu-class/ort-avx2": (failing(precision),)})
    (line,) = cpu_classes.lines(found)
    assert line.endswith(
        f"; use {use}; {precision}: a gate does not hold there: agreement is 0.99, min_agreement "
        "allows 0.995 (measured here, restricted)"
    )


def test_a_gate_that_does_not_hold_on_this_machine_rules_out_nothing_there(run: Run) -> None:
    found = replace(with_class(run), gates=GateReport(2, 2, (failing("int8"), failing("fp32"))))
    (line,) = cpu_classes.lines(found)
    assert line.endswith("; use int8")


def test_gates_are_judged_on_the_figures_of_the_class(run: Run, tmp_path: Path) -> None:
    (part,) = with_class(run).cpu_classes
    config = configured(tmp_path, "min_agreement: 0.995, max_latency_ms: 1.5")
    failures = judge_class(config, part.facts)
    assert [(each.precision, each.gate, each.state) for each in failures] == [
        ("fp32", "min_agreement", State.RESTRICTED),
        ("fp32", "max_latency_ms", State.RESTRICTED),
        ("int8", "min_agreement", State.RESTRICTED),
    ]
    assert judge_class(configured(tmp_path, "min_agreement: 0.99"), part.facts) == ()


@pytest.mark.parametrize(
    "doubtful", [{"busy": 1.2}, {"answers": {"fp32": Answers(32, 4, 0.9)}}], ids=["busy", "answers"]
)
def test_latency_in_doubt_fails_no_gate_there(
    run: Run, tmp_path: Path, doubtful: dict[str, Any]
) -> None:
    (part,) = with_class(run).cpu_classes
    facts = replace(part.facts, **doubtful)
    assert judge_class(configured(tmp_path, "max_latency_ms: 1.5"), facts) == ()


def test_what_was_not_measured_says_why(run: Run) -> None:
    found = with_class(run)
    (part,) = found.cpu_classes
    facts = replace(part.facts, why_not="this CPU has no avx_vnni", artifacts={})
    (line,) = cpu_classes.lines(replace(found, cpu_classes=(replace(part, facts=facts),)))
    assert line == "ort on AVX2 (Intel i9-9900): not measured: this CPU has no avx_vnni"


def test_figures_of_an_earlier_build_are_not_shown(run: Run) -> None:
    found = with_class(run)
    (part,) = found.cpu_classes
    (line,) = cpu_classes.lines(
        replace(found, cpu_classes=(replace(part, made_from={"ort/int8": "older"}),))
    )
    assert line.endswith("cpu-class/ort-avx2 is of an earlier build of ort/int8: run it again")


def test_every_report_has_the_line(run: Run) -> None:
    found = with_class(run)
    assert "use int8" in page(found)
    assert "restricted" in " ".join(summary(found).split())
    assert Run.from_dict(found.to_dict(), "test").cpu_classes == found.cpu_classes
