"""The folder of a training run: its settings, checkpoints and logs.

runs/NAME/
  settings.yaml       what the run was told
  last.pt             everything needed to go on after the last whole epoch
  best.safetensors    weights of the best epoch by validation, with metadata
  log.csv             one row an epoch
  log.jsonl           one JSON object a logged step or epoch
  events.*            the same for TensorBoard
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from care import checkpoint
from care.settings import TrainSettings
from pipeline.core import yamlfile
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.plain import parse_json

Facts = Mapping[str, Any]

_OWN = ("last.pt", "best.safetensors", "log.csv", "log.jsonl", "events.out.tfevents.*")
"""What an earlier run leaves behind, beside the settings, which are replaced."""


class RunFolder:
    """Where one run keeps its files.

    Args:
        settings: Of the run; say where it is and what to do if it exists.

    Attributes:
        path: The folder.
        resumes: The run was started before and goes on.

    Raises:
        ConfigError: The run exists and is neither to be resumed nor overwritten; or it is to be
            resumed, but was started with other settings; or the folder holds something else; or
            the file to export to is somebody else's.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.path = settings.folder
        self.settings = settings
        self.resumes = False
        known = self.path / "settings.yaml"
        _refuse_foreign_export(settings.export)
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not _is_settings(known):
            raise ConfigError(
                f"{self.path} exists and is no run: choose another --name or --output"
            )
        if settings.resume:
            _refuse_another_run(known, settings)
            self.resumes = True
        elif not settings.overwrite:
            raise ConfigError(
                f"run {self.path} exists: go on with --resume, start anew with --overwrite, "
                "or choose another --name"
            )

    @property
    def last(self) -> Path:
        """Checkpoint to go on from."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """Weights of the best epoch."""
        return self.path / "best.safetensors"

    def prepare(self) -> None:
        """Create the folder, without an earlier run unless that goes on (main process only).

        Of an earlier run that is overwritten only its own files go; others in its folder stay.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resumes:
            for pattern in _OWN:
                for path in self.path.glob(pattern):
                    path.unlink()
        settings = {k: v for k, v in self.settings.model_dump(mode="json").items() if k != "resume"}
        _write_text(self.path / "settings.yaml", yaml.safe_dump(settings, sort_keys=False))

    def read_last(self, facts: Facts) -> dict[str, Any] | None:
        """What `last.pt` holds, or None before the first whole epoch.

        Args:
            facts: What was found (not set) and must be the same, such as the number of images.

        Raises:
            ConfigError: A fact differs.
            CheckpointError: The file is damaged.
        """
        if not self.resumes or not self.last.exists():
            return None
        saved = checkpoint.read_all(self.last)
        known = saved[checkpoint.METADATA_KEY].get("facts")
        if known is None:
            raise CheckpointError(
                f"{self.last} was not written by care.train: start with --overwrite"
            )
        differing = _differences(known, json.loads(json.dumps(facts)))
        if differing:
            raise ConfigError(f"{self.path} cannot be resumed: {differing}")
        return saved

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
        checkpoint.save(self.last, state, {"facts": dict(facts)})


class Logbook:
    """Writes the logs of a run.

    Args:
        path: Folder of the run.
        epoch: Whole epochs done; what was logged of later ones, before an interruption, is dropped.
        steps: Optimizer steps taken so far.
        tensorboard: Also write TensorBoard events.
        writes: This is the process that writes; the others' entries go nowhere.
    """

    def __init__(
        self, path: Path, epoch: int, steps: int, tensorboard: bool, writes: bool = True
    ) -> None:
        self.events, self.table = path / "log.jsonl", path / "log.csv"
        self.writes = writes
        self.board: Any = None
        if not writes:
            return
        for log, parse in ((self.events, _entry), (self.table, _epoch_of_row)):
            _keep_before(log, epoch, parse)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(str(path), purge_step=steps)

    def step(self, values: Mapping[str, float | int]) -> None:
        """Log a step: `epoch`, `step` and what was measured."""
        self._append("step", values)

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
        if self.board is not None:
            self.board.close()

    def _append(self, kind: str, values: Mapping[str, float | int | None]) -> None:
        if not self.writes:
            return
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if name not in ("epoch", "step") and value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, values["step"])


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


def _epoch_of_row(line: str) -> dict[str, int]:
    first = line.split(",", 1)[0]
    return {"epoch": -1 if first == "epoch" else int(first)}


def _keep_before(log: Path, epoch: int, parse: Any) -> None:
    """Drop the lines of epochs after `epoch`, and a last line that a crash left unfinished."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    _write_text(log, "".join(line for line in whole if parse(line)["epoch"] <= epoch))


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)
