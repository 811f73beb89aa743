"""What would an upgrade change? Results, made once more by another environment.

The other environment goes on from copies of what lies here: as for every run, the steps run that
the versions of their tools concern, and those that are made from these.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configuration
from pipeline.commands.environment import changed, pinned, run_in
from pipeline.config import Config
from pipeline.core.errors import (
    BuildError,
    GateFailedError,
    InputError,
    UnavailableError,
)
from pipeline.core.words import printable, shown
from pipeline.report.model import Run
from pipeline.scheduler.execute import Observer, dry_run
from pipeline.scheduler.plan import Selection, make_context
from pipeline.steps.folders import HASHES, RESULTS_FILE, UNREPORTED, artifact_folders
from pipeline.steps.step import State

STAGES = ("export", "simplify", "calibrate", "precision", "build", "validate")
"""What is made once more. Latency is not: two runs one after the other say nothing of it."""

_PROGRAM = __name__.partition(".")[0]
"""What `python -m` is told: the package that this module is in."""

_CAME_TO_AN_END = (0, GateFailedError.exit_code, BuildError.exit_code)
"""Exit codes of runs that leave results: a gate that fails, or a build, is what is looked for."""

_KINDS = {each.exit_code: each for each in (InputError, UnavailableError)}
"""Errors whose exit code is passed on; all else is a run that could not make what it should."""

_IMPORTS_US = "import care.networks, calibration, pipeline.cli"


@dataclass(frozen=True)
class Rebuilt:
    """What the other environment made.

    Attributes:
        folder: Its results; they are gone when the comparison is.
        title: What is other, in words.
        remarks: Which steps ran, and which failed, a line each.
    """

    folder: Path
    title: str
    remarks: tuple[str, ...]


@contextlib.contextmanager
def rebuilt(results: Path, requirements: Sequence[str], python: Path | None) -> Iterator[Rebuilt]:
    """Make results once more, with other versions or by another interpreter.

    Args:
        results: The results' folder.
        requirements: Such as "onnxruntime==1.23.0": in an environment made for it.
        python: An interpreter of an environment that is there, in place of these.

    Raises:
        InputError: The requirements make no sense, or the results are not those of their
            configuration as it is now.
        UnavailableError: There is no such environment, and none can be made.
        BuildError: The run in it failed as a whole.
    """
    wanted = pinned(requirements)
    path, config = _configuration_of(results)
    _require_current(config, path)
    if python is not None:
        with _copied(results, path, config) as copy:
            yield _run(_sound(python), copy, f"by {python}")
        return
    with changed(wanted) as other, _copied(results, path, config) as copy:
        yield _run(other, copy, f"with {', '.join(requirements)}")


def _configuration_of(results: Path) -> tuple[Path, Config]:
    """The configuration that results were made of, as it is now."""
    path = Path(Run.read(results / RESULTS_FILE).config)
    if not path.is_file():
        raise InputError(
            f"{results} was made of the configuration {path}, which is not there: run in the "
            "folder in which its run was started"
        )
    config = configuration.load(path)
    if config.folder.resolve() != results.resolve():
        raise InputError(
            f"{path}, of which {results} was made, puts its results into {config.folder} now: "
            "compare that folder"
        )
    return path, config


def _require_current(config: Config, path: Path) -> None:
    """Refuse results in which more would change than what the other environment does."""
    context = make_context(config, lambda line: None, Observer().progress)
    for step, why in dry_run(context, Selection(only=STAGES), verify=False):
        if why is not None:
            raise InputError(
                f"{config.folder} is not up to date ({step.name}: {why}), so that more would "
                f"differ than the versions: run python -m pipeline run {path} first"
            )


def _sound(python: Path) -> Path:
    """An interpreter that has this project.

    Raises:
        UnavailableError: It has not, or it is none.
    """
    found = shutil.which(python)
    if found is None:
        raise UnavailableError(f"--python: {shown(python)} is no program that can be started")
    try:
        done = run_in([found, "-P", "-c", _IMPORTS_US])
    except OSError as error:
        raise UnavailableError(f"--python: {shown(python)} cannot be started: {error}") from error
    if done.returncode:
        raise UnavailableError(
            f"--python: {shown(python)} lacks this project, or something that it needs "
            f"({_last_line(done.stderr)}): install care-deploy there"
        )
    return Path(found)


@contextlib.contextmanager
def _copied(results: Path, path: Path, config: Config) -> Iterator[Path]:
    """A configuration whose results are a copy of these, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="care-deploy-rebuilt-") as temporary:
        folder = Path(temporary)
        # Nobody else shall get what another environment made, and nobody else shall make it.
        alone = {"output": str(folder), "store": None, "fleet": None}
        written = folder / "rebuilt.yaml"
        # JSON is YAML.
        written.write_text(json.dumps({"extends": str(path.resolve()), **alone}), encoding="utf-8")
        copy = folder / config.name
        for name, place in artifact_folders(results):
            shutil.copytree(place, copy / name, copy_function=_link, dirs_exist_ok=True)
        # Two state the seals; the third spares to hash every image once more.
        for name in (RESULTS_FILE, UNREPORTED, HASHES):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(results / name, copy / name)
        yield written


def _link(source: str, place: str) -> None:
    """The same file in another place: artifacts are replaced as a whole, never written into."""
    try:
        os.link(source, place)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, place)


def _run(python: Path, written: Path, title: str) -> Rebuilt:
    """Run in the other environment what is out of date there."""
    selection = [word for stage in STAGES for word in ("--only", stage)]
    # -P: a file pipeline.py in the working directory would stand for this project.
    command = [str(python), "-P", "-m", _PROGRAM, "run", str(written), "--quiet", *selection]
    print(f"rebuilding {title}", file=sys.stderr, flush=True)
    done = run_in(command)
    if done.returncode not in _CAME_TO_AN_END:
        kind = _KINDS.get(done.returncode, BuildError)
        raise kind(f"the run {title} failed: {_last_line(done.stderr)}")
    folder = written.parent / configuration.load(written).name
    return Rebuilt(folder, title, _remarks(title, Run.read(folder / RESULTS_FILE)))


def _remarks(title: str, run: Run) -> tuple[str, ...]:
    """Which steps were made anew, and which could not be."""
    made = [end.name for end in run.steps if end.state is State.DONE]
    failed = [f"{end.name} failed: {end.why}" for end in run.steps if end.state is State.FAILED]
    told = f"made anew: {', '.join(made)}" if made else "nothing is made by what is other"
    return (f"{title}, {told}", *failed)


def _last_line(text: str) -> str:
    return printable(text.strip().rpartition("\n")[2] or "it ended without a word")[:600]
