"""Tests lie where the product's files do, under the same names, or say where else and why."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests.conftest import LONG

ROOT = Path(__file__).parents[1]

ELSEWHERE: dict[str, tuple[str, str]] = {
    "care/assets/make.py": ("care/test_evaluate.py", "its result, the embedded images"),
    "care/cost.py": ("care/test_profile.py", "what is counted"),
    "care/networks.py": ("care/test_model.py", "names that timm knows by it"),
    "care/data/*.py": ("care/test_data.py", "every way to open a dataset, side by side"),
    "pipeline/core/bounds.py": ("pipeline/test_config.py", "bounds of a configuration"),
    "care/{boards,job,meters,progress,runs,summary}.py": (
        "care/test_train.py",
        "the program's own parts",
    ),
    "care/precision.py": ("care/test_evaluate.py", "precisions of an evaluation"),
    "pipeline/commands/*.py": ("pipeline/test_cli.py", "commands, as a user gives them"),
    "pipeline/core/files.py": ("pipeline/core/test_replacing.py", "writing is putting in place"),
    "pipeline/core/plots.py": ("pipeline/core/test_svg.py", "plots are SVG"),
    "pipeline/core/runner.py": ("pipeline/targets/test_toy.py", "the smallest runner"),
    "pipeline/emulate/layers.py": (
        "pipeline/emulate/onnx/test_layers.py",
        "what comparisons of two kinds of programs share",
    ),
    "pipeline/emulate/mil/operators/*.py": (
        "pipeline/emulate/mil/test_operators.py",
        "every operation has a case",
    ),
    "pipeline/emulate/mil/*.py": ("pipeline/emulate/mil/test_program.py", "a program's way"),
    "pipeline/emulate/onnx/operators/*.py": (
        "pipeline/emulate/onnx/test_operators.py",
        "every operator has a case",
    ),
    "pipeline/emulate/onnx/plan.py": ("pipeline/emulate/onnx/test_graph.py", "a graph's plan"),
    "pipeline/exports/coreml_bench.py": ("pipeline/targets/coreml/test_results.py", "both ends"),
    "pipeline/graphs/{compare,edit,links}.py": (
        "pipeline/graphs/passes/test_networks.py",
        "what all passes use",
    ),
    "pipeline/graphs/pairs.py": ("pipeline/targets/ort/test_quantize.py", "one of its two users"),
    "pipeline/graphs/qdq.py": ("pipeline/targets/tensorrt/test_quantize.py", "its only user"),
    "pipeline/scheduler/elsewhere.py": ("pipeline/api/test_results.py", "places of a run"),
    "pipeline/report/answers.py": ("pipeline/report/test_history.py", "what a history keeps"),
    "pipeline/scheduler/plan.py": ("pipeline/scheduler/test_execute.py", "a plan is executed"),
    "pipeline/scheduler/processes.py": (
        "pipeline/scheduler/test_side_by_side.py",
        "what runs side by side",
    ),
    "pipeline/scheduler/worker.py": ("pipeline/scheduler/test_fleet.py", "both ends"),
    "pipeline/stages/onnxsim_process.py": ("pipeline/stages/test_simplify.py", "its only user"),
    "pipeline/stages/calibration_set.py": (
        "pipeline/stages/test_images.py",
        "what one stage wrote the others read",
    ),
    "pipeline/stages/*.py": ("pipeline/stages/test_keys.py", "steps of a whole run"),
    "pipeline/steps/facts/golden.py": ("pipeline/stages/test_golden.py", "what the kit expects"),
    "pipeline/steps/facts/resizes.py": ("pipeline/stages/test_resizes.py", "who makes them"),
    "pipeline/steps/folders.py": ("pipeline/scheduler/test_execute.py", "locks of a run"),
    "pipeline/store/{entries,objects}.py": (
        "pipeline/store/test_shared.py",
        "what a run does with a store",
    ),
    "pipeline/targets/base.py": ("pipeline/targets/test_toy.py", "the smallest target"),
    "pipeline/targets/findings.py": ("pipeline/targets/coreml/test_diff.py", "what checks find"),
    "pipeline/targets/{floats,forms}.py": ("pipeline/graphs/test_float16.py", "forms of graphs"),
    "pipeline/targets/refusals.py": (
        "pipeline/graphs/test_reduce.py",
        "what a reduction holds on to",
    ),
    "pipeline/targets/coreml/measured.py": (
        "pipeline/targets/coreml/test_results.py",
        "measurements are taken over",
    ),
    "pipeline/targets/coreml/*.py": (
        "pipeline/targets/coreml/test_target.py",
        "what a build goes through",
    ),
    "pipeline/targets/coreai/{convert,network,options,build,quiet,verify}.py": (
        "pipeline/targets/coreai/test_target.py",
        "what a build goes through",
    ),
    "pipeline/targets/coreai/fitness.py": (
        "pipeline/targets/coreai/test_reports.py",
        "advice is of what was reported",
    ),
    "pipeline/targets/coreai/{operators,program}.py": (
        "pipeline/targets/coreai/test_executor.py",
        "every operation has a case",
    ),
    "pipeline/targets/ort/*.py": (
        "pipeline/targets/ort/test_target.py",
        "what a build goes through",
    ),
    "pipeline/targets/tensorrt/nvml.py": (
        "pipeline/targets/tensorrt/test_runner.py",
        "read while it runs",
    ),
    "pipeline/targets/tensorrt/*.py": (
        "pipeline/targets/tensorrt/test_process.py",
        "what a build goes through",
    ),
}
"""Files without a test file of their name: where they are tested, and why. The first fits."""


def expanded(pattern: str) -> list[str]:
    """`a/{b,c}.py` as the two that it stands for."""
    if "{" not in pattern:
        return [pattern]
    head, _, rest = pattern.partition("{")
    names, _, tail = rest.partition("}")
    return [f"{head}{name}{tail}" for name in names.split(",")]


def place_of(file: Path) -> str | None:
    """The test file, below tests/, in which a file of the product is tested."""
    own = file.with_name(f"test_{file.name}")
    if (ROOT / "tests" / own).exists():
        return own.as_posix()
    for pattern, (test, _) in ELSEWHERE.items():
        if any(file.match(one) and file.parent == Path(one).parent for one in expanded(pattern)):
            return test
    return None


FILES = [
    path.relative_to(ROOT)
    for package in ("pipeline", "care", "calibration")
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.name.startswith("__")
]


def test_every_file_is_tested_somewhere() -> None:
    assert [str(file) for file in FILES if place_of(file) is None] == []


@pytest.mark.parametrize("test", sorted({test for test, _ in ELSEWHERE.values()}))
def test_where_it_says(test: str) -> None:
    assert (ROOT / "tests" / test).is_file()


def test_no_entry_is_left_over() -> None:
    named = {one for pattern in ELSEWHERE for one in expanded(pattern) if "*" not in one}
    gone = [one for one in named if not (ROOT / one).is_file()]
    own = [
        one
        for one in named
        if place_of(Path(one)) == Path(one).with_name(f"test_{Path(one).name}").as_posix()
    ]
    assert (gone, own) == ([], [])


def test_files_that_go_first_exist() -> None:
    assert [name for name in LONG if not (ROOT / "tests" / name).is_file()] == []
    assert len(set(LONG)) == len(LONG)


SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}


def test_every_marker_selects_tests() -> None:
    """One that nothing carries promises tests that there are not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    stated = settings["tool"]["pytest"]["ini_options"]["markers"]
    markers = [marker.partition(":")[0] for marker in stated]
    assert markers
    unused = [
        marker
        for marker in markers
        if not any(f"pytest.mark.{marker}" in source for source in SOURCES.values())
    ]
    assert unused == []


def test_tests_know_which_error_they_expect() -> None:
    """Among several, a fault of the program passes for the error that it should have become."""
    several = [
        f"{path.name}:{node.lineno}"
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "raises"
        and node.args
        and isinstance(node.args[0], ast.Tuple)
    ]
    assert several == []
