"""The code of a step is what its modules import, directly or not; nobody lists it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.steps import keys
from pipeline.steps.keys import CUT, OWN, PROJECT, Code


def write(root: Path, **modules: str) -> Path:
    """Write modules of the package `pipeline`: a__b="…" is pipeline/a/b.py."""
    for name, source in {"__init__": "", **modules}.items():
        file = root / "pipeline" / f"{name.replace('___', '/__').replace('__d', '/d')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return root


def modules_of(root: Path, *roots: str, **options: set[str]) -> set[str]:
    """Files without their package and ending."""
    found = Code(root).hashes([f"pipeline.{name}" for name in roots], **options)
    return {name.removeprefix("pipeline/").removesuffix(".py") for name in found}


@pytest.mark.parametrize(
    "source",
    [
        "import pipeline.b",
        "import pipeline.b as c",
        "from pipeline import b",
        "from pipeline.b import something",
        "from . import b",
        "from .b import something",
        "def f():\n    from pipeline.b import something",
        "class C:\n    async def f(self):\n        if True:\n            import pipeline.b",
        "try:\n    import pipeline.b\nexcept ImportError:\n    pass",
        "try:\n    pass\nexcept ImportError:\n    import pipeline.b",
        "try:\n    pass\nfinally:\n    import pipeline.b",
        "for _ in ():\n    pass\nelse:\n    import pipeline.b",
        "with open(__file__):\n    import pipeline.b",
        "match 1:\n    case 1:\n        import pipeline.b",
        "if TYPE_CHECKING:\n    import x\nelse:\n    import pipeline.b",
        "FAST = True\nif FAST:\n    import pipeline.b",
    ],
)
def test_every_way_to_import_counts(source: str, tmp_path: Path) -> None:
    write(tmp_path, a=source, b="", c="")
    assert modules_of(tmp_path, "a") == {"__init__", "a", "b"}


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline import b",
        "import typing\nif typing.TYPE_CHECKING:\n    from pipeline import b",
        "import numpy, os.path\nfrom json import b",
        "'from pipeline import b'",
    ],
)
def test_what_is_not_imported_does_not_count(source: str, tmp_path: Path) -> None:
    write(tmp_path, a=source, b="")
    assert modules_of(tmp_path, "a") == {"__init__", "a"}


def test_imports_of_imports_count_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path, a="from pipeline import b", b="import pipeline.c", c="from pipeline import a")
    assert modules_of(tmp_path, "b") == {"__init__", "a", "b", "c"}


def test_packages_count_with_what_they_import(tmp_path: Path) -> None:
    write(tmp_path, a="from pipeline.deep.d import x", b="", deep__d="", deep___init__="import x")
    (tmp_path / "pipeline/deep/__init__.py").write_text("from ..b import y\nfrom . import e")
    (tmp_path / "pipeline/deep/e.py").write_text("from ... import nothing")
    assert modules_of(tmp_path, "a") == {
        *("__init__", "a", "b", "deep/__init__", "deep/d", "deep/e"),
    }


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, a="from pipeline.deep import d", deep__d="")
    (tmp_path / "pipeline/deep/__init__.py").write_text("one")
    first = Code(tmp_path).hashes(["pipeline.a"])
    (tmp_path / "pipeline/__init__.py").write_text("two")
    second = Code(tmp_path).hashes(["pipeline.a"])
    assert {name for name in first if first[name] != second[name]} == {"pipeline/__init__.py"}


def test_what_is_cut_out_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, a="from pipeline import config, configured", config="import pipeline.b", b="")
    (tmp_path / "pipeline/configured.py").write_text("")
    assert modules_of(tmp_path, "a") == {"__init__", "a", "configured"}


def test_what_a_root_only_makes_known_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, a="from pipeline import b, c", b="", c="")
    assert modules_of(tmp_path, "a", registered={"pipeline.b"}) == {"__init__", "a", "c"}
    # Where it does more than that, others import it.
    (tmp_path / "pipeline/c.py").write_text("import pipeline.b")
    assert modules_of(tmp_path, "a", registered={"pipeline.b"}) == {"__init__", "a", "b", "c"}


def test_what_a_root_imports_aside_does_not_count(tmp_path: Path) -> None:
    source = "class T:\n    def look(self):\n        def inner():\n            import pipeline.b\n"
    write(tmp_path, a=source, b="", c="import pipeline.a")
    assert modules_of(tmp_path, "a", aside={"look"}) == {"__init__", "a"}
    assert modules_of(tmp_path, "a", aside={"inner"}) == {"__init__", "a", "b"}
    assert modules_of(tmp_path, "c", aside={"look"}) == {"__init__", "a", "b", "c"}
    (tmp_path / "pipeline/a.py").write_text(f"{source}    def build(self): import pipeline.b")
    assert modules_of(tmp_path, "a", aside={"look"}) == {"__init__", "a", "b"}


def test_a_root_that_is_missing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ArtifactError, match=r"pipeline\.gone is not installed completely"):
        Code(tmp_path).hashes(["pipeline.gone"])


def test_a_target_of_another_package_counts_with_its_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here", core="")
    for name, source in {"target": "from . import work\nimport pipeline.core", "work": ""}.items():
        (tmp_path / "there/acme").mkdir(parents=True, exist_ok=True)
        (tmp_path / "there/acme" / f"{name}.py").write_text(source)
    module = ModuleType("acme.target")
    module.__file__ = str(tmp_path / "there/acme/target.py")
    monkeypatch.setitem(sys.modules, "acme.target", module)
    found = Code(tmp_path / "here").hashes(["acme.target"])
    assert list(found) == [
        "acme/target.py",
        "acme/work.py",
        "pipeline/__init__.py",
        "pipeline/core.py",
    ]


def test_imports_are_remembered_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="from pipeline import b", b="")
    cache = tmp_path / "imports.json"
    first = Code(tmp_path, cache).hashes(["pipeline.a"])
    monkeypatch.setattr(keys, "_PARSED", {})
    with monkeypatch.context() as patch:
        patch.setattr("ast.parse", None)  # nothing is parsed
        assert Code(tmp_path, cache).hashes(["pipeline.a"]) == first
    (tmp_path / "pipeline/a.py").write_text("from pipeline import c")
    write(tmp_path, c="")
    assert set(Code(tmp_path, cache).hashes(["pipeline.a"])) == {
        *("pipeline/__init__.py", "pipeline/a.py", "pipeline/c.py"),
    }


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"x": [[1]]}', "{"])
def test_a_damaged_memory_of_imports_only_costs_time(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_PARSED", {})
    write(tmp_path, a="")
    cache = tmp_path / "imports.json"
    cache.write_text(content)
    assert set(Code(tmp_path, cache).hashes(["pipeline.a"])) == {
        *("pipeline/__init__.py", "pipeline/a.py"),
    }
    if content:
        assert cache.read_text() == content, "what is no memory of ours stays"
    else:
        assert len(json.loads(cache.read_text())) == 1  # both sources are empty


def test_no_folder_is_made_to_remember_imports(tmp_path: Path) -> None:
    write(tmp_path, a="import pipeline.new_module_of_this_test")
    Code(tmp_path, tmp_path / "none" / "imports.json").hashes(["pipeline.a"])
    assert not (tmp_path / "none").exists()


def test_what_is_cut_out_exists() -> None:
    later = {"pipeline.store"}
    for name in set(CUT) - later:
        path = PROJECT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_nothing_of_ours_is_imported_by_a_name_in_a_text() -> None:
    """A module that is imported so would be in no key."""
    for package in OWN:
        for file in (PROJECT / package).rglob("*.py"):
            text = file.read_text()
            for own in OWN:
                assert f'import_module("{own}' not in text, file
                assert f'import_module(f"{own}' not in text, file
                assert f'"-m", "{own}' not in text, file


def test_versions_of_what_is_not_installed() -> None:
    assert keys.versions("numpy", "no-such-package-at-all")["no-such-package-at-all"] == "missing"


@pytest.mark.parametrize(
    ("stated", "version"),
    [
        ("Metadata-Version: 2.4\nName: a\nVersion: 1.2.3+cpu\n\nA text\nVersion: 9\n", "1.2.3+cpu"),
        ("Name: a\nSummary: two\n Version: 8\nVersion:7\n", "7"),
        (None, "5"),
        ("Name: a\n\nVersion: 9\n", "5"),
    ],
)
def test_the_version_is_that_of_the_fields(
    stated: str | None, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = SimpleNamespace(version="5", read_text={"METADATA": stated}.get)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    keys._version.cache_clear()
    assert keys.versions("a") == {"a": version}
    keys._version.cache_clear()


def test_versions_are_those_that_python_knows() -> None:
    names = sorted({found.metadata["Name"] for found in importlib.metadata.distributions()})
    assert keys.versions(*names) == {name: importlib.metadata.version(name) for name in names}


def test_all_packages_of_this_project_count() -> None:
    packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    assert set(OWN) == packages - {"tests", "scripts", "benchmarks"}


@pytest.mark.parametrize(
    "name",
    [
        *("__main__", "cli", "commands", "commands.run", "config", "exports", "report"),
        *("report.html", "scheduler", "store", "targets.registry"),
    ],
)
def test_what_plans_shows_or_packs_changes_no_result(name: str, tmp_path: Path) -> None:
    write(tmp_path, a=f"import pipeline.{name}")
    file = tmp_path.joinpath("pipeline", *name.split(".")).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    for folder in (file.parent, *file.parents):
        if folder != tmp_path and folder.is_relative_to(tmp_path):
            (folder / "__init__.py").touch()
    assert f"pipeline/{name.replace('.', '/')}.py" not in Code(tmp_path).hashes(["pipeline.a"])
    assert f"{name.replace('.', '/')}" not in modules_of(tmp_path, "a")


def test_imports_are_relative_to_the_package_however_deep(tmp_path: Path) -> None:
    write(tmp_path, a="from pipeline.deep.down import d", c="")
    for name, source in {
        "deep/__init__": "",
        "deep/b": "",
        "deep/down/__init__": "from . import e",
        "deep/down/d": "from .e import x\nfrom ..b import y\nfrom ... import c",
        "deep/down/e": "",
    }.items():
        file = tmp_path / "pipeline" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    assert modules_of(tmp_path, "a") == {
        *("__init__", "a", "c", "deep/__init__", "deep/b"),
        *("deep/down/__init__", "deep/down/d", "deep/down/e"),
    }


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("plain", "ours"),
    [
        ({}, True),
        ({DIGEST: []}, True),
        ({DIGEST: [], "1" * 64: [[0, "a", [], ""]]}, True),
        ({DIGEST: [], "short": []}, False),
        ({DIGEST: [], "1" * 64: "text"}, False),
        ({DIGEST: {}}, False),
        ([], False),
        ("text", False),
    ],
)
def test_what_is_a_memory_of_imports(plain: object, ours: bool, tmp_path: Path) -> None:
    path = tmp_path / "imports.json"
    path.write_text(json.dumps(plain))
    assert keys.is_cache(path) is ours
    path.write_text("{")
    assert not keys.is_cache(path)
    assert not keys.is_cache(tmp_path / "none")


def test_imports_are_written_down_only_where_there_are_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_PARSED", {})
    write(tmp_path, a="from pipeline import b", b="", c="import os")
    cache = tmp_path / "imports.json"
    Code(tmp_path, cache).hashes(["pipeline.a"])
    first = cache.read_text()
    assert len(json.loads(first)) == 2  # the empty ones are one
    os.utime(cache, ns=(1, 1))
    code = Code(tmp_path, cache)
    code.hashes(["pipeline.a"])
    assert cache.stat().st_mtime_ns == 1
    code.hashes(["pipeline.c"])
    assert len(json.loads(cache.read_text())) == 3, "what was known is kept"
    # Once they are many, those in use alone are.
    monkeypatch.setattr(keys, "MOST_REMEMBERED", 3)
    write(tmp_path, a="from pipeline import b, c")
    Code(tmp_path, cache).hashes(["pipeline.a"])
    assert len(json.loads(cache.read_text())) == 3
    monkeypatch.setattr(keys, "MOST_REMEMBERED", 4)
    write(tmp_path, a="from pipeline import c")
    Code(tmp_path, cache).hashes(["pipeline.a"])
    assert len(json.loads(cache.read_text())) == 4


def test_a_memory_that_cannot_be_written_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise ArtifactError("read-only")

    monkeypatch.setattr(keys, "write_atomically", refuse)
    write(tmp_path, a="import pipeline.a_module_of_this_test_alone")
    code = Code(tmp_path, tmp_path / "imports.json")
    assert set(code.hashes(["pipeline.a"])) == {"pipeline/__init__.py", "pipeline/a.py"}
    assert code.cache is None


def test_hashes_are_of_the_sources_and_sorted(tmp_path: Path) -> None:
    write(tmp_path, z="from pipeline import a", a="x = 1")
    found = Code(tmp_path).hashes(["pipeline.z"])
    assert list(found) == ["pipeline/__init__.py", "pipeline/a.py", "pipeline/z.py"]
    assert found["pipeline/a.py"] == hashlib.sha256(b"x = 1").hexdigest()


def test_a_module_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, a="")
    code = Code(tmp_path)
    first = code.hashes(["pipeline.a"])
    write(tmp_path, a="changed while it ran")
    assert code.hashes(["pipeline.a"]) == first
    code.hashes(["pipeline.a"]).clear()
    assert code.hashes(["pipeline.a"]), "who asks may do with it what they like"


def test_what_was_found_before_is_found_for_the_same_question_alone(tmp_path: Path) -> None:
    source = "from pipeline import b\ndef look():\n    import pipeline.c"
    write(tmp_path, a=source, b="", c="", d="import json")
    code = Code(tmp_path)
    asked: tuple[tuple[list[str], dict[str, set[str]], set[str]], ...] = (
        (["a", "d"], {}, {"__init__", "a", "b", "c", "d"}),
        (["a"], {}, {"__init__", "a", "b", "c"}),
        (["a"], {"registered": {"pipeline.b"}}, {"__init__", "a", "c"}),
        (["a"], {"aside": {"look"}}, {"__init__", "a", "b"}),
    )
    for _ in range(2):
        for roots, options, expected in asked:
            found = code.hashes([f"pipeline.{root}" for root in roots], **options)
            assert set(found) == {f"pipeline/{name}.py" for name in expected}


def test_imports_of_several_roots_that_make_known_or_look_aside(tmp_path: Path) -> None:
    """What one root leaves aside counts where another root's method needs it."""
    look = "def look():\n    import pipeline.b\n"
    write(tmp_path, a=look, c="def build():\n    import pipeline.b", b="")
    assert "b" in modules_of(tmp_path, "a", "c", aside={"look"})
    assert "b" not in modules_of(tmp_path, "a", aside={"look"})
