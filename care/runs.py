"""The folder of a training run: its settings, checkpoints and logs.

runs/NAME/
  settings.yaml       what the run was told
  amendments.jsonl    what was changed by --amend, and from which step on
  last.pt             everything needed to go on after the last step that was saved
  step-00008340.pt    the same of steps before it
  best.safetensors    weights of the best epoch by validation, with metadata
  log.csv             one row an epoch
  metrics.jsonl       one JSON object a logged step or epoch
  summary.html        their curves
  events.*            the same for TensorBoard
  .lock               held by the process that writes all this
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml

from care import checkpoint
from care.boards import Board
from care.history import History
from care.settings import TrainSettings
from pipeline.core import yamlfile
from pipeline.core.checkpoints import METADATA_KEY
from pipeline.core.errors import CheckpointError, ConfigError, LockedError
from pipeline.core.plain import parse_json

Facts = Mapping[str, Any]

_LOCK = ".lock"
_LOCK_SECONDS = 10.0
"""How long to wait for a process that ends: workers of one that was killed end a moment later."""

_AMENDMENTS = "amendments.jsonl"
_NOTHING = object()

_TEMPORARY = tuple(
    f".{name}.*.tmp"
    for name in (
        *("last.pt", "best.safetensors", "settings.yaml", "log.csv", "metrics.jsonl"),
        *("summary.html", _AMENDMENTS),
    )
)
"""How files are called until they are whole."""

_OWN = (
    "best.safetensors",
    "log.csv",
    "metrics.jsonl",
    "summary.html",
    _AMENDMENTS,
    "events.out.tfevents.*",
)
"""What an earlier run leaves behind, beside the settings, which are replaced."""


class RunFolder:
    """Where one run keeps its files.

    Args:
        settings: Of the run; say where it is and what to do if it exists.

    Attributes:
        path: The folder.
        settings: As the run goes on with them: with what was amended, now or before.
        resumes: The run was started before and goes on.

    Raises:
        ConfigError: The run exists and is neither to be resumed nor overwritten; or it is to be
            resumed, but was started with other settings; or the folder holds something else; or
            the file to export to is somebody else's.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.path = settings.folder
        self.given = self.settings = settings
        self.resumes = False
        self.history = History(self.path, settings.keep)
        known = self.path / "settings.yaml"
        _refuse_foreign_export(settings.export)
        if self.path.exists() and not (self.path.is_dir() and _is_empty(self.path)):
            if not _is_settings(known):
                raise ConfigError(
                    f"{self.path} exists and is no run: choose another --name or --output"
                )
            if not settings.resume and not settings.overwrite:
                raise ConfigError(
                    f"run {self.path} exists: go on with --resume, start anew with --overwrite, "
                    "or choose another --name"
                )
            self.resumes = settings.resume
        if settings.amend and not self.resumes:
            raise ConfigError("--amend changes a run that goes on: give --resume, or no --amend")
        if self.resumes:
            _refuse_another_run(known, settings)
            self.settings = settings.amended({**self._amendments(), **settings.amend})

    @property
    def last(self) -> Path:
        """Checkpoint to go on from."""
        return self.history.last

    @property
    def best(self) -> Path:
        """Weights of the best epoch."""
        return self.path / "best.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from this run, and create its folder.

        Raises:
            LockedError: Another process works on the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / _LOCK, timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise LockedError(
                f"another process trains in {self.path}: wait for it or stop it, or choose another "
                "--name"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def prepare(self) -> None:
        """Write the settings; without an earlier run unless that goes on.

        Of an earlier run that is overwritten only its own files go; others in its folder stay.
        """
        for pattern in _TEMPORARY:
            for path in self.path.glob(pattern):  # of a process that was killed in a save
                path.unlink()
        if not self.resumes:
            self.history.clear()
            for pattern in _OWN:
                for path in self.path.glob(pattern):
                    path.unlink()
        said = {"resume", "overwrite", "amend"}
        settings = {k: v for k, v in self.given.model_dump(mode="json").items() if k not in said}
        _write_text(self.path / "settings.yaml", yaml.safe_dump(settings, sort_keys=False))

    def read_last(self, facts: Facts, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None before the first.

        Args:
            facts: What was found (not set) and must be the same, such as the number of images.
            say: Tells the user of a checkpoint that is damaged.

        Raises:
            ConfigError: A fact differs.
            CheckpointError: There are checkpoints, but none is whole.
        """
        if not self.resumes:
            return None
        saved = self.history.read(say)
        if saved is None:
            return None
        known = saved[METADATA_KEY].get("facts")
        if known is None:
            raise CheckpointError(
                f"{self.last} was not written by care.train: start with --overwrite"
            )
        differing = _differences(known, json.loads(json.dumps(facts)))
        if differing:
            raise ConfigError(f"{self.path} cannot be resumed: {differing}")
        return saved

    def record(self, steps: int) -> None:
        """Keep what is amended from a step on, for those who go on later, and for the record."""
        earlier = self._amendments()
        now = self.settings.model_dump(mode="json")  # of the right types, as 1e-4 in YAML is text
        changes = {k: now[k] for k in self.given.amend if earlier.get(k, _NOTHING) != now[k]}
        if not changes:
            return
        path = self.path / _AMENDMENTS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        _write_text(path, text + json.dumps({"step": steps, "changes": changes}) + "\n")

    def _amendments(self) -> dict[str, Any]:
        """Everything amended so far; the latest change of a setting counts."""
        path = self.path / _AMENDMENTS
        found: dict[str, Any] = {}
        if path.exists():
            try:
                for line in path.read_text(encoding="utf-8").splitlines():
                    found.update(_entry(line)["changes"])
            except (ConfigError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} is damaged: mend or remove it") from error
        return found

    def export(self, target: Path) -> None:
        """Copy the best weights to `target`.

        Raises:
            ConfigError: A file there is no such checkpoint, or it cannot be written.
        """
        _refuse_foreign_export(target)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.best, temporary)
            temporary.replace(target)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def save_last(self, state: Mapping[str, Any], facts: Facts) -> None:
        """Write `last.pt`, whole or not at all."""
        self.history.save(state, {"facts": dict(facts)})


class Logbook:
    """Writes the logs of a run.

    Args:
        path: Folder of the run.
        steps: Steps taken so far; what was logged of later ones, before a crash, is dropped.
        validated: Epochs judged so far; the same of later ones.
        boards: Also write what each of these shows.
        writes: This is the process that writes; the others' entries go nowhere.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        validated: int,
        boards: Sequence[Board] = (),
        writes: bool = True,
    ) -> None:
        self.events, self.table = path / "metrics.jsonl", path / "log.csv"
        self.writes = writes
        self.boards = boards if writes else ()
        if not writes:
            return
        _keep(self.events, lambda line: _is_earlier(_entry(line), steps, validated))
        _keep(self.table, lambda line: _epoch_of_row(line) <= validated)

    def step(self, values: Mapping[str, float | int | None]) -> None:
        """Log a step: `epoch`, `step` and what was measured."""
        self._append("step", values)

    def skipped(self, values: Mapping[str, Any]) -> None:
        """Log a step that was not taken: `epoch`, `step` and why."""
        if self.writes:
            self._write({"kind": "skipped", **values})

    def epoch(self, values: Mapping[str, float | int | None]) -> None:
        """Log an epoch: `epoch`, `step` and what was measured."""
        self._append("epoch", values)
        if not self.writes:
            return
        new = not self.table.exists()
        with self.table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(values)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *error: object) -> None:
        for board in self.boards:
            board.close()

    def _append(self, kind: str, values: Mapping[str, float | int | None]) -> None:
        if not self.writes:
            return
        self._write({"kind": kind, **values})
        for board in self.boards:
            board.show(kind, values)

    def _write(self, event: Mapping[str, Any]) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def to_cpu(state: Any) -> Any:
    """Nested state with all tensors on the CPU, so that a checkpoint loads on any machine."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [to_cpu(value) for value in state]
    return state


def _is_settings(path: Path) -> bool:
    """Whether a file says what a run was told, of this version or another."""
    try:
        known = yamlfile.value_of(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, ConfigError):
        return False
    return isinstance(known, dict) and {"model", "data", "epochs", "output"} <= set(known)


def _refuse_foreign_export(target: Path | None) -> None:
    """Refuse to write weights over a file that is no checkpoint of ours."""
    if target is None or not target.exists():
        return
    try:
        is_ours = "model" in checkpoint.read_metadata(target)
    except CheckpointError:
        is_ours = False
    if not is_ours:
        raise ConfigError(
            f"{target} exists and was not exported by care.train: move it away, or choose another "
            "--export"
        )


def _refuse_another_run(path: Path, settings: TrainSettings) -> None:
    try:
        known = yamlfile.value_of(path.read_text(encoding="utf-8"), str(path))
        before = TrainSettings(**known).identity()
    except (ConfigError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read, so the run cannot be resumed: start with --overwrite"
        ) from error
    differing = _differences(before, settings.identity())
    if differing:
        raise ConfigError(
            f"{path.parent} is a different run and cannot be resumed: {differing}; "
            "give the same settings, or another --name"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


def _entry(line: str) -> Any:
    return parse_json(line, "an entry of the log", ConfigError)


def _is_earlier(event: Mapping[str, Any], steps: int, validated: int) -> bool:
    """Whether an event happened before a run goes on."""
    if event["kind"] == "epoch":
        return bool(event["epoch"] <= validated)
    return bool(event["step"] <= steps)


def _epoch_of_row(line: str) -> int:
    first = line.split(",", 1)[0]
    return -1 if first == "epoch" else int(first)


def _keep(log: Path, wanted: Callable[[str], bool]) -> None:
    """Keep some lines, but no last one that a crash left unfinished."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    _write_text(log, "".join(line for line in lines if line.endswith("\n") and wanted(line)))


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what comes before the settings."""
    names = {path.name for path in folder.iterdir()} - {_LOCK}
    return all(name.startswith(".settings.yaml.") and name.endswith(".tmp") for name in names)


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)
