"""A whole run from a program: what `python -m pipeline run` does, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import config as configuration
from pipeline.core.errors import InputError
from pipeline.core.figures import Number
from pipeline.core.files import refuse_foreign_file
from pipeline.core.hashes import HashCache
from pipeline.core.words import nearest_or_all
from pipeline.report import write
from pipeline.report.model import BuiltArtifact, Run
from pipeline.scheduler.elsewhere import elsewhere, require_sound_place
from pipeline.scheduler.execute import Observer, execute
from pipeline.scheduler.plan import STAGES, Selection, make_context, open_store, plan
from pipeline.scheduler.preflight import require_sound
from pipeline.stages.context import RunContext
from pipeline.steps import keys
from pipeline.steps.artifact import refuse_foreign_folder
from pipeline.steps.folders import (
    HASHES,
    IMPORTS,
    LOG_FILE,
    RESULTS_FILE,
    UNREPORTED,
    locked,
    refuse_foreign_lock,
)
from pipeline.steps.log import Log, is_log
from pipeline.steps.stated import is_unreported
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from pipeline.api.model import Model
    from pipeline.store.shared import Shared


@dataclass(frozen=True)
class Results:
    """What a run came to.

    Attributes:
        run: All that results.json holds, typed.
    """

    run: Run

    @property
    def folder(self) -> Path:
        """Where results.json, the report and the artifacts lie."""
        return Path(self.run.folder)

    @property
    def exit_code(self) -> int:
        """0 if everything was built and no gate failed; else as the command line's."""
        return self.run.exit_code

    def table(self) -> list[dict[str, Any]]:
        """A row for every artifact, of plain values: `pandas.DataFrame(results.table())`.

        Shares are 0 … 1, latency is in milliseconds, size in bytes. A figure that was not measured
        is None, and its `…_state` says so; `use` marks the precision to ship for a target.
        """
        return [self._row(artifact) for artifact in self.run.artifacts]

    def _row(self, artifact: BuiltArtifact) -> dict[str, Any]:
        accuracy = artifact.accuracy
        choice = self.run.choice.get(artifact.target)
        return {
            "artifact": artifact.name,
            "target": artifact.target,
            "precision": artifact.precision,
            "use": choice is not None and choice.precision == artifact.precision,
            "top1": accuracy.top1.value,
            "top1_state": str(accuracy.top1.state),
            "top1_drop": _value(accuracy.top1_drop),
            "agreement": _value(accuracy.agreement),
            "worst_class": accuracy.by_class.worst if accuracy.by_class else None,
            "worst_class_top1": accuracy.by_class.top1.value if accuracy.by_class else None,
            **{f"metrics.{name}": number.value for name, number in accuracy.metrics.items()},
            "latency_ms": artifact.latency.value,
            "latency_state": str(artifact.latency.state),
            "bytes": artifact.size,
            "folder": str(self.folder / artifact.name) if artifact.built else None,
            "failure": artifact.failure,
        }

    def model(self, name: str) -> Model:
        """Open one of the artifacts.

        Args:
            name: Target and precision, such as "ort/int8".

        Raises:
            InputError: The run has no such artifact, or it was not built.
            ArtifactError: It is damaged.
            UnavailableError: This machine can neither run nor emulate it.
        """
        # A run itself needs no Pillow.
        from pipeline.api.model import load

        built = [artifact.name for artifact in self.run.artifacts if artifact.built]
        if name not in built:
            raise InputError(f"{name} was not built: there are {', '.join(built) or 'none'}")
        return load(self.folder / name)

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Read what an earlier run left in a folder.

        Raises:
            ArtifactError: It holds no results, or damaged ones.
        """
        return cls(Run.read(Path(folder) / RESULTS_FILE))


def _value(number: Number | None) -> float | None:
    return number.value if number else None


def run(
    config: str | Path | Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    targets: Sequence[str] = (),
    force: bool = False,
    wait_s: float = 0.0,
    jobs: int = 1,
    audit: float = 0.0,
    observer: Observer | None = None,
) -> Results:
    """Build, validate and measure all that a configuration names; only what is out of date runs.

    A target that fails does not stop the others: look at `Results.exit_code` and the rows'
    `failure`. The report's pages are written, too.

    Args:
        config: A configuration file, or its content as a mapping.
        only: These stages alone, such as ("build", "validate").
        targets: These targets alone, such as ("ort",).
        force: What is selected runs even if it is up to date.
        wait_s: How long to wait for another run in the same folder, in seconds.
        jobs: How many steps run at once, in processes of their own, where no fleet runs them.
        audit: Share, 0 to 1, of what is made that is made once more elsewhere, and compared.
        observer: Is told what happens.

    Raises:
        ConfigError: The configuration is wrong, or cannot succeed; the message says all that is
            wrong, and where. Nothing was written.
        InputError: A stage or target is unknown, or `jobs` makes no sense.
        LockedError: Another run works in the folder.
        UnavailableError: The scheduler of the configuration's fleet does not answer.
        StoreError: The configuration's store does not answer, and is required.
    """
    if isinstance(config, Mapping):
        path, written = Path("(a mapping)"), configuration.from_mapping(config)
    else:
        path = Path(config)
        written = configuration.read(path)
    loaded = written.config
    _require_known("stage", only, STAGES)
    _require_known("target", targets, tuple(TARGETS))
    _require_jobs(jobs, loaded)
    if not 0 <= audit <= 1:
        raise InputError(f"audit is {audit}: a share lies between 0 and 1")
    selection = Selection(tuple(only), None, tuple(targets), force)
    observer = observer or Observer()
    require_sound_place(loaded)
    first = make_context(loaded, lambda line: None, observer.progress)
    refuse_foreign(first, selection)
    store = open_store(loaded, observer.warn)
    told = require_sound(written, first, selection, store)
    with locked(loaded.folder, wait_s):
        log = Log(loaded.folder / LOG_FILE)
        try:
            came_to = carry_out(
                written, path, selection, log, observer, first, store, told, jobs, audit=audit
            )
            return Results(came_to)
        finally:
            log.close()


def carry_out(
    written: configuration.Written,
    path: Path,
    selection: Selection,
    log: Log,
    observer: Observer,
    first: RunContext,
    store: Shared | None,
    told: str,
    jobs: int,
    *,
    audit: float = 0.0,
) -> Run:
    """Run what is selected and write the report, in a folder that is locked.

    Args:
        written: The configuration, found sound.
        path: Where it was read.
        selection: Which steps.
        log: The log of the results.
        observer: Is told what happens.
        first: What the preflight worked with: what it has read is not read again.
        store: The configuration's, if it names one: is asked first, and given what is made.
        told: What the preflight had to say.
        jobs: How many steps run at once, where no fleet runs them.
        audit: Share of what is made that is made once more, see `pipeline.scheduler.audit`.

    Raises:
        UnavailableError: The scheduler of a fleet does not answer.
    """
    config = written.config
    for line in told.splitlines():
        log(line)
    context = make_context(config, log, observer.progress, first.source, first.code)
    with elsewhere(config, jobs, first.source, observer.warn) as running:
        outcome = execute(context, selection, observer, store, running, audit)
    return write.write(config, path, outcome)


def _require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{name!r} is no {what}{nearest_or_all(name, known)}")


def _require_jobs(jobs: int, config: configuration.Config) -> None:
    if jobs < 1:
        raise InputError(f"jobs is {jobs}: at least 1 is needed")
    if jobs > 1 and config.fleet is not None:
        raise InputError("jobs is for processes here, a fleet for workers: choose one")


def refuse_foreign(context: RunContext, selection: Selection) -> None:
    """Refuse what somebody else put where a run would write, before as much as a log is written.

    Args:
        context: What the run works with.
        selection: Which steps.

    Raises:
        ArtifactError: There is such a thing; nothing was changed.
    """
    folder = context.folder
    for step in selection.select(plan(context)):
        refuse_foreign_folder(step.folder)
    refuse_foreign_lock(folder)
    refuse_foreign_file(folder / LOG_FILE, is_log)
    refuse_foreign_file(folder / HASHES, HashCache.is_cache)
    refuse_foreign_file(folder / IMPORTS, keys.is_cache)
    refuse_foreign_file(folder / UNREPORTED, is_unreported)
    write.refuse_foreign(folder)
