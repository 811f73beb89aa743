"""The project's modules, what each imports, and whether each loads without the others."""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "care", "calibration")

Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(p): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}


@functools.cache
def walked(path: Path) -> list[ast.AST]:
    """All nodes of a file's program, which several tests look through."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imported(path: Path, *, later: bool = True) -> list[str]:
    """Modules of this project that a file imports at run time; `later`: in functions too."""
    return list(_imported(path, later=later))


def _imported(path: Path, *, later: bool) -> Iterator[str]:
    aside = {id(inner) for node in walked(path) for inner in _aside(node, later=later)}
    for node in walked(path):
        if id(node) in aside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in FILES:
                    yield submodule
                elif node.module in FILES:
                    yield node.module


def _aside(node: ast.AST, *, later: bool) -> Iterator[ast.AST]:
    """What below a node does not count: what is for types, and unless `later`, functions."""
    for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if for_types or (function and not later):
        for statement in node.body:  # type: ignore[attr-defined]
            yield from ast.walk(statement)


def loads_alone() -> list[str]:
    """Load each module beside nothing but what it loads itself; returns what failed.

    What a module imports is loaded so before it, and stays. Where no imports run in a circle, each
    module thus sees what it would see in a process of its own.
    """
    graph = {name: _first(name) for name in FILES}
    walked.cache_clear()
    loaded: dict[str, ModuleType] = {}
    failed = []
    for name in TopologicalSorter(graph).static_order():
        if name.endswith("__main__"):
            continue
        _show_only({name, *_reached(graph, name)}, loaded)
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        loaded |= {name: sys.modules[name] for name in FILES if name in sys.modules}
    return failed


def _first(name: str) -> set[str]:
    """What is loaded before a module: what it imports, and the package that it is in.

    What a package imports of its own is loaded in the middle of it: what that imports counts.
    """
    found = {name.rpartition(".")[0]} & FILES.keys()
    left = [name]
    while left:
        more = set(imported(FILES[left.pop()], later=False)) - found
        found |= more
        left += [one for one in more if one.startswith(f"{name}.")]
    return {one for one in found if one != name and not one.startswith(f"{name}.")}


def _reached(graph: Graph, name: str) -> set[str]:
    found: set[str] = set()
    left = [name]
    while left:
        more = graph[left.pop()] - found
        found |= more
        left += more
    return found


def _show_only(names: set[str], loaded: dict[str, ModuleType]) -> None:
    """Leave only these of the project's modules, as attributes of their packages too."""
    for name in FILES:
        sys.modules.pop(name, None)
        package, _, own = name.rpartition(".")
        if package in loaded and isinstance(vars(loaded[package]).get(own), ModuleType):
            delattr(loaded[package], own)
    for name in names & loaded.keys():
        sys.modules[name] = loaded[name]
        package, _, own = name.rpartition(".")
        if package in loaded:
            setattr(loaded[package], own, loaded[name])


if __name__ == "__main__":
    gc.disable()  # what is loaded stays
    sys.exit("\n".join(loads_alone()) or None)
