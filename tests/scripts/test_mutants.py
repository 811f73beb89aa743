"""Which changes are tried, and what counts as noticed; `scripts/mutants.py` tries some hundred."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from mutation.changes import changes_of
from mutation.trial import copy_tree

ROOT = Path(__file__).parents[2]


def made_of(source: str) -> set[str]:
    """The changed sources, but for what is the same in all of them."""
    changes = changes_of(source.encode())
    found = [change.apply(source.encode()).decode() for change in changes]
    for text in found:
        ast.parse(text)
        assert text != source
    return set(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", {"x = (a <= b)"}),
        ("x = a in b", {"x = (a not in b)"}),
        ("x = a + b", {"x = (a - b)"}),
        ("x = folder / 'name'", {"x = folder / ('XXname')"}),
        ("x = a and b", {"x = (a or b)", "x = (a)", "x = (b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = -1", {"x = (1)", "x = -(2)"}),
        ("x = True", {"x = (False)"}),
        ("x = 0.0", {"x = (1.0)"}),
        ("x = 'a sentence for people'", set()),
        ("x = f(min(a), b=c)", {"x = f((max(a)), b=c)", "x = (f(min(a)))"}),
        ("x = sorted(a)", {"x = (list(a))"}),
        ("x = {a: b, **c}", {"x = ({**c})", "x = ({a: b})"}),
        ("x = [a, b]", {"x = ([b])", "x = ([a])"}),
        ("a, b = c, d", set()),
        ("x = a if b else c", {"x = (a)", "x = (c)"}),
        ("x = [a for a in b if c]", {"x = ([a for a in b])"}),
        ("x = a[:b]", {"x = (a[:])"}),
        ("f(a)", {"pass"}),
        ("x += a", {"pass"}),
        ("raise DataError('a' + 'b')", {"pass"}),
        ("about('key')", set()),
        ("progress(0, None, 'opening')", set()),
        ("import a", set()),
        ("def f(x: 'A' = 1) -> 'B':\n    'text'", {"def f(x: 'A' = (2)) -> 'B':\n    'text'"}),
        ("if TYPE_CHECKING:\n    x = 1", set()),
        ("assert a < b", set()),
        ("é = 'ü', a < b", {"é = ('XXü'), a < b", "é = 'ü', (a <= b)"}),
    ],
)
def test_what_is_changed(source: str, expected: set[str]) -> None:
    assert made_of(source) == expected


def test_changes_of_every_module_are_programs() -> None:
    for module in mutants.TESTS:
        source = (ROOT / module).read_bytes()
        found = changes_of(source)
        assert found
        for change in found[::10]:
            compile(change.apply(source), module, "exec")


def test_modules_are_judged_by_their_own_tests() -> None:
    """The test file of a module's name, where there is one, is among those that judge it."""
    spec = importlib.util.spec_from_file_location("mirror", ROOT / "tests" / "test_mirror.py")
    assert spec is not None
    assert spec.loader is not None
    mirror = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mirror)
    for module, tests in mutants.TESTS.items():
        for file in mutants.files_of(tests):
            assert (ROOT / file).is_file()
        own = Path("tests", Path(module).with_name(f"test_{Path(module).name}"))
        if (ROOT / own).exists() and module != "pipeline/stages/samples.py":
            assert own.as_posix() in tests


def test_equal_seeds_choose_equally_and_more_hold_fewer() -> None:
    everything = {
        module: mutants.mutants_of(ROOT, module, mutants.TESTS[module])
        for module in ("pipeline/report/gates.py", "pipeline/source.py")
    }
    few, again, more = (mutants.choose(everything, count, 1) for count in (30, 30, 60))
    assert few == again
    assert set(few) < set(more)
    assert set(few) != set(mutants.choose(everything, 30, 2))
    assert all(
        sum(mutant.module == module for mutant in few) >= mutants.FEWEST for module in everything
    )


def test_what_was_tried_is_known_until_module_or_tests_change(tmp_path: Path) -> None:
    def write(**files: str) -> list[mutants.Mutant]:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        return mutants.mutants_of(tmp_path, "module.py", ("test_module.py",))

    first, second = write(module="x = 1\ny = 2\n", test_module="")
    memory = mutants.Memory(tmp_path / "build" / "tried.txt")
    memory.keep(first, killed=True)
    memory.keep(second, killed=False)

    def known(now: list[mutants.Mutant], added: bool = False) -> list[bool | None]:
        again = mutants.Memory(memory.file, added=added)
        return [again.known(mutant) for mutant in now]

    assert known([first, second]) == [True, False]
    grown = write(test_module="# more")
    assert known(grown) == [None, None]
    assert known(grown, added=True) == [True, None]
    assert known(write(module="x = 1\ny = 2\n\n"), added=True) == [None, None]


TRIAL = """\
import sys
from pathlib import Path
from mutation import trial
from mutation.trial import Trials, load_libraries

trial.LOADED = ("numpy", "pytest")  # the others take long, and this test needs none
load_libraries()
trials = Trials(Path(sys.argv[1]))
print(trials.unchanged(["test_thing.py"], 60)[0])
for source in (
    "x = 2", "x = 1 ", "import time; time.sleep(60)", "import os, signal; os.kill(0, 9)"
):
    limit = 4 if "sleep" in source else 60  # a busy machine takes its time
    print(trials.changed("thing.py", source.encode(), ["test_thing.py"], limit)[0])
print(trials.unchanged(["test_thing.py"], 60)[0])
"""


@pytest.mark.slow
def test_a_trial_says_whether_tests_pass_and_ends(tmp_path: Path) -> None:
    """In a process of its own: it must not have loaded anything of this project."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "thing.py").write_text("x = 1")
    (folder / "test_thing.py").write_text(
        "import thing\n\ndef test_it():\n    assert thing.x == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT / "scripts",
        check=False,
    )
    assert done.stdout.split() == ["True", "False", "True", "False", "False", "True"], done.stderr
    assert (folder / "thing.py").read_text() == "x = 1"


def test_a_copy_holds_what_git_knows_and_would_take_up(tmp_path: Path) -> None:
    tree, copied = tmp_path / "tree", tmp_path / "copy"
    (tree / "in").mkdir(parents=True)
    for name in ("known", "in/new", "ignored", "gone"):
        (tree / name).write_text(name)
    (tree / ".gitignore").write_text("ignored\n")
    for command in (("init", "-q"), ("add", "known", "gone", ".gitignore")):
        subprocess.run(["git", *command], cwd=tree, check=True)
    (tree / "gone").unlink()
    (tree / "known").write_text("as it lies there")
    copy_tree(tree, copied)
    files = {p.relative_to(copied).as_posix() for p in copied.rglob("*") if p.is_file()}
    assert files == {"known", "in/new", ".gitignore"}
    assert (copied / "known").read_text() == "as it lies there"


def test_a_module_without_tests_is_refused() -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(mutants.main, ["pipeline/cli.py"])
    assert result.exit_code == 2
    assert "there are no tests for pipeline/cli.py" in result.output
