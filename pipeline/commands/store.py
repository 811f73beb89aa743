"""What lies in the store that a configuration names, and moving results to and from it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline.api.results import refuse_foreign
from pipeline.commands.artifacts import log_of
from pipeline.commands.console import QuietConsole
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.scheduler.plan import Selection, make_context, open_store, plan
from pipeline.stages.context import RunContext
from pipeline.steps.folders import locked
from pipeline.store import upkeep
from pipeline.store.entries import Entries
from pipeline.store.shared import Shared

Say = Callable[[str], None]


def status(config: Config) -> str:
    """Count what the store holds."""
    return _told(upkeep.status(_entries(config)))


def verify(config: Config) -> tuple[str, int]:
    """Read and hash all that the store holds; text and exit code."""
    content = upkeep.verify(_entries(config))
    return _told(content), 1 if content.problems else 0


def collect(config: Config, days: float | None) -> str:
    """Remove what nobody needs."""
    count, size = upkeep.collect(_entries(config), days)
    return f"removed {count} files, {size / 1e6:.1f} MB"


def push(config: Config) -> str:
    """Give the store all artifacts that are up to date and that it lacks."""
    entries = _entries(config)
    given = there = 0
    refuse_foreign(_context(config, lambda line: None), Selection())
    with locked(config.folder), log_of(config) as log:
        for step in plan(_context(config, log)):
            if step.folder.exists() and step.stale() is None:
                is_new = entries.give(step.artifact())
                given, there = given + is_new, there + (not is_new)
    return f"gave {given} artifacts; {there} were there"


def pull(config: Config) -> str:
    """Take all artifacts that are out of date here and that the store holds; nothing is built."""
    store = Shared(_entries(config), push=False, required=True, warn=_warn)
    taken: list[str] = []
    missing: list[str] = []
    refuse_foreign(_context(config, lambda line: None), Selection())
    with locked(config.folder), log_of(config) as log:
        for step in plan(_context(config, log)):
            if any(required.name in missing for required in step.requires):
                missing.append(step.name)
            elif step.stale() is not None:
                (taken if store.take(step) else missing).append(step.name)
    rest = f"; it lacks {', '.join(missing)}" if missing else ""
    return f"took {len(taken)} artifacts{rest}"


def _entries(config: Config) -> Entries:
    """The store's artifacts.

    Raises:
        InputError: The configuration names no store.
        StoreError: The store does not answer.
    """
    if config.store is None:
        raise InputError("the configuration names no store: add store: {address: …}")
    stated = config.store.model_copy(update={"required": True})
    store = open_store(config.model_copy(update={"store": stated}), _warn)
    assert store is not None
    assert store.entries is not None, "a store that is required is open, or an error"
    return store.entries


def _context(config: Config, log: Say) -> RunContext:
    return make_context(config, log, QuietConsole(sys.stderr).progress)


def _warn(text: str) -> None:
    QuietConsole(sys.stderr).warn(text)


def _told(content: upkeep.Content) -> str:
    lines = [
        f"{content.artifacts} artifacts of {content.objects} objects, {content.size / 1e6:.1f} MB",
        f"{content.unnamed} objects that no artifact names, {content.unnamed_size / 1e6:.1f} MB",
    ]
    return "\n".join([*lines, *content.problems])
