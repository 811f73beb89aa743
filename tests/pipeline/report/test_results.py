from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.core.errors import BuildError
from pipeline.core.figures import Number, State
from pipeline.report import results
from pipeline.report.model import EARLIER, FORMAT, NOT_SELECTED, Part, Run
from pipeline.report.results import collect
from pipeline.report.write import write
from pipeline.scheduler.execute import Outcome
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.facts.accuracy import Accuracy
from pipeline.steps.facts.cpu_class import ClassFacts, OnClass
from pipeline.steps.facts.graphs import BuildFacts, RepairFacts
from pipeline.steps.library import Library
from pipeline.steps.stated import Stated
from pipeline.steps.step import StageResult
from pipeline.steps.step import State as StepState
from tests.pipeline.report.changed import artifact_of
from tests.pipeline.report.making import NAMES, STEPS, Partial, configured, ended, fill
from tests.pipeline.steps.making import sign_again


def test_everything_that_lies_there_is_gathered(run: Run) -> None:
    assert (run.format, run.name, run.config) == (FORMAT, "care_tiny", "configs/my run.yaml")
    assert [artifact.name for artifact in run.artifacts] == list(NAMES)
    assert list(run.bench) == ["trt", "ort", "coreml"]
    assert list(run.forms) == ["float16"]
    assert run.export is not None
    assert run.export.facts.nodes == 240
    assert run.simplified is not None
    assert run.simplified.facts.nodes == 198
    assert run.calibration is not None
    assert run.calibration.facts.images == 512
    assert run.pytorch.top1.samples == 600
    assert run.network is not None
    assert run.network.labels[0] == "class 0"
    assert set(run.versions) >= {"torch", "onnx", "tensorrt"}
    assert run.problems == ()


def test_an_artifact_carries_its_figures(run: Run, filled: Path) -> None:
    artifact = artifact_of(run, "ort/int8")
    assert (artifact.target, artifact.title, artifact.precision) == ("ort", "ONNX Runtime", "int8")
    assert artifact.built is not None
    assert artifact.size == artifact.built.size == 1_000_000
    assert artifact.built.tools == {"some-builder": "1.2.3"}
    assert set(artifact.built.made_from) == {"onnx"}
    assert artifact.built.facts.more["fallback"] is False
    assert artifact.accuracy.agreement is not None
    assert artifact.accuracy.agreement.value == pytest.approx(0.945)
    assert artifact.latency.value == pytest.approx(0.6, abs=0.01)
    assert (artifact.selected, artifact.failure, artifact.standing) == (True, "", "")
    overflow = artifact_of(run, "trt/fp16").numerics
    assert overflow is not None
    assert overflow.overflowed_values == 3


def test_why_a_figure_is_missing(run: Run) -> None:
    fp16, mixed = artifact_of(run, "coreml/fp16"), artifact_of(run, "coreml/mixed")
    assert fp16.accuracy.top1.why.startswith("Core ML predictions need macOS")
    assert mixed.failure.startswith("coremltools refuses the operation")
    assert mixed.accuracy.top1.why == mixed.latency.why == mixed.failure
    assert (mixed.built, mixed.size) == (None, 0)


def test_gates_are_judged_and_rule_out(run: Run) -> None:
    assert [f"{f.target}/{f.precision}" for f in run.gates.failures] == ["trt/int8", "ort/int8"]
    # Six limits; Core ML's two artifacts have no agreement.
    assert (run.gates.limits, run.gates.judged) == (6, 4)
    assert run.choice["ort"].precision == "fp32"
    assert run.choice["ort"].why["int8"].startswith("a gate does not hold: agreement is 0.945")


