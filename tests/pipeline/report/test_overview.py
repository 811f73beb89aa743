from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.figures import Number, State
from pipeline.core.runner import Numerics
from pipeline.report import html, markdown, overview, terminal, view
from pipeline.report.facts import Pairs
from pipeline.report.model import Choice, GateDoubt, GateReport, Run, StepEnd
from pipeline.steps.facts.accuracy import ByClass, EmulationError, ModuleRange, NarrowSums
from pipeline.steps.facts.graphs import RaisedPart, RepairFacts
from pipeline.steps.step import State as StepState
from tests.pipeline.report.changed import (
    artifact_of,
    hasty,
    measured_of,
    with_artifact,
    with_measured,
)
from tests.pipeline.report.making import STEPS, Partial


@pytest.fixture
def good(run: Run) -> Run:
    steps = tuple(step for step in run.steps if "mixed" not in step.name)
    return replace(run, exit_code=0, gates=GateReport(6, 6), steps=steps)


def alerts(run: Run) -> list[str]:
    cards = [view.card(run, artifact) for artifact in run.artifacts]
    return list(overview.alerts(run, cards))


def test_failures_come_before_gates(run: Run) -> None:
    found = overview.verdict(run)
    assert not found.good
    assert found.line == "1 failure and 2 gates that do not hold (exit code 3: a build failed)"
    assert found.lines == (
        "coreml/mixed failed: coremltools refuses the operation 'erf' in blocks.1.mlp",
        "validate/coreml-mixed was skipped: coreml/mixed failed",
        "gate does not hold: trt/int8: agreement is 0.9283, min_agreement allows 0.97 (emulated)",
        "gate does not hold: ort/int8: agreement is 0.945, min_agreement allows 0.97 (measured)",
    )


def test_several_failures_and_one_gate_are_counted(run: Run) -> None:
    failed = StepEnd("build", "ort/fp32", StepState.FAILED, "no memory", 0.0)
    gates = replace(run.gates, failures=run.gates.failures[:1])
    found = overview.verdict(replace(run, steps=(*run.steps, failed), gates=gates))
    assert found.line.startswith("2 failures and 1 gate that does not hold (")


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (GateReport(6, 6), "Everything was built, and no gate failed"),
        (GateReport(), "Everything was built; no gate is set"),
        (GateReport(6, 0), "Everything was built; no gate was judged, for want of figures"),
        (
            GateReport(6, 4),
            "Everything was built, and no gate failed; 2 of 6 had no figure to judge",
        ),
    ],
)
def test_a_good_run_says_what_became_of_gates(good: Run, gates: GateReport, words: str) -> None:
    found = overview.verdict(replace(good, gates=gates))
    assert found.good
    assert found.line == f"{words} (exit code 0: fine)"


def test_a_run_of_some_steps_claims_no_more(good: Run) -> None:
    some = replace(good, steps=good.steps[:3], not_selected=("a", "b"))
    expected = "All that was selected is done, 3 of 5 steps, and no gate failed"
    assert overview.verdict(some).line.startswith(expected)
    none = replace(good, steps=(), not_selected=("a", "b"))
    assert overview.verdict(none).line.startswith("No step was selected: this is what lies there")


def test_an_exit_code_without_a_failure_is_not_good(good: Run) -> None:
    found = overview.verdict(replace(good, exit_code=4))
    assert not found.good
    assert found.line.startswith("this machine lacks the hardware or software (exit code 4")


def test_overflows_warnings_and_problems_are_told(run: Run) -> None:
    found = alerts(replace(run, problems=("trt/fp16 cannot be read",)))
    assert found == [
        "trt/fp16 cannot be read",
        "trt/fp16: 3 values left the range of their type while it ran; repair: true under its "
        "target keeps what breaks in a wider type, chosen on calibration images",
        "calibration: the class 'bag' has 3 images less than the others",
    ]


def test_a_repair_is_not_advised_where_there_is_one(run: Run) -> None:
    facts = RepairFacts("float16", "", (), 5, 0.0, 0.001, None, "", 4, 1)
    told = alerts(with_artifact(run, "trt/fp16", repair=facts))
    assert "trt/fp16: 3 values left the range of their type while it ran" in told


