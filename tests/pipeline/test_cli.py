"""The command line, through `CliRunner` and through real processes, on one real small run."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.commands import bench as commands_bench
from pipeline.core import machine
from pipeline.core.answers import Answers
from pipeline.core.cpu_classes import CpuClass, Purpose
from pipeline.core.garbage import GARBAGE
from pipeline.report.model import Run
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.facts.bench import Measured
from pipeline.targets.registry import TARGETS, able
from tests.pipeline.steps.making import other_content, other_fact

ROOT = Path(__file__).parents[2]

CONFIG = """\
name: trial
model: {name: care_tiny, checkpoint: embedded}
data: {validation: fashion-mnist, calibration: fashion-mnist}
calibration: {images: 32}
targets:
  trt: {precisions: [fp16], compute_capabilities: ["8.9"]}
  ort: {precisions: [fp32]}
  coreml: {precisions: [fp16]}
validation: {images: 100, gates: {max_top1_drop: 0.05}}
bench: {batches: [1], samples: 5, warmup: 1, max_seconds: 2}
output: OUTPUT
"""

BUILT = ("trt/fp16", "ort/fp32", "coreml/fp16")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def process(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=merged, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "pipeline.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(folder / "engines")))
    return path


@pytest.fixture(scope="module")
def finished(config: Path, begin: Callable[[Path], Path]) -> Path:
    """A finished run: three targets from one checkpoint."""
    begin(config.parent / "engines" / "trial")
    result = invoke("run", str(config))
    assert result.exit_code == 0, result.output
    return config.parent / "engines" / "trial"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A configuration and a copy of the finished run to change."""
    engines = tmp_path / "engines"
    shutil.copytree(finished.parent, engines)
    path = tmp_path / "pipeline.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(engines)))
    return path, engines / "trial"


def assert_built_as(before: dict[str, Artifact], folder: Path) -> None:
    """What lies there now was built from the same by the same, is whole and behaves alike."""
    for name, old in before.items():
        new = Artifact.read(folder / name)
        new.verify()
        assert (new.key, new.tools, set(new.files)) == (old.key, old.tools, set(old.files))
        # An engine's bytes are the same in one process layout only; these facts always.
        for fact in ("input", "output", "batches", "network", "graph_sha256"):
            assert new.facts.get(fact) == old.facts.get(fact)
        if not name.startswith("trt/"):
            assert new.digest == old.digest
    result = invoke("check", "--output", str(folder.parent))
    assert result.exit_code == 0, result.output


def artifacts(folder: Path) -> dict[str, Artifact]:
    return {name: Artifact.read(folder / name) for name in BUILT}


def test_objects_that_stay_are_not_gone_through_again_and_again() -> None:
    gc.set_threshold(700, 10, 10)
    CliRunner().invoke(main, ["doctor", "--help"])
    assert gc.get_threshold() == GARBAGE


def test_a_run_leaves_artifacts_results_and_reports(finished: Path) -> None:
    for name in ("export", "onnx", *BUILT, "validate/pytorch"):
        Artifact.read(finished / name).verify()
    # What was timed says where; the rest is the same on any machine.
    for name in ("ort/fp32", "bench/ort"):
        assert Artifact.read(finished / name).facts["measured_on"] == machine.cpu_class()
    for name in ("trt/fp16", "coreml/fp16"):
        assert "measured_on" not in Artifact.read(finished / name).facts
    samples = Artifact.read(finished / "validate/samples").facts
    assert samples["data"]["identity"] == "content"
    run = Run.read(finished / "results.json")
    top1 = {artifact.name: artifact.accuracy.top1 for artifact in run.artifacts}
    assert top1["ort/fp32"].state == "measured"
    assert top1["trt/fp16"].state == "emulated"
    assert top1["coreml/fp16"].state in ("emulated", "measured")
    assert all((number.value or 0) > 0.8 for number in top1.values())
    latency = {artifact.name: artifact.latency for artifact in run.artifacts}
    assert latency["trt/fp16"].state == "not measured"
    assert latency["trt/fp16"].why
    assert (latency["ort/fp32"].value or 0) > 0
    assert "<html" in (finished / "report.html").read_text()
    markdown = (finished / "report.md").read_text()
    assert "CARE-S0" not in markdown  # it is of another network, on other images
    assert "not measured" in markdown