def test_gates_of_a_class_of_cpus_decide_what_to_use_there_alone(
    partial: Partial, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreement = Number(0.95, State.RESTRICTED, by="ort, restricted to AVX2", samples=100)
    one = OnClass(Accuracy(agreement, agreement, agreement), agreement, agreement)
    facts = ClassFacts("ort", "avx2", "AVX2", "i9-9900", artifacts={"fp32": one})
    part = Part("cpu-class/ort-avx2", False, 1, "d", "k", {}, {}, {}, 1.0, facts)
    monkeypatch.setattr(results, "_classes", lambda config, shelf: (part,))
    found = partial(*STEPS, there=True, gates="min_agreement: 0.9")
    assert found.class_failures == {part.name: ()}
    found = partial(*STEPS, there=True, gates="min_agreement: 0.951")
    (failure,) = found.class_failures[part.name]
    assert (failure.gate, failure.value, failure.state) == (
        "min_agreement",
        0.95,
        State.RESTRICTED,
    )
    assert failure not in found.gates.failures
    assert Run.from_dict(found.to_dict(), "test").class_failures == found.class_failures


def test_exit_codes(tmp_path: Path, partial: Partial, run: Run) -> None:
    assert partial(*STEPS, there=True, gates="min_agreement: 0.9").exit_code == 0
    assert partial(*STEPS, there=True, gates="min_agreement: 0.99").exit_code == 1
    # A failed build outweighs a gate that does not hold.
    assert run.gates.failures
    assert run.exit_code == 3


def test_gates_are_judged_on_what_lies_there_from_earlier(partial: Partial) -> None:
    run = partial("export", there=True, gates="min_agreement: 0.99")
    assert (run.exit_code, run.gates.judged) == (1, 4)


def test_gates_are_not_judged_where_nothing_lies(partial: Partial) -> None:
    run = partial("export", there=False, gates="min_agreement: 0.99")
    assert (run.exit_code, run.gates.limits, run.gates.judged) == (0, 6, 0)


def test_what_was_not_selected(partial: Partial) -> None:
    run = partial("export", there=False)
    assert [step.name for step in run.steps] == ["export"]
    assert run.not_selected == STEPS[1:]
    artifact = artifact_of(run, "ort/fp32")
    assert (artifact.selected, artifact.standing) == (False, NOT_SELECTED)
    assert artifact.accuracy.top1.why == artifact.latency.why == NOT_SELECTED


def test_what_lies_there_from_earlier(partial: Partial) -> None:
    run = partial("export", "ort/fp32", "validate/ort-fp32", there=True)
    fp32, int8 = artifact_of(run, "ort/fp32"), artifact_of(run, "ort/int8")
    assert (fp32.standing, fp32.accuracy_earlier, fp32.latency_earlier) == ("", False, True)
    assert (int8.standing, int8.accuracy_earlier, int8.latency_earlier) == (EARLIER, True, True)
    assert run.export is not None
    assert not run.export.earlier
    assert run.simplified is not None
    assert run.simplified.earlier


def test_what_a_failed_build_left_there_is_from_earlier(tmp_path: Path) -> None:
    config = configured(tmp_path)
    fill(config)
    error = BuildError("no memory")
    outcome = Outcome([StageResult("build", "ort/fp32", StepState.FAILED, "no memory", 0, error)])
    artifact = artifact_of(collect(config, tmp_path / "x.yaml", outcome), "ort/fp32")
    assert (artifact.failure, artifact.standing) == ("no memory", EARLIER)


def test_figures_of_an_earlier_build_are_none_of_the_new_one(tmp_path: Path) -> None:
    config = configured(tmp_path)
    make = fill(config)
    make.make("ort/int8", BuildFacts("ort", "int8"), "onnx", size=900_000)
    run = collect(config, tmp_path / "x.yaml", ended("ort/int8"))
    artifact = artifact_of(run, "ort/int8")
    assert artifact.standing == ""
    expected = "is of an earlier build of ort/int8: run it again"
    assert artifact.accuracy.top1.why == f"validate/ort-int8 {expected}"
    assert artifact.latency.why == f"bench/ort {expected}"
    assert (artifact.accuracy_earlier, artifact.latency_earlier) == (False, False)
    assert artifact_of(run, "ort/fp32").latency.state is State.MEASURED
    # Its calls do not count for the choice either, though they were faster.
    assert "latency was not measured" in run.choice["ort"].why["int8"]


def test_figures_of_what_is_gone_are_not_shown(tmp_path: Path) -> None:
    config = configured(tmp_path)
    fill(config)
    shutil.rmtree(config.folder / "ort/int8")
    artifact = artifact_of(collect(config, tmp_path / "x.yaml", ended()), "ort/int8")
    assert artifact.accuracy.top1.why == artifact.latency.why == NOT_SELECTED


def test_steps_that_did_not_come_to_run_are_the_reason(nothing: Run) -> None:
    artifact = artifact_of(nothing, "ort/fp32")
    assert artifact.accuracy.top1.why == artifact.latency.why == "export failed"
    assert nothing.export is None
    assert nothing.exit_code == 3


@pytest.mark.parametrize("name", ["export", "ort/fp32", "validate/ort-fp32", "bench/ort"])
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    config = configured(tmp_path)
    fill(config)
    (config.folder / name / MANIFEST).write_text("{")
    run = collect(config, tmp_path / "x.yaml", ended(*STEPS))
    (problem,) = run.problems
    assert problem.startswith(f"{name} cannot be read: ")
    assert problem.endswith("build again")
    artifact = artifact_of(run, "ort/fp32")
    whys = [artifact.accuracy.top1.why, artifact.latency.why]
    assert whys.count(problem) == {"export": 0, "ort/fp32": 2}.get(name, 1)


def test_measurements_of_an_earlier_version_are_told(tmp_path: Path) -> None:
    """Before, the end-to-end latency did not say of which batch it was."""
    config = configured(tmp_path)
    make = fill(config)
    facts = dict(Artifact.read(config.folder / "bench/ort").facts)
    facts["end_to_end"] = facts["end_to_end"]["latency"]
    make.make("bench/ort", facts, "ort/fp32", "ort/int8")
    run = collect(config, tmp_path / "x.yaml", ended("export"))
    assert run.problems[0].startswith("bench/ort cannot be read: bench/ort: measured.end_to_end.")
    assert run.measured("ort") is None


def test_what_a_form_found_against_itself_reaches_the_artifact(tmp_path: Path) -> None:
    config = configured(tmp_path)
    make = fill(config)
    found = {"why_not": "it loses 2 points", "why_slow": "too slow"}
    facts = {**Artifact.read(config.folder / "precision/float16").facts, **found}
    make.make("precision/float16", facts, "onnx")
    run = collect(config, tmp_path / "x.yaml", ended("precision/float16"))
    half, single = artifact_of(run, "trt/fp16"), artifact_of(run, "ort/fp32")
    assert (half.why_not, half.why_slow) == ("it loses 2 points", "too slow")
    assert (single.why_not, single.why_slow) == ("", "")


def test_what_a_form_or_a_target_raised_reaches_the_artifact(tmp_path: Path) -> None:
    config = configured(tmp_path)
    make = fill(config)
    form = RepairFacts("float16", "", (), 40, 0.0, 1e-3, 6.0, "", 64, 1)
    own = replace(form, parts=30)
    facts = Artifact.read(config.folder / "precision/float16").facts
    make.make("precision/float16", {**facts, "repair": form.to_dict()}, "onnx")
    make.make("coreml/fp16", BuildFacts("coreml", "fp16", repair=own), size=9)
    run = collect(config, tmp_path / "x.yaml", ended("precision/float16", "coreml/fp16"))
    assert artifact_of(run, "trt/fp16").repair == form
    assert artifact_of(run, "coreml/fp16").repair == own
    assert artifact_of(run, "ort/fp32").repair is None


def test_seconds_are_of_the_step_and_no_fact_of_it(tmp_path: Path) -> None:
    config = configured(tmp_path)
    make = fill(config)
    make.make("ort/fp32", {"target": "ort", "precision": "fp32"}, "onnx", seconds=2.5)
    built = artifact_of(collect(config, tmp_path / "x.yaml", ended("ort/fp32")), "ort/fp32").built
    assert built is not None
    assert built.build_seconds == 2.5
    assert built.facts == BuildFacts("ort", "fp32")
    assert replace(built, build_seconds=None).facts.more == {}


def reported(config: Config) -> Run:
    """Write a report of what lies there, all of it made by this run."""
    return write(config, config.folder / "pipeline.yaml", ended(*STEPS))


def test_the_report_states_the_seals_of_all(tmp_path: Path) -> None:
    config = configured(tmp_path)
    fill(config)
    run = reported(config)
    assert dict(run.seals) == {name: a.seal for name, a in Library(config.folder).artifacts.items()}
    assert {"export", "validate/ort-fp32", "bench/ort"} <= set(run.seals)
    Stated(config.folder).announce("export", "0" * 64)
    reported(config)
    assert Stated(config.folder).made_since == {}


@pytest.mark.parametrize("name", ["ort/fp32", "validate/ort-fp32", "bench/ort", "export"])
def test_what_was_edited_since_gives_no_figure_and_is_not_stated(tmp_path: Path, name: str) -> None:
    config = configured(tmp_path)
    fill(config)
    before = reported(config)
    sign_again(config.folder / name, lambda values: values["tools"].update(more="1"))
    run = write(config, tmp_path / "x.yaml", ended("calibration"))
    (problem,) = run.problems
    assert problem.startswith(f"{name} cannot be read: ")
    assert problem.endswith("tells of: run python -m pipeline run again")
    assert run.seals == before.seals
    # Neither is it in the next report.
    assert write(config, tmp_path / "x.yaml", ended("calibration")).problems == run.problems
    # A run that looked at it has made it anew, or found that it is right.
    assert write(config, tmp_path / "x.yaml", ended(name)).problems == ()


def test_what_has_no_seal_gives_no_figure(tmp_path: Path) -> None:
    config = configured(tmp_path)
    fill(config)
    path = config.folder / "bench/ort" / MANIFEST
    values = json.loads(path.read_text())
    old = {key: value for key, value in values.items() if key not in ("seal", "seals")}
    path.write_text(json.dumps({**old, "format": 1}))
    run = reported(config)
    assert "bench/ort cannot be read" in run.problems[0]
    assert "has no seal: made by an older version" in run.problems[0]
    assert "bench/ort" not in run.seals