def test_infinities_that_came_from_elsewhere_are_told(run: Run) -> None:
    run = with_artifact(run, "trt/fp16", numerics=Numerics(0, ("head: Div y",)))
    told = "trt/fp16: values that are not finite were carried on in head: Div y"
    assert told in alerts(run)


def test_a_graph_that_was_not_simplified_is_told(run: Run) -> None:
    assert run.simplified is not None
    facts = replace(run.simplified.facts, why_not="onnxsim took more than 9 s")
    run = replace(run, simplified=replace(run.simplified, facts=facts))
    assert "the graph was not simplified: onnxsim took more than 9 s" in alerts(run)


@pytest.mark.parametrize(("load", "told"), [(1.0, False), (1.1, True)])
def test_a_busy_machine_is_told(run: Run, load: float, told: bool) -> None:
    found = alerts(with_measured(run, "ort", load_before=load))
    assert any(f"kept {load} of 2 CPUs busy" in line for line in found) is told


def test_too_few_calls_are_told(run: Run) -> None:
    found = alerts(hasty(run))
    told = "ort: latency is not to be trusted: only 6 calls were timed, and 30 are needed"
    assert [line for line in found if line.startswith(told)]


def test_int8_that_is_larger_or_slower_is_remarked(run: Run) -> None:
    assert not [line for line in alerts(run) if "larger" in line or "slower" in line]
    built = artifact_of(run, "ort/int8").built
    assert built is not None
    larger = with_artifact(run, "ort/int8", built=replace(built, size=9_000_000))
    told = "ort/int8 is larger than ort/fp32 (9.00 against 3.10 MB), though its weights"
    assert any(line.startswith(told) for line in alerts(larger))
    batch = measured_of(run, "ort").batches[1]
    calls = {**batch.samples_ms, "int8": tuple(1.5 * t for t in batch.samples_ms["fp32"])}
    slower = with_measured(run, "ort", batches={1: replace(batch, samples_ms=calls)})
    assert "ort/int8 is slower than ort/fp32: 1.50 of its time" in alerts(slower)
    doubted = with_artifact(slower, "ort/int8", latency_doubt="a busy machine")
    assert not [line for line in alerts(doubted) if "is slower" in line]


def test_an_agreement_far_below_the_rest_is_remarked(run: Run) -> None:
    accuracy = artifact_of(run, "trt/int8").accuracy
    assert accuracy.agreement is not None
    low = replace(accuracy, agreement=replace(accuracy.agreement, value=0.74))
    found = alerts(with_artifact(run, "trt/int8", accuracy=low))
    assert [line for line in found if line.startswith("trt/int8 agrees with PyTorch on 74.0 %")]
    assert not [line for line in alerts(run) if "agrees with" in line]


def test_choices_in_words(run: Run) -> None:
    found = list(overview.choices(run))
    assert found[1].startswith("ort: use fp32; int8: a gate does not hold: agreement is 0.945")
    choice = {"ort": Choice(None, {"fp32": "x", "int8": "y"}), "trt": Choice("fp16", {})}
    assert list(overview.choices(replace(run, choice=choice))) == ["ort: none; fp32: x; int8: y"]


def test_nothing_to_choose_from_where_nothing_was_selected(partial: Partial) -> None:
    found = list(overview.choices(partial("export", there=False)))
    assert found == [
        f"{target}: nothing to choose from: not selected in this run"
        for target in ("trt", "ort", "coreml")
    ]


def test_what_is_missing_is_grouped_by_its_reason(run: Run) -> None:
    not_measured = overview.missing(run, State.NOT_MEASURED)
    assert [(item.what, item.why[:20]) for item in not_measured] == [
        (("latency of trt/fp16, trt/int8",), "no NVIDIA GPU was fo"),
        (("accuracy of coreml/fp16", "latency of coreml/fp16"), "Core ML predictions "),
    ]
    (emulated,) = overview.missing(run, State.EMULATED)
    assert emulated.what == ("accuracy of trt/fp16, trt/int8",)
    assert emulated.why.startswith("by strict ONNX executor, since no NVIDIA GPU")


def test_steps_that_were_not_selected_are_the_reason(partial: Partial) -> None:
    (item,) = overview.missing(partial("export", there=False), State.NOT_MEASURED)
    assert item.why == "not selected in this run"
    assert len(item.what) == 2
    whole = overview.missing(partial(*STEPS, there=True), State.NOT_MEASURED)
    assert "not selected in this run" not in [item.why for item in whole]


