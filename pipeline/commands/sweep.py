"""Several configurations, one after the other, and one table of what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline.commands import run
from pipeline.config import Config
from pipeline.core import yamlfile
from pipeline.core.errors import ArtifactError, ConfigError
from pipeline.core.files import read_regular, write_atomically
from pipeline.core.inputs import expanded
from pipeline.core.plain import read_json
from pipeline.core.words import nearest_or_all
from pipeline.report import sweep
from pipeline.report.model import Run
from pipeline.scheduler.plan import Selection
from pipeline.steps.folders import RESULTS_FILE

KEYS = ("configurations", "output")
_FIRST_LINE = ",".join(sweep.COLUMNS).encode()


def run_all(path: Path, *, look: str, jobs: int) -> tuple[str, int]:
    """Run every configuration of a sweep; text and the highest exit code.

    Raises:
        ConfigError: The sweep, or one of its configurations, is wrong: nothing has run then.
        ArtifactError: Somebody else's files lie where the table goes.
    """
    files, output = read(path)
    written = [(file, configuration.read(file)) for file in files]
    loaded = [(file, each.config) for file, each in written]
    _require_distinct(loaded, path)
    codes = [
        run.run(each, file, Selection(), look=look, wait_s=0.0, jobs=jobs) for file, each in written
    ]
    rows = sweep.rows_of(Run.read(config.folder / RESULTS_FILE) for _, config in loaded)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "sweep.json", sweep.as_json(rows), _is_json)
    write_atomically(output / "sweep.csv", sweep.as_csv(rows), _is_csv)
    return f"{sweep.as_text(rows)}\ntable: {output / 'sweep.csv'}", max(codes)


def read(path: Path) -> tuple[list[Path], Path]:
    """The configurations that a sweep names, and where its table goes.

    Raises:
        ConfigError: It names none, or something else.
    """
    document = yamlfile.read(path)
    for key in document.values:
        if key not in KEYS:
            raise ConfigError(
                f"{document.place((key,))}: {key}: unknown key{nearest_or_all(str(key), KEYS)}"
            )
    named: Any = document.values.get("configurations")
    output: Any = document.values.get("output", f"engines/{path.stem}")
    place = document.place(("configurations",))
    if not isinstance(named, list) or not named or not all(isinstance(n, str) for n in named):
        raise ConfigError(f"{place}: configurations: name a list of configuration files")
    if not isinstance(output, str):
        raise ConfigError(f"{document.place(('output',))}: output: name a folder")
    return [path.parent / expanded(name) for name in named], Path(expanded(output))


def _require_distinct(loaded: list[tuple[Path, Config]], path: Path) -> None:
    """Refuse two configurations with the same results' folder: one would undo the other."""
    seen: dict[Path, Path] = {}
    for file, config in loaded:
        if config.folder in seen:
            raise ConfigError(
                f"{path}: {seen[config.folder]} and {file} both write {config.folder}: give them "
                "different names"
            )
        seen[config.folder] = file


def _is_json(path: Path) -> bool:
    try:
        plain = read_json(path)
    except ArtifactError:
        return False
    return isinstance(plain, dict) and set(plain) == {"format", "rows"}


def _is_csv(path: Path) -> bool:
    try:
        return read_regular(path, 100_000_000).startswith(_FIRST_LINE)
    except ArtifactError:
        return False