def test_a_second_run_imports_no_runtime_and_does_nothing(config: Path, finished: Path) -> None:
    program = (
        "import sys; from pipeline.cli import main\n"
        f"try: main(['run', {str(config)!r}, '--log-json'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = [m for m in ('torch', 'onnx', 'onnxruntime', 'coremltools') if m in sys.modules]\n"
        "print('CODE', code, heavy)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.splitlines()[-1] == "CODE 0 []"
    events = [json.loads(line) for line in run.stderr.splitlines() if line.startswith("{")]
    assert {event["state"] for event in events if event["event"] == "finished"} == {"up to date"}
    assert events[0] == {"event": "costs", "lines": []}
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("summary", 0)
    assert events[-1]["use"] == {"trt": "fp16", "ort": "fp32", "coreml": "fp16"}
    assert any("calls were timed, and 30 are needed" in line for line in events[-1]["alerts"])


def planned(path: Path, *options: str) -> set[str]:
    """Names of the steps that would run."""
    output = invoke("run", str(path), "--dry-run", *options).output
    plan = output.partition("\n\n")[0]  # what it costs comes after
    rows = [line.strip().split(maxsplit=2) for line in plan.splitlines()]
    return {row[1] for row in rows if len(row) == 3 and row[2] != "up to date"}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_only_what_a_change_touches_would_run(copied: tuple[Path, Path]) -> None:
    path, folder = copied
    assert planned(path) == set()
    for file in folder.rglob("*"):
        os.utime(file)
    assert planned(path) == set()
    edit(path, "samples: 5", "samples: 6")
    assert planned(path) == {"bench/trt", "bench/ort", "bench/coreml"}
    edit(path, "samples: 6", "samples: 5")
    edit(path, '["8.9"]', '["8.6"]')
    assert planned(path) == {"trt/fp16", "validate/trt-fp16", "bench/trt"}
    assert planned(path, "--target", "ort") == set()
    output = invoke("run", str(path), "--dry-run").output
    assert re.search(r"trt/fp16 .* about \d+ s, as last time$", output, re.MULTILINE)
    assert re.search(r"^3 steps to run: about \d+ s", output, re.MULTILINE)
    assert re.search(r"^with 50,000 validation images all steps: about \d", output, re.MULTILINE)


def test_another_checkpoint_rebuilds_everything(copied: tuple[Path, Path]) -> None:
    path, _ = copied
    edit(path, "checkpoint: embedded", "checkpoint: random")
    # The images are the same; everything that comes from the weights is not.
    assert set(BUILT) | {"export", "onnx", "validate/pytorch"} <= planned(path)


def test_check_is_content_with_a_finished_run(finished: Path) -> None:
    result = invoke("check", "trial", "--output", str(finished.parent))
    assert result.exit_code == 0, result.output
    for name in BUILT:
        assert f"trial/{name}" in result.output


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "trt/fp16/model.engine", 10), "has changed"),
        (lambda f: flip(f / "trt/fp16/model.engine", 50_000), "has changed"),
        (lambda f: flip(f / "trt/fp16/model.engine", -1), "has changed"),
        (lambda f: (f / "trt/fp16/model.engine").unlink(), "is missing"),
        (lambda f: (f / "ort/fp32/other.bin").write_bytes(b"x"), "does not belong"),
        (lambda f: (f / "ort/fp32/artifact.json").unlink(), "artifact.json is missing"),
        (lambda f: (f / "coreml/fp16/artifact.json").write_text("{"), "is damaged"),
        (lambda f: shutil.rmtree(f / "export"), "export, from which"),
        (lambda f: edit(f / "validate/ort-fp32/artifact.json", "0.9", "0.8"), "has changed since"),
        (lambda f: edit(f / "validate/trt-fp16/artifact.json", "emulated", "measured"), "changed"),
        (lambda f: other_fact(f / "bench/ort"), "bench/ort is not what results.json"),
        (lambda f: other_content(f / "onnx", b"x", "model.onnx"), "onnx is not what results.json"),
        (lambda f: edit(f / "results.json", "emulated", "measured"), "results.json has changed"),
        (lambda f: (f / "results.json").write_text("[" * 9000), "results.json is damaged"),
        (lambda f: shutil.rmtree(f / "bench/ort"), "tells of bench/ort, which is missing"),
        (lambda f: (f / "onnx/more").symlink_to("/etc"), "it is a link"),
        (lambda f: (f / "onnx/more").mkdir(), "it is a folder"),
        (lambda f: os.mkfifo(f / "onnx/more"), "it is a pipe"),
    ],
)
def test_check_finds_damage(
    copied: tuple[Path, Path], damage: Callable[[Path], None], message: str
) -> None:
    _path, folder = copied
    damage(folder)
    result = invoke("check", "--output", str(folder.parent))
    assert result.exit_code == 1
    assert message in result.output
    assert "python -m pipeline run" in result.output


@pytest.mark.parametrize(
    ("damage", "leaves"),
    [
        (lambda f: None, True),
        (lambda f: other_fact(f / "trt/fp16"), True),
        (lambda f: other_fact(f / "ort/fp32"), False),
        (lambda f: other_content(f / "ort/fp32", b"garbage", "model.onnx"), False),
        (lambda f: other_fact(f / "onnx"), False),
        (lambda f: other_fact(f / "export"), False),
        (lambda f: edit(f / "onnx/artifact.json", "Coat", "Boat"), False),
        (lambda f: (f / "ort/fp32/notes.txt").write_text("x"), False),
        (lambda f: (f / "results.json").unlink(), True),
        (lambda f: edit(f / "results.json", "emulated", "measured"), False),
    ],
)
def test_only_what_is_whole_is_exported(
    copied: tuple[Path, Path], damage: Callable[[Path], None], leaves: bool
) -> None:
    _path, folder = copied
    damage(folder)
    models = folder.parent / "models"
    arguments = ("--output", str(folder.parent), "--repository", str(models))
    result = invoke("export", "triton", "trial", *arguments)
    assert result.exit_code == (0 if leaves else 2), result.output
    assert models.exists() is leaves