def _narrow(half: float, interval: tuple[float, float]) -> NarrowSums:
    narrow, wide = (Number(value, State.EMULATED, by="executor") for value in (half, 0.99))
    drop = Number(0.99 - half, State.EMULATED, by="executor", interval=interval)
    return NarrowSums(256, narrow, wide, drop)


@pytest.mark.parametrize(
    ("interval", "told"), [((-0.01, 0.02), False), ((0.02, 0.08), True), ((-0.08, -0.02), True)]
)
def test_accuracy_that_depends_on_the_accumulator(
    run: Run, interval: tuple[float, float], told: bool
) -> None:
    found = alerts(with_artifact(run, "trt/int8", narrow_sums=_narrow(0.94, interval)))
    line = (
        "trt/int8: accuracy depends on the accumulator: 99.00 % of 256 images have PyTorch's class "
        "where products are summed in float32, 94.00 % where in half precision"
    )
    assert (line in found) is told


@pytest.mark.parametrize(
    ("interval", "told"), [((-0.01, 0.02), False), ((0.02, 0.08), True), ((-0.08, -0.02), True)]
)
def test_an_emulation_that_is_off(run: Run, interval: tuple[float, float], told: bool) -> None:
    measured, emulated, same, largest = (
        Number(value, State.EMULATED, by="executor") for value in (0.9, 0.94, 0.95, 0.25)
    )
    difference = Number(-0.04, State.EMULATED, by="executor", interval=interval)
    error = EmulationError(256, "executor", measured, emulated, difference, same, largest)
    found = with_artifact(run, "trt/int8", emulation=error)
    line = (
        "trt/int8: the emulation judges otherwise than the hardware: top-1 94.00 % emulated, "
        "90.00 % measured, of 256 images"
    )
    assert (line in alerts(found)) is told
    artifact = next(each for each in found.artifacts if each.name == "trt/int8")
    blocks = [block for block in view.card(found, artifact).numerics if "hardware" in block.title]
    assert [dict(block.rows) for block in blocks if isinstance(block, Pairs)] == [
        {
            "top-1 measured": "90.00 %",
            "top-1 emulated": "94.00 %",
            "same class": "95.00 %",
            "largest difference of two logits": "0.25",
            "images": "256",
            "emulated by": "executor",
        }
    ]


def test_a_network_that_leaves_float16_itself(run: Run) -> None:
    assert run.reference is not None
    layers = ModuleRange(1e14, "head", "stem", 32)
    facts = replace(run.reference.facts, range=layers)
    wide = replace(run, reference=replace(run.reference, facts=facts))
    assert alerts(wide)[0].startswith("the network itself leaves the range of float16: 1e+14 at ")
    # Where nothing overflowed, it does not matter.
    calm = with_artifact(wide, "trt/fp16", numerics=Numerics())
    assert not any("the network itself" in line for line in alerts(calm))


def test_what_was_built_in_another_way_is_told(run: Run) -> None:
    built = artifact_of(run, "trt/fp16").built
    assert built is not None
    other = replace(built, facts=replace(built.facts, workarounds=("took another graph",)))
    assert "trt/fp16: took another graph" in alerts(with_artifact(run, "trt/fp16", built=other))


