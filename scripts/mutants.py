"""Change the modules that decide results, one small change at a time, and see that tests notice.

    python scripts/mutants.py --count 400

Works on a copy of the working tree. Prints how many changes were noticed ("killed") in each module
and which were not; exit status 1 where fewer than 85 % were. Equal seeds try equal changes.

What was tried is kept in build/mutants.txt: where neither a module nor its tests have changed, it
is not tried again, so that an interrupted run goes on. Who adds tests says --added: what tests
noticed before they grew is then taken as noticed, and what survived alone is tried.

A further module is an entry in TESTS.
"""

from __future__ import annotations

import hashlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from mutation.changes import Change, changes_of
from mutation.trial import Trials, copy_tree, load_libraries

ROOT = Path(__file__).parents[1]

_STAGES = "tests/pipeline/stages"
TESTS: dict[str, tuple[str, ...]] = {
    "pipeline/source.py": ("tests/pipeline/test_source.py",),
    "pipeline/steps/keys.py": ("tests/pipeline/steps/test_keys.py",),
    "pipeline/steps/artifact.py": ("tests/pipeline/steps/test_artifact.py",),
    "pipeline/steps/step.py": ("tests/pipeline/steps/test_step.py",),
    "pipeline/steps/stated.py": ("tests/pipeline/steps/test_stated.py",),
    "pipeline/steps/library.py": ("tests/pipeline/steps/test_library.py",),
    "pipeline/report/gates.py": ("tests/pipeline/report/test_gates.py",),
    "pipeline/report/choice.py": ("tests/pipeline/report/test_choice.py",),
    "pipeline/stages/samples.py": (f"{_STAGES}/test_images.py",),
    "pipeline/stages/images.py": (f"{_STAGES}/test_images.py",),
    "pipeline/stages/calibration_set.py": (f"{_STAGES}/test_images.py",),
    "pipeline/stages/ranges.py": (f"{_STAGES}/test_ranges.py",),
    "pipeline/stages/validate.py": (f"{_STAGES}/test_validate.py",),
    "pipeline/stages/bench.py": (f"{_STAGES}/test_bench.py",),
    "pipeline/core/timing.py": ("tests/pipeline/core/test_timing.py",),
    "pipeline/core/listing.py": ("tests/pipeline/core/test_listing.py",),
    "pipeline/core/splits.py": ("tests/pipeline/core/test_splits.py",),
    "pipeline/core/labels.py": ("tests/pipeline/core/test_labels.py",),
    "pipeline/core/hashes.py": ("tests/pipeline/core/test_hashes.py",),
    "pipeline/core/machine.py": ("tests/pipeline/core/test_machine.py",),
    "pipeline/core/figures.py": ("tests/pipeline/core/test_figures.py",),
    "calibration/ranges.py": ("tests/calibration/test_ranges.py",),
    "calibration/sample.py": ("tests/calibration/test_sample.py",),
    "pipeline/core/cpu_classes.py": (
        "tests/pipeline/core/test_cpu_classes.py",
        "tests/pipeline/targets/ort/test_as_cpu.py",
    ),
    "pipeline/core/huge_pages.py": ("tests/pipeline/core/test_huge_pages.py",),
    "pipeline/core/signals.py": ("tests/pipeline/core/test_signals.py",),
    "pipeline/targets/ort/session.py": ("tests/pipeline/targets/ort/test_session.py",),
    "pipeline/targets/ort/waiting.py": ("tests/pipeline/targets/ort/test_waiting.py",),
}
"""Modules that decide results, and the tests of each: what pytest is called with."""

FEWEST = 8
"""Changes of a module, if it allows so many; the others are spread by size."""

_BASELINE_S = 180.0
_PATIENCE = 4.0
"""A changed module may take so many times as long as it did unchanged, and `_SPARE_S` more."""
_SPARE_S = 5.0


@dataclass(frozen=True)
class Mutant:
    """A change of a module.

    Attributes:
        module: Its file.
        change: The change.
        name: Digest of the module and the change.
        trial: Digest of these and of the tests: where it is known, it was tried.
    """

    module: str
    change: Change
    name: str
    trial: str


def digest(*parts: bytes) -> str:
    """Short SHA-256 over some content."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()[:24]


def files_of(tests: Sequence[str]) -> list[str]:
    """The files among pytest's arguments."""
    return [each for each in tests if each.endswith(".py")]


def mutants_of(root: Path, module: str, tests: Sequence[str]) -> list[Mutant]:
    """All changes of a module."""
    source = (root / module).read_bytes()
    judges = digest(*((root / test).read_bytes() for test in files_of(tests)))
    mutants = []
    for change in changes_of(source):
        name = digest(source, repr(change).encode())
        trial = digest(source, repr(change).encode(), judges.encode())
        mutants.append(Mutant(module, change, name, trial))
    return mutants


