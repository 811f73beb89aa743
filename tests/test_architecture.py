"""The building holds: modules load alone, imports run in no circle, tests mirror the product.

That floors import only from below is held by import-linter, in `make check`.
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterator

import pytest

from pipeline.targets.registry import TARGETS
from tests.imports import FILES, ROOT, imported, walked


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> Iterator[None]:
    """Programs of all files are a million of objects."""
    yield
    walked.cache_clear()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1 or name in graph[name]:
                found.append(sorted(members))

    for name in graph:
        if name not in order:
            visit(name)
    return found


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a"}}
    assert sorted(circles(graph)) == [["b", "c"], ["d"]]


def test_imports_run_in_no_circle() -> None:
    graph = {name: set(imported(path)) - {name} for name, path in FILES.items()}
    assert circles(graph) == []


def test_every_module_loads_alone() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.imports"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_the_ground_floor_is_light() -> None:
    """Errors, files, YAML and the machine are had without numpy, the rest of it without torch."""
    program = """
import sys
from pipeline.core import errors, files, machine, yamlfile
assert "numpy" not in sys.modules, "numpy"
import importlib, pkgutil, pipeline.core
for module in pkgutil.iter_modules(pipeline.core.__path__):
    importlib.import_module("pipeline.core." + module.name)
assert "torch" not in sys.modules, "torch"
assert not [m for m in sys.modules if m.startswith(("care", "calibration", "pipeline."))
            and not m.startswith("pipeline.core")]
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_packages_say_what_lives_in_them() -> None:
    short = []
    for name, path in FILES.items():
        if path.name == "__init__.py":
            text = importlib.import_module(name).__doc__ or ""
            if len(text.strip().splitlines()) < 3:
                short.append(name)
    assert short == []


def test_json_of_files_is_read_in_one_place() -> None:
    """`core.plain` limits size and depth; elsewhere JSON is only parsed that was just made."""
    found = []
    for name, path in FILES.items():
        for node in walked(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                made_here = ast.unparse(node.args[0]).startswith("json.dumps(")
                # A process of TensorRT-RTX alone, which takes its job from us.
                own_job = name.endswith(".tensorrt.builder") and ast.unparse(node.args[0]) == "job"
                if not made_here and not own_job:
                    found.append(name)
    assert found == ["pipeline.core.plain"]


def test_screens_take_text_for_text() -> None:
    """Of rich only what takes no markup: names of other people reach every screen."""
    found = []
    for name, path in FILES.items():
        for node in walked(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                found += [name for a in node.names if a.name in ("Console", "print", "escape")]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "TextColumn":
                column = ast.unparse(node)
                if "{" in column and "markup=False" not in column:
                    found.append(name)
            if isinstance(node, ast.Attribute) and node.attr == "from_markup":
                found.append(name)
    assert found == ["pipeline.core.screen"]


NAMES_A_TARGET = {
    "pipeline.targets.registry": "the list of them",
}
"""Modules that may name targets, and why. Beside them, options of the command line may have one as
their `default`: what is taken where nothing is said decides nothing else."""


def names_of_targets(nodes: Collection[ast.AST]) -> list[str]:
    """Texts of a module that are a target's name, or begin with it as an artifact's name does.

    Whether they are compared with, members of something, keys, patterns or arguments: all but the
    default of an option.
    """
    defaults = {
        id(word.value)
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "option"
        for word in node.keywords
        if word.arg == "default"
    }
    texts = (
        node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in defaults
    )
    return [text for text in texts if isinstance(text, str) and text.partition("/")[0] in TARGETS]


@pytest.mark.parametrize(
    "code",
    [
        'target == "trt"',
        'target in ("coreai", other)',
        'RATES = {"ort/fp32": 1}',
        'click.Choice(("trt", other))',
        'name.startswith("coreml/")',
        'f"coreml/{precision}"',
        'match target:\n    case "ort":\n        pass',
    ],
)
def test_names_of_targets_are_found(code: str) -> None:
    assert names_of_targets([*ast.walk(ast.parse(code))])


def test_defaults_of_options_and_other_words_are_no_names_of_targets() -> None:
    code = 'option("--target", default="ort", help="such as ort or trt/fp16")'
    assert names_of_targets([*ast.walk(ast.parse(code))]) == []


def test_nothing_else_branches_on_a_targets_name() -> None:
    """What differs between targets is asked of the target: others would have to be added there."""
    own = {name: type(target).__module__.rpartition(".")[0] for name, target in TARGETS.items()}
    found = {}
    for name, path in FILES.items():
        if not name.startswith("pipeline.") or name in NAMES_A_TARGET:
            continue
        texts = names_of_targets(walked(path))
        others = [t for t in texts if not f"{name}.".startswith(f"{own[t.partition('/')[0]]}.")]
        if others:
            found[name] = others
    assert found == {}


ABOVE = ("cli", "commands", "config", "exports", "report", "scheduler", "store")
"""What plans, shows, packs and commands: it knows targets from the registry alone."""


def test_what_plans_and_shows_loads_no_target_by_itself() -> None:
    """What a command takes of a target it asks its `Target` for."""
    packages = {type(target).__module__.rpartition(".")[0] for target in TARGETS.values()}
    found = [
        f"{name}: {other}"
        for name, path in FILES.items()
        if name.startswith("pipeline.") and name.split(".")[1] in ABOVE
        for other in imported(path)
        for package in packages
        if f"{other}.".startswith(f"{package}.")
    ]
    assert found == []