def test_every_exit_code_of_a_failure_has_words() -> None:
    kinds = [PipelineError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    own = {kind.exit_code for kind in kinds if kind.__module__ == PipelineError.__module__}
    assert own <= set(overview.EXIT_CODES)


def by_class(**shares: float) -> ByClass:
    worst = min(shares, key=lambda name: shares[name])
    number = Number(shares[worst], State.MEASURED, by="x", samples=20, interval=(0.0, 1.0))
    return ByClass(worst, number, shares)


def test_the_class_that_suffers_most_is_told_once(run: Run) -> None:
    assert list(overview.worst_class(run)) == []
    for name, shares in (
        ("ort/fp32", {"oak": 0.7, "fir": 0.6}),
        ("ort/int8", {"oak": 0.0, "fir": 0.9}),
    ):
        one = artifact_of(run, name)
        accuracy = replace(one.accuracy, by_class=by_class(**shares))
        run = with_artifact(run, name, accuracy=accuracy)
    (line,) = overview.worst_class(run)
    assert line == "worst class: oak: 0.00 % of 20 images are right with ort/int8"
    assert run.reference is not None
    facts = run.reference.facts
    numbers = replace(facts.numbers, by_class=by_class(oak=0.75, fir=0.5))
    reference = replace(run.reference, facts=replace(facts, numbers=numbers))
    (line,) = overview.worst_class(replace(run, reference=reference))
    assert line.endswith("with ort/int8; with PyTorch 75.00 %")


REPAIR = RepairFacts(
    base="float16",
    broke="no finite answer, least headroom 0.8 at blocks.1: MatMul m",
    raised=tuple(RaisedPart(f"blocks.{i}", "bfloat16", 0.001, "m holds 8e+04") for i in range(9)),
    parts=40,
    share=0.009,
    error=1.3e-3,
    headroom=6.33,
    beyond="",
    images=64,
    evaluations=2,
)


def test_a_repair_is_told_and_one_that_raised_nothing_is_not(run: Run) -> None:
    named = ", ".join(f"blocks.{i}" for i in range(8))
    told = (
        "trt/fp16 was repaired: 9 of 40 parts raised above float16 (9 in bfloat16; 0.90% of the "
        f"products): {named} and 1 more; before: no finite answer, least headroom 0.8 at blocks.1: "
        "MatMul m; now: error 0.0013, least headroom 6.33 on 64 calibration images"
    )
    assert told in alerts(with_artifact(run, "trt/fp16", repair=REPAIR))
    sound = replace(REPAIR, raised=(), broke="", share=0.0)
    calm = with_artifact(run, "trt/fp16", numerics=Numerics())
    assert alerts(with_artifact(calm, "trt/fp16", repair=sound)) == alerts(calm)


@pytest.mark.parametrize(("headroom", "holds"), [(4.1, True), (3.9, False)])
def test_a_repair_that_fails_on_the_validation_images_is_told(
    run: Run, headroom: float, holds: bool
) -> None:
    seen = Numerics(more={"headroom": headroom})
    found = alerts(with_artifact(run, "trt/fp16", repair=REPAIR, numerics=seen))
    told = (
        "trt/fp16: the repair does not hold on the validation images: least headroom 3.9, where 4"
    )
    assert any(line.startswith(told) for line in found) is not holds


def test_gates_in_doubt_for_one_reason_are_told_once_and_everywhere(run: Run) -> None:
    doubts = tuple(
        GateDoubt(target, "fp16", "top-1 drop", "max_top1_drop", 0.01, 0.0, "16 seen", fails)
        for target, fails in (("trt", False), ("coreml", False), ("ort", True))
    )
    changed = replace(run, gates=replace(run.gates, doubts=doubts))
    line = (
        "gate in doubt: trt/fp16, coreml/fp16: top-1 drop is 0, max_top1_drop allows 0.01; 16 seen"
    )
    assert [found for found in alerts(changed) if "in doubt" in found] == [line]
    terminal_text = " ".join(terminal.summary(changed).split())
    for text in (terminal_text, markdown.page(changed), html.page(changed)):
        assert text.count(line) == 1


def test_a_licence_that_keeps_something_back_is_told_before_all_figures(run: Run) -> None:
    assert run.export is not None
    remark = "the licence of the weights, cc-by-nc-4.0, forbids commercial use"
    said = {"license": "cc-by-nc-4.0", "license_remark": remark}
    network = replace(run.export.facts.network, description=said)
    facts = replace(run.export.facts, network=network)
    licensed = replace(run, export=replace(run.export, facts=facts), problems=())
    assert alerts(licensed)[0] == remark
    assert ("licence of the weights", "cc-by-nc-4.0") in view.cost(licensed)
    assert remark not in alerts(run)


def test_a_graph_that_was_given_is_said_to_be_the_reference(run: Run) -> None:
    assert list(overview.referee(run)) == []
    assert run.reference is not None
    numbers = run.reference.facts.numbers
    by = replace(numbers.top1, by="ONNX Runtime 1.31.1, the graph in float32, CPU")
    facts = replace(run.reference.facts, numbers=replace(numbers, top1=by))
    given = replace(run, reference=replace(run.reference, facts=facts))
    assert list(overview.referee(given)) == [
        "PyTorch stands here for the graph that was given: "
        "ONNX Runtime 1.31.1, the graph in float32, CPU"
    ]