def choose(everything: Mapping[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Some changes of every module, more of the larger ones; in a random order for each seed."""
    total = sum(len(mutants) for mutants in everything.values())
    chosen: list[Mutant] = []
    for module, mutants in everything.items():
        wanted = max(FEWEST, round(count * len(mutants) / total))
        # Shuffled whole: those of a smaller count are among those of a larger one.
        chosen += _shuffled(mutants, f"{seed} {module}")[:wanted]
    return chosen


def _shuffled(mutants: Sequence[Mutant], seed: str) -> list[Mutant]:
    mixed = list(mutants)
    random.Random(seed).shuffle(mixed)
    return mixed


class Memory:
    """What was tried, between runs: whether the tests noticed.

    A line for each, appended: several runs may write at once.

    Args:
        file: Where it is kept.
        added: Tests were only added since.
    """

    def __init__(self, file: Path, *, added: bool = False) -> None:
        self.file, self.added = file, added
        self.killed: dict[str, bool] = {}
        if file.is_file():
            pairs = (line.split() for line in file.read_text().splitlines())
            self.killed = {pair[0]: pair[1] == "killed" for pair in pairs if len(pair) == 2}

    def known(self, mutant: Mutant) -> bool | None:
        """Whether the tests noticed; None if it was not tried."""
        if self.added and self.killed.get(mutant.name):
            return True
        return self.killed.get(mutant.trial)

    def keep(self, mutant: Mutant, killed: bool) -> None:
        """Remember a result."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            for name in (mutant.trial, mutant.name):
                self.killed[name] = killed
                stream.write(f"{name} {'killed' if killed else 'survived'}\n")


def limit_of(trials: Trials, module: str) -> float:
    """Seconds for a change of a module; ends the program where its tests fail without one."""
    for _ in range(2):  # the first compiles
        passed, seconds, output = trials.unchanged(TESTS[module], _BASELINE_S)
        if not passed:
            sys.exit(f"the tests of {module} fail as it is:\n{output}")
    return _PATIENCE * seconds + _SPARE_S


def judge(
    trials: Trials, chosen: Sequence[Mutant], memory: Memory
) -> Iterator[tuple[Mutant, bool]]:
    """Try what is not known yet; every change with whether it was noticed."""
    limits: dict[str, float] = {}
    for mutant in chosen:
        killed = memory.known(mutant)
        if killed is None:
            module, tests = mutant.module, TESTS[mutant.module]
            if module not in limits:
                limits[module] = limit_of(trials, module)
            source = mutant.change.apply((trials.folder / module).read_bytes())
            passed, _ = trials.changed(module, source, tests, limits[module])
            killed = not passed
            memory.keep(mutant, killed)
        yield mutant, killed


def report(results: Sequence[tuple[Mutant, bool]]) -> float:
    """Print killed and tried by module, and what survived; the share that was killed."""
    for module in dict.fromkeys(mutant.module for mutant, _ in results):
        own = [killed for mutant, killed in results if mutant.module == module]
        click.echo(f"{module:36} {sum(own):4} of {len(own):4} killed, {sum(own) / len(own):4.0%}")
    survivors = [mutant for mutant, killed in results if not killed]
    for mutant in survivors:
        click.echo(f"survived: {mutant.module} {mutant.change.words}")
    share = 1 - len(survivors) / len(results)
    click.echo(f"{len(results) - len(survivors)} of {len(results)} killed, {share:.1%}")
    return share


@click.command()
@click.argument("modules", nargs=-1)
@click.option("--count", default=400, show_default=True, help="Changes of all modules together.")
@click.option("--seed", default=0, show_default=True, help="Chooses the changes.")
@click.option("--added", is_flag=True, help="Tests were only added: try what survived.")
@click.option("--least", default=0.85, show_default=True, help="Share that has to be killed.")
def main(modules: tuple[str, ...], count: int, seed: int, added: bool, least: float) -> None:
    """Try changes of MODULES, such as pipeline/source.py; of all that decide, if none is named."""
    unknown = sorted(set(modules) - TESTS.keys())
    if unknown:
        raise click.UsageError(f"there are no tests for {unknown[0]}: add it to TESTS")
    # As an exception, so that the copy is removed.
    signal.signal(signal.SIGTERM, lambda *told: sys.exit(143))
    start = time.monotonic()
    everything = {module: mutants_of(ROOT, module, tests) for module, tests in TESTS.items()}
    chosen = choose(everything, count, seed)
    if modules:
        chosen = [mutant for mutant in chosen if mutant.module in modules]
    memory = Memory(ROOT / "build" / "mutants.txt", added=added)
    load_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name) / "copy"
        copy_tree(ROOT, folder)
        results = []
        for mutant, killed in judge(Trials(folder), chosen, memory):
            results.append((mutant, killed))
            if len(results) % 25 == 0:
                spent = time.monotonic() - start
                click.echo(f"{len(results)} of {len(chosen)} tried after {spent:.0f} s")
    if report(results) < least:
        sys.exit(f"fewer than {least:.0%} were killed")


if __name__ == "__main__":
    main()