def test_a_run_mends_damage(copied: tuple[Path, Path]) -> None:
    path, folder = copied
    before = artifacts(folder)
    flip(folder / "trt/fp16/model.engine", 10)
    assert planned(path, "--only", "build") == {"trt/fp16"}
    # The whole run: an engine of other bytes, as another process layout gives, is judged anew.
    assert process("run", str(path), "--quiet").returncode == 0
    assert planned(path) == set()
    assert_built_as(before, folder)


def test_a_gate_that_does_not_hold_is_exit_code_1(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = copied
    edit(path, "max_top1_drop: 0.05", "max_latency_ms: 0.000001")
    # A few calls on a busy machine decide nothing.
    result = invoke("run", str(path), "--quiet")
    assert result.exit_code == 0, result.output
    assert "latency is not to be trusted" in result.output
    monkeypatch.setattr(Measured, "doubt", lambda self, runner: "")
    result = invoke("run", str(path), "--quiet")
    assert result.exit_code == 1
    assert "gate failed: ort/fp32: latency in ms" in result.output
    # Nothing had to run again for it.
    assert "trt/fp16: latency" not in result.output


def test_a_run_of_one_stage_claims_no_more(copied: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = copied
    result = invoke("run", str(path), "--only", "export", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "All that was selected is done, 1 of " in result.stdout
    assert "from an earlier run" in result.stdout
    before = Artifact.read(folder / "export")
    shutil.rmtree(folder)
    result = invoke("run", str(path), "--only", "export", "--quiet")
    assert result.exit_code == 0, result.stderr
    text = f"{result.stdout}{(folder / 'report.md').read_text()}"
    assert "not selected in this run" in text
    assert "was not built" not in text
    assert "Everything was built" not in text
    again = Artifact.read(folder / "export")
    assert (again.key, again.digest) == (before.key, before.digest)


def test_the_log_is_shown_and_ci_is_told_where_that_is_asked_for(
    copied: tuple[Path, Path], tmp_path: Path
) -> None:
    path, _ = copied
    junit = tmp_path / "junit.xml"
    options = ("--only", "bench", "--target", "ort", "--force", "--log-json", "-v")
    result = invoke("run", str(path), *options, "--junit", str(junit))
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert {"event": "log", "text": "bench/ort: asked for"} in events
    text = junit.read_text()
    assert 'classname="bench" name="bench/ort"' in text
    assert 'classname="gates" name="ort/fp32"' in text
    assert 'failures="0"' in text
    junit.write_text("precious")
    result = invoke("run", str(path), *options, "--junit", str(junit))
    assert (result.exit_code, junit.read_text()) == (2, "precious")


def completed(words: str, folder: Path) -> list[str]:
    """What a shell offers for the last of some words."""
    program = "from pipeline.cli import main; main(prog_name='care-deploy')"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_CARE_DEPLOY_COMPLETE": "bash_complete",
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=True
    )
    return done.stdout.splitlines()


def test_a_shell_completes_commands_options_targets_and_results(tmp_path: Path) -> None:
    (tmp_path / "engines/trial/onnx").mkdir(parents=True)
    (tmp_path / "engines/trial/onnx" / MANIFEST).write_text("{}")
    assert "plain,bundle" in completed("care-deploy bu", tmp_path)
    assert "plain,--dry-run" in completed("care-deploy run --dry", tmp_path)
    assert completed("care-deploy bench --target co", tmp_path) == ["plain,coreml", "plain,coreai"]
    assert completed("care-deploy bundle tr", tmp_path) == ["plain,trial"]
    assert completed("care-deploy run pipel", tmp_path) == ["file,pipel"]
    assert not any(completed("care-deploy bundle tr", tmp_path / "engines"))


def test_bench_prints_a_table_and_one_json_line(config: Path, finished: Path) -> None:
    result = invoke("bench", "--target", "ort", "--config", str(config), "--batch", "2")
    assert result.exit_code == 0, result.stderr
    plain = json.loads(result.stdout.splitlines()[-1])
    assert set(plain["batches"]) == {"2"}
    assert set(plain["batches"]["2"]["phases"]) == {"fp32", "pytorch"}
    assert plain["machine"]["cpus_granted"] >= 1
    assert any("fp32" in line and "engine" in line for line in result.stdout.splitlines())
    # Distinct images of the run, whose answers are those of the validation: two a call.
    assert plain["distinct"] == 10
    for name in ("fp32", "pytorch"):
        assert plain["answers"][name]["calls"] > 0
        assert plain["answers"][name]["wrong"] == 0
    assert plain["repeated"]["fp32"]["calls"] > 0
    assert plain["memory"]["fp32"]["peak"]["value"] > plain["memory"]["fp32"]["before"] > 1e6
    assert plain["validity"]["2"]["fp32"]["p99"].startswith("invalid: ")
    text = " ".join(result.stdout.split())
    assert "timed calls were given 10 distinct images in turn" in text
    assert "answers of timed calls are those of the validation" in text
    assert "fp32: peak memory" in text


@pytest.mark.parametrize("command", ["validate", "bench"])
def test_what_speaks_against_answers_here_is_on_the_screen(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    told = "ort/int8 is certified for AVX2 + VNNI, not for this CPU"
    monkeypatch.setattr(type(TARGETS["ort"]), "doubt", lambda self, artifact: told)
    fast = () if command == "validate" else ("--samples", "3", "--max-seconds", "1")
    with pytest.warns(UserWarning, match=re.escape(told)):  # for programs; people see a line
        result = invoke(command, "--target", "ort", "--config", str(config), *fast)
    assert result.exit_code == 0, result.output
    assert f"(!) {told}" in " ".join(result.stdout.split())


def test_validate_prints_a_table_and_one_json_line(config: Path, finished: Path) -> None:
    result = process("validate", "--target", "ort", "--config", str(config))
    assert result.returncode == 0, result.stderr
    plain = json.loads(result.stdout.splitlines()[-1])
    stored = Run.read(finished / "results.json")
    top1 = next(a.accuracy.top1 for a in stored.artifacts if a.name == "ort/fp32")
    assert plain["accuracy"]["fp32"]["top1"]["value"] == top1.value
    assert (plain["state"], plain["as_cpu"]) == ("measured", None)
    assert "ort/fp32" in result.stdout


METRICS = """\
def halves(logits, labels):
    right = logits.argmax(1) == labels
    return {"first_half": float(right[: len(right) // 2].mean())}
"""


@pytest.mark.parametrize("as_cpu", [None, pytest.param("avx2", marks=pytest.mark.slow)])
def test_validate_shows_the_worst_class_and_own_measures(
    copied: tuple[Path, Path], as_cpu: str | None
) -> None:
    path, folder = copied
    (path.parent / "own.py").write_text(METRICS)
    own = 'validation: {metrics: "own:halves", images: 100'
    path.write_text(path.read_text().replace("validation: {images: 100", own))
    options = ("--as-cpu", as_cpu) if as_cpu else ()
    command = ("validate", "--target", "ort", "--config", str(path), *options)
    result = process(*command, cwd=path.parent)
    if as_cpu and result.returncode == 4:
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["accuracy"]["fp32"]
    stored = next(
        a.accuracy for a in Run.read(folder / "results.json").artifacts if a.name == "ort/fp32"
    )
    assert stored.by_class is not None
    state = "measured here, restricted" if as_cpu else "measured"
    assert found["by_class"]["worst"] == stored.by_class.worst
    assert found["by_class"]["classes"] == stored.by_class.classes
    assert found["by_class"]["top1"]["state"] == found["metrics"]["first_half"]["state"] == state
    text = " ".join(result.stdout.split())
    assert f"ort/fp32: worst class: {stored.by_class.worst}: " in text
    assert "ort/fp32: first_half: 0." in text


@pytest.mark.parametrize("command", ["validate", "bench"])
def test_a_class_that_this_machine_cannot_play_is_exit_code_4(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from pipeline.targets.ort import as_cpu

    def why_not(cls: CpuClass, purpose: Purpose) -> str:
        return f"needs a compiler for {purpose} of {cls.title}"

    monkeypatch.setattr(as_cpu, "why_not", why_not)
    result = invoke(command, "--target", "ort", "--config", str(config), "--as-cpu", "avx2-vnni")
    assert result.exit_code == 4
    what = "answers" if command == "validate" else "answers and times"
    told = f"as avx2-vnni not measured: needs a compiler for {what} of AVX2 + VNNI"
    assert told in result.output


def test_more_threads_than_granted_are_refused(config: Path, finished: Path) -> None:
    result = invoke("bench", "--target", "ort", "--config", str(config), "--threads", "4096")
    assert result.exit_code == 2
    assert "4096 threads are asked for, this process may use 1 to " in result.output


@pytest.mark.parametrize("command", ["validate", "bench"])
def test_a_class_that_does_not_exist_is_exit_code_2(config: Path, command: str) -> None:
    result = invoke(command, "--target", "ort", "--config", str(config), "--as-cpu", "avx9")
    assert result.exit_code == 2
    assert "'avx9' is not one of 'avx512-vnni', 'avx512', 'avx2-vnni', 'avx2'" in result.output


def test_bench_beside_busy_processes_says_so(config: Path, finished: Path) -> None:
    longer = ("--contended", "--sustained", "0.2")
    result = invoke("bench", "--target", "ort", "--config", str(config), *longer)
    assert result.exit_code == 0, result.stderr
    plain = json.loads(result.stdout.splitlines()[-1])
    assert plain["rivals"] >= 1
    assert "measured, beside " in result.stdout
    assert set(plain["sustained"]) == {"fp32"}
    assert plain["sustained"]["fp32"]["seconds"] >= 0.2
    assert plain["sustained"]["fp32"]["answers"]["wrong"] == 0
    assert "s without a rest: " in result.stdout


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "1e9"])
def test_how_long_without_a_rest_is_a_number_of_seconds(config: Path, seconds: str) -> None:
    bench = ("bench", "--target", "ort", "--config", str(config))
    for option in ("--sustained", "--max-seconds"):
        if (option, seconds) == ("--max-seconds", "1e9"):
            continue  # a limit may be far away
        result = invoke(*bench, option, seconds)
        assert result.exit_code == 2
        assert option in result.output


def test_without_a_rest_is_for_this_machine(config: Path) -> None:
    bench = ("bench", "--target", "coreml", "--config", str(config))
    result = invoke(*bench, "--device", "iphone", "--sustained", "1")
    assert result.exit_code == 2
    assert "--sustained measures on this machine" in result.output


def test_without_the_images_of_a_run_nothing_is_compared(copied: tuple[Path, Path]) -> None:
    path, folder = copied
    shutil.rmtree(folder / "validate/samples")
    result = invoke("bench", "--target", "ort", "--config", str(path), "--samples", "3")
    assert result.exit_code == 0, result.stderr
    plain = json.loads(result.stdout.splitlines()[-1])
    assert plain["distinct"] == 3
    assert plain["answers"]["fp32"]["why_not"].startswith("no run has judged these images")


def test_only_a_target_can_be_measured_as_on_another_cpu(config: Path, finished: Path) -> None:
    result = invoke("bench", "--target", "torch", "--config", str(config), "--as-cpu", "avx2")
    assert result.exit_code == 2
    assert "--as-cpu measures a target, not torch" in result.output
    result = invoke("validate", "--target", "trt", "--config", str(config), "--as-cpu", "avx2")
    assert result.exit_code == 4
    assert "does not run as on another CPU" in result.output


def test_bench_fails_where_answers_are_not_those_that_were_judged(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.core.answers.TOLERANCE", -1.0)
    result = invoke("bench", "--target", "ort", "--config", str(config), "--samples", "3")
    assert result.exit_code == 1, result.output
    assert "are not those of the validation" in result.output
    assert json.loads(result.output.splitlines()[-1])["answers"]["fp32"]["wrong"] == 3


def test_answers_without_a_rest_count_as_well() -> None:
    for wrong in (0, 1):
        lasting = SimpleNamespace(answers=Answers(5, wrong, 0.5))
        measured: Any = SimpleNamespace(answers={}, sustained={"fp32": lasting})
        assert commands_bench._answers_wrong(measured) is bool(wrong)


def test_help_of_bench_names_every_target_with_devices() -> None:
    told = " ".join(invoke("bench", "--help").output.split())
    for option in ("--import", "--device"):
        text = told[told.index(f" {option} ") :][:160]
        for name in able("measure_on"):
            assert name in text


def test_bench_of_pytorch_alone(config: Path, finished: Path) -> None:
    result = invoke("bench", "--target", "torch", "--config", str(config), "--json")
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["batches"]["1"]["phases"]) == {"pytorch"}


def test_bench_shows_the_time_by_operator(config: Path, finished: Path) -> None:
    result = invoke("bench", "--target", "ort", "--config", str(config), "--profile")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["profile"]["fp32"]
    assert any("Conv" in row["operator"] for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert "fp32 by operator" in result.stdout


def test_calibrate_shows_ranges_and_keeps_them(copied: tuple[Path, Path]) -> None:
    path, folder = copied
    result = invoke("calibrate", "--config", str(path), "--limit", "3", "--method", "min-max")
    assert result.exit_code == 0, result.stderr
    assert "more that are clipped less" in result.stdout
    made = folder / "ranges/min-max-int8"
    before = (made / MANIFEST).stat().st_mtime_ns
    assert invoke("check", "trial", "--output", str(folder.parent)).exit_code == 0
    again = invoke("calibrate", "--config", str(path), "--limit", "3", "--method", "min-max")
    assert again.stdout == result.stdout
    assert (made / MANIFEST).stat().st_mtime_ns == before, "it was up to date"
    ranges = made / "ranges.json"
    ranges.write_text(ranges.read_text().replace("0", "1", 1))
    mended = invoke("calibrate", "--config", str(path), "--limit", "3", "--method", "min-max")
    assert mended.stdout == result.stdout
    edit(path, "checkpoint: embedded", "checkpoint: random")
    result = invoke("calibrate", "--config", str(path))
    assert result.exit_code == 2
    assert "run python -m pipeline run first" in result.stderr


def test_diff_compares_layer_by_layer(config: Path, finished: Path) -> None:
    result = invoke("diff", "--config", str(config), "--images", "2")
    assert result.exit_code == 0, result.stderr
    assert "stages.0.blocks.0" in result.stdout
    assert "it jumps nowhere" in result.stdout


@pytest.mark.parametrize("target", ["trt", "ort", "coreml"])
def test_diff_names_the_modules_of_the_network(config: Path, finished: Path, target: str) -> None:
    result = invoke("diff", "--config", str(config), "--target", target, "--images", "2", "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert (plain["target"], plain["jump"]) == (target, None)
    modules = [row["module"] for row in plain["layers"]]
    assert modules[0] == "stem"
    assert modules[-1] == "head"
    assert {"stages.0.blocks.0.inter1_fc1", "stages.3.blocks.1.inter2_conv"} <= set(modules)
    assert all(row["relative"] < 1e-2 for row in plain["layers"])


@pytest.mark.parametrize("target", ["trt", "ort"])
def test_diff_refuses_a_graph_that_is_not_as_it_was_made(
    copied: tuple[Path, Path], target: str
) -> None:
    path, folder = copied
    graph = folder / "onnx/model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x0a\x00")
    result = invoke("diff", "--config", str(path), "--target", target)
    assert result.exit_code == 2
    assert "onnx" in result.output


def test_export_triton(finished: Path, tmp_path: Path) -> None:
    output, repository = str(finished.parent), tmp_path / "models"
    arguments = ("export", "triton", "trial", "--output", output, "--repository", str(repository))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert (repository / "trial" / "config.pbtxt").is_file()
    result = invoke(*arguments, "--precision", "int8")
    assert result.exit_code == 2
    assert "built are: fp32" in result.output


def test_a_measurement_from_a_device_reaches_the_report(copied: tuple[Path, Path]) -> None:
    from pipeline.targets.coreml.package import digest

    path, folder = copied
    swift = path.parent / "swift"
    result = invoke(
        "export", "coreml-bench", "trial", "--output", str(folder.parent), "--folder", str(swift)
    )
    assert result.exit_code == 0, result.output
    assert (swift / "Package.swift").is_file()
    measured = {
        "format": "care-deploy/coreml-bench/1",
        "measured_at": "2026-01-02T03:04:05Z",
        "model": {
            "name": "trial/fp16",
            "digest": digest(folder / "coreml/fp16/model.mlpackage"),
        },
        "device": {"model": "iPhone14,5", "os": "iOS 18.2"},
        "runs": [{"compute_units": "all", "predict_ms": [1.0, 1.5, 1.25]}],
    }
    file = path.parent / "result.json"
    file.write_text(json.dumps(measured))
    bench = ("bench", "--target", "coreml", "--config", str(path), "--import", str(file))
    result = invoke(*bench)
    assert result.exit_code == 0, result.output
    assert "1.250 ms on iPhone14,5" in result.output
    assert planned(path) == set()
    assert process("run", str(path), "--quiet").returncode == 0
    run = Run.read(folder / "results.json")
    latency = {artifact.target: artifact.latency for artifact in run.artifacts}["coreml"]
    assert (latency.value, latency.state) == (1.25, "measured")
    page = (folder / "report.html").read_text()
    assert "Measured on devices" in page
    assert "Fitness for the Neural Engine" in page
    assert "iPhone14,5, iOS 18.2" in page
    result = invoke(*bench, "--device", "ipad")
    assert result.exit_code == 2
    assert "a device of class iphone, where ipad was asked for" in result.output
    measured["model"] = {"name": "other", "digest": "0" * 64}
    file.write_text(json.dumps(measured))
    result = invoke(*bench)
    assert result.exit_code == 2
    assert "the result is of another model" in result.output
    file.write_text("{")
    result = invoke(*bench)
    assert result.exit_code == 2
    assert "is no JSON" in result.output
    # What was taken over before is still there.
    assert planned(path) == set()


def test_a_report_of_xcode_reaches_the_report(copied: tuple[Path, Path]) -> None:
    from pipeline.emulate.mil.program import read_program

    path, folder = copied
    operations = [
        {"operatorName": f"ios16.{op.type}", "outputs": [{"name": op.outputs[0][0]}]}
        for op in read_program(folder / "coreml/fp16/model.mlpackage").operations
    ]
    for operation in operations:
        kind = "cpu" if "softmax" in operation["operatorName"] else "neuralEngine"
        operation["deviceUsage"] = {"preferred": {"deviceType": {kind: {}}}}  # type: ignore[assignment]
    block = {"operations": operations}
    content = {
        "computeUnit": 3,
        "deviceInfo": {
            "modelName": "iPhone 16",
            "osNameAndVersionWithoutBuildNumber": "iOS 26.3.1",
        },
        "deviceResults": {
            "predict": {"samples": [0.001, 0.0015, 0.00125]},
            "modelStructure": {"program": {"_0": {"functions": {"main": {"block": block}}}}},
        },
    }
    file = path.parent / "trial.mlperf"
    file.mkdir()
    (file / "report.json").write_text(json.dumps(content))
    bench = ("bench", "--target", "coreml", "--config", str(path), "--import", str(file))
    result = invoke(*bench)
    assert result.exit_code == 0, result.output
    assert "coreml/fp16: 1.250 ms on iPhone 16 (cpu_and_neural_engine)" in result.output
    assert process("run", str(path), "--quiet").returncode == 0
    page = (folder / "report.html").read_text()
    assert "recognized by its operations, not its weights" in page
    assert "Operations outside the Neural Engine" in page
    block["operations"] = operations[:-1]
    (file / "report.json").write_text(json.dumps(content))
    result = invoke(*bench)
    assert result.exit_code == 2
    assert "is of another model" in result.output
    result = invoke(*bench, "--precision", "int8")
    assert result.exit_code == 2
    assert "coreml is not configured for int8" in result.output


def test_fitness_advises(config: Path, finished: Path) -> None:
    result = invoke("fitness", "--config", str(config))
    assert result.exit_code == 0, result.stderr
    assert "no tensor has more than 4 axes" in result.stdout
    assert "largest magnitude" in result.stdout
    result = invoke("fitness", "--config", str(config), "--target", "ort")
    assert result.exit_code == 2
    assert "ort has no checks of fitness" in result.stderr


def test_one_command_measures_on_a_mac_and_on_its_phone(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what a Mac has; `test_device.py` tests what they stand for."""
    from pipeline.targets.coreml import device
    from pipeline.targets.coreml.package import digest
    from pipeline.targets.coreml.results import Measurements

    path, folder = copied
    path.write_text(
        path.read_text().replace(
            "coreml: {precisions: [fp16]}", "coreml: {precisions: [fp16], signing_team: A1}"
        )
    )
    assert planned(path) == set()  # who signs changes no artifact
    asked: list[object] = []

    def measured(model: str) -> Callable[..., Measurements]:
        def measure(artifact: Artifact, package: Path, **more: object) -> Measurements:
            asked.append(more)
            runs = [{"compute_units": "all", "predict_ms": [2.0] * 3}]
            content = {
                "source": "a stand-in",
                "measured_at": "2026-01-02T03:04:05Z",
                "model": {"name": artifact.name, "digest": digest(package)},
                "device": {"model": model, "os": "x"},
                "runs": runs,
            }
            return Measurements.model_validate(content)

        return measure

    def compared(artifact: Artifact, images: object, expected: object) -> dict[str, object]:
        return {"cpu_only": {"agreement": 1.0}, "all": {"agreement": 0.996}}

    monkeypatch.setattr(device, "require_mac", lambda: None)
    monkeypatch.setattr(device, "measure_mac", measured("Mac14,7"))
    monkeypatch.setattr(device, "measure_connected", measured("iPhone16,1"))
    monkeypatch.setattr(device, "compare_units", compared)
    bench = ("bench", "--target", "coreml", "--config", str(path), "--samples", "3")
    result = invoke(*bench, "--device", "mac")
    assert result.exit_code == 0, result.output
    assert "coreml/fp16: 2.000 ms on Mac14,7 (all)" in result.output
    facts = Artifact.read(folder / "bench/coreml").facts
    assert [row["agreement"] for row in facts["agreement_by_compute_units"]] == [1.0, 0.996]
    result = invoke(*bench, "--device", "iphone")
    assert "2.000 ms on iPhone16,1" in result.output
    assert asked[-1] == {"kind": "iphone", "signing": device.Signing(team="A1"), "samples": 3}


@pytest.mark.skipif(platform.system() == "Darwin", reason="a Mac measures")
@pytest.mark.parametrize("device", ["mac", "iphone"])
def test_measuring_on_apples_devices_needs_a_mac(config: Path, finished: Path, device: str) -> None:
    arguments = ("--target", "coreml", "--config", str(config), "--device", device)
    result = invoke("bench", *arguments)
    assert result.exit_code == 4
    assert "run the same command on a Mac" in result.output
    result = invoke("bench", "--target", "ort", "--config", str(config), "--device", device)
    assert result.exit_code == 2


@pytest.mark.parametrize("target", ["trt", "coreml"])
def test_bench_off_the_right_hardware_says_what_is_missing(
    config: Path, finished: Path, target: str
) -> None:
    result = invoke("bench", "--target", target, "--config", str(config))
    if result.exit_code == 0:
        pytest.skip(f"this machine can measure {target}")
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1].startswith("error: not measured: ")
    assert "Traceback" not in result.stderr


def test_bench_needs_what_it_measures(config: Path, finished: Path, tmp_path: Path) -> None:
    result = invoke("bench", "--target", "ort", "--config", str(config), "--precision", "int8")
    assert result.exit_code == 2
    assert "ort is not configured for int8: there are fp32" in result.output
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("name: trial", "name: other"))
    result = invoke("bench", "--target", "ort", "--config", str(other))
    assert result.exit_code == 2
    assert "is not built yet: run python -m pipeline run" in result.output


def wait_for_work(run: subprocess.Popen[str], folder: Path, left: set[Path]) -> None:
    """Wait until a run makes something; `left` is what killed ones left behind."""
    # A limit for a run that hangs; there is no saying how long one takes on a busy machine.
    deadline = time.monotonic() + 600
    while not set(folder.glob(".making-*")) - left:
        assert run.poll() is None, f"it ended before: {run.communicate()}"
        assert time.monotonic() < deadline, "it makes nothing"
        time.sleep(0.02)


def test_killed_and_interrupted_runs_continue(copied: tuple[Path, Path]) -> None:
    path, folder = copied
    before = artifacts(folder)
    # Not the export, which takes longer: another test makes it anew, equal to the byte.
    shutil.rmtree(folder / "onnx")
    shutil.rmtree(folder / "trt")
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--only", "simplify"]
    command += ["--only", "build", "--quiet"]
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        left = set(folder.glob(".making-*"))
        with subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A shell's background job, as this suite may be, hands down that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as run:
            try:
                wait_for_work(run, folder, left)
                run.send_signal(sent)
                _, error = run.communicate()
            finally:
                run.kill()
        assert run.returncode == code, error
        assert "Traceback" not in error
    # The whole run: an engine of other bytes, as another process layout gives, is judged anew.
    assert invoke("run", str(path), "--quiet").exit_code == 0
    assert_built_as(before, folder)
    assert not list(folder.rglob(".making-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("checkpoint: embedded", "checkpoint: none.pt"), "model.checkpoint: none.pt is no file"),
        (("name: care_tiny", "name: care_tyni"), "no weights of care_tyni"),
        (("validation: fashion-mnist", "validation: folder:/none"), "no folder at /none: check"),
        (("validation: fashion-mnist", "validation: foldr:x"), "did you mean folder?"),
    ],
)
def test_input_that_does_not_make_sense_is_exit_code_2(
    config: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(tmp_path / "engines")).replace(*change))
    result = invoke("run", str(path), "--quiet")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    result = process("run", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: pipeline.yaml does not exist: name a configuration file, or write a first one: "
        "python -m pipeline init --help\n"
    )


def test_check_without_results_says_what_to_do(tmp_path: Path, finished: Path) -> None:
    result = invoke("check", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "run python -m pipeline run first" in result.output
    result = invoke("check", "nothing", "--output", str(finished.parent))
    assert result.exit_code == 2
    assert "there are trial" in result.output


def test_doctor_names_every_target_and_how_to_get_what_is_missing() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    for target in ("trt", "ort", "coreml", "coreai"):
        assert re.search(rf"^\s*{target}\b", result.output, re.MULTILINE)
    assert "missing" in result.output


def test_schema_is_json() -> None:
    assert json.loads(invoke("schema").output)["title"] == "Config"


GROUPS = [name for name, command in main.commands.items() if isinstance(command, click.Group)]


@pytest.mark.parametrize("command", [None, *main.commands])
def test_every_command_and_option_has_help(command: str | None) -> None:
    found = main if command is None else main.commands[command]
    assert found.help
    for parameter in found.params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), parameter.name
    arguments = [command] if command else []
    assert invoke(*arguments, "--help").exit_code == 0


@pytest.mark.parametrize("group", [(), *([name] for name in GROUPS)])
def test_help_says_of_each_command_a_whole_sentence(group: Sequence[str]) -> None:
    result = CliRunner().invoke(main, [*group, "--help"], env={"COLUMNS": "80"})
    listed = re.findall(r"^  (?!  )\S+ {2,}(.+)$", result.output.partition("Commands:")[2], re.M)
    found = main.commands[group[0]] if group else main
    assert isinstance(found, click.Group)
    assert len(listed) == len(found.commands)
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_the_command_lines_names_are_those_of_the_code() -> None:
    from pipeline import cli
    from pipeline.scheduler.plan import STAGES

    assert STAGES == cli.STAGES


def test_help_imports_no_runtime() -> None:
    program = (
        "import sys; from pipeline.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'pydantic', 'rich', 'json', 'ctypes') "
        "if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"


# Arguments that once walked the disk, or ended in a traceback.


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", ".."),
        ("check", "../engines"),
        ("check", "/"),
        ("check", "x" * 300),
        ("check", "--output", "/proc"),
        ("check", "--output", "/dev/null"),
        ("check", "--output", "x" * 300),
        ("check", "--output", __file__),
        ("export", "triton", ".."),
        ("export", "coreml-bench", "../x"),
        ("run", "x" * 300),
        ("run", "/dev/zero"),
        ("bench", "--target", "coreml", "--import", "x" * 300),
        ("calibrate", "--config", "/dev/zero"),
    ],
)
def test_odd_arguments_are_refused_in_one_line(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_what_the_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a\x1b"))

    monkeypatch.setattr(Path, "iterdir", refused)
    result = invoke("check", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/a\\x1b: Permission denied\n"


def test_check_looks_no_deeper_than_artifacts_lie(tmp_path: Path) -> None:
    output = tmp_path / "engines"
    deep = output / "trial" / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (output / "trial" / "a" / "artifact.json").write_text("{}")
    (deep / "artifact.json").write_text("{}")
    result = invoke("check", "--output", str(output))
    assert result.exit_code == 1
    assert "trial/a:" in result.output
    assert "trial/a/b" not in result.output


def test_the_installed_command_is_ours_beside_a_file_of_that_name(tmp_path: Path) -> None:
    """`python -m pipeline` takes what lies in the working directory, and nothing can mend that."""
    script = Path(sysconfig.get_path("scripts")) / "care-deploy"
    if not script.is_file():
        pytest.skip("care-deploy is not installed here")
    (tmp_path / "pipeline.py").write_text("raise SystemExit('somebody else')\n")
    done = subprocess.run(
        [script, "schema"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "targets" in json.loads(done.stdout)["properties"]
