"""What the commands of `python -m pipeline` do, as functions that return text and exit codes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.api.results import carry_out, refuse_foreign
from pipeline.commands.artifacts import log_of
from pipeline.commands.console import JsonConsole, QuietConsole, RichConsole
from pipeline.config import Config, FleetConfig, Written
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.files import refuse_foreign_file, write_atomically
from pipeline.core.words import shown
from pipeline.report.overview import told_first, verdict
from pipeline.report.terminal import summary
from pipeline.scheduler.elsewhere import planned_elsewhere, require_sound_place
from pipeline.scheduler.execute import dry_run as plan_run
from pipeline.scheduler.plan import Selection, make_context, open_store
from pipeline.scheduler.preflight import require_said, require_sound
from pipeline.stages.context import RunContext
from pipeline.steps.folders import locked
from pipeline.steps.step import Step

if TYPE_CHECKING:
    from pipeline.scheduler.estimate import Estimates

LOOKS = {"rich": RichConsole, "quiet": QuietConsole, "json": JsonConsole}


def run(
    written: Written,
    path: Path,
    selection: Selection,
    *,
    look: str,
    wait_s: float,
    jobs: int = 1,
    audit: float = 0.0,
    verbose: bool = False,
    junit: Path | None = None,
) -> int:
    """Run the pipeline, print its summary and return the exit code.

    Args:
        written: The configuration.
        path: Where it was read.
        selection: Which steps.
        look: One of `LOOKS`.
        wait_s: How long to wait for another run.
        jobs: Steps at once.
        audit: Share of what is made that is made once more, see `pipeline.scheduler.audit`.
        verbose: Show the lines of the log as well.
        junit: Where to write steps and gates as JUnit XML.

    Raises:
        ConfigError: The run cannot succeed; all that is wrong. Nothing was written.
        StoreError: The store does not answer, and is required.
    """
    config = written.config
    require_sound_place(config)
    first = _looking(config)
    refuse_foreign(first, selection)
    if junit is not None:
        from pipeline.report.junit import is_junit  # here: few runs write XML

        refuse_foreign_file(junit, is_junit)
    early: list[str] = []
    store = open_store(config, early.append)
    told = require_sound(written, first, selection, store)
    with (
        locked(config.folder, wait_s),
        log_of(config) as log,
        log.captured() as screen,
        LOOKS[look](screen) as console,
    ):
        if verbose:
            log.also = console.logged
        for line in early:
            console.warn(line)
        if store is not None:
            store.warn = console.warn
        console.costs(lambda: _costs(first, selection))
        came_to = carry_out(
            written, path, selection, log, console, first, store, told, jobs, audit=audit
        )
        if isinstance(console, JsonConsole):
            console.summary(
                exit_code=came_to.exit_code,
                verdict=verdict(came_to).line,
                use={target: choice.precision for target, choice in came_to.choice.items()},
                alerts=list(told_first(came_to)),
                report=f"{came_to.folder}/report.html",
                results=f"{came_to.folder}/results.json",
            )
    if junit is not None:
        from pipeline.report.junit import is_junit, run_as_junit

        write_atomically(junit, run_as_junit(came_to), is_junit)
    if look != "json":
        print(summary(came_to))
    return came_to.exit_code


def with_fleet(written: Written, scheduler: str | None, insecure: bool) -> Written:
    """The configuration, with what the command line says of a fleet.

    Raises:
        ConfigError: The address can be none, or there is none.
    """
    stated = written.config.fleet
    if scheduler is None and not insecure:
        return written
    if scheduler is None and stated is None:
        raise ConfigError("--insecure is for a fleet: give --scheduler, too")
    values: dict[str, Any] = {} if stated is None else stated.model_dump()
    values["insecure"] = insecure or values.get("insecure", False)
    values["scheduler"] = scheduler or values["scheduler"]
    try:
        fleet = FleetConfig(**values)
    except ValidationError:
        raise ConfigError(
            f"--scheduler: {shown(scheduler)} is no address of a scheduler: write tls://HOST:PORT"
        ) from None
    return replace(written, config=written.config.model_copy(update={"fleet": fleet}))


def refuse_wrong(written: Written) -> None:
    """Refuse a configuration that no run can follow, on whatever machine.

    Raises:
        ConfigError: It says something wrong; all of it.
    """
    require_said(written, _looking(written.config), Selection())


def _looking(config: Config) -> RunContext:
    """What only looks works with."""
    return make_context(config, lambda line: None, QuietConsole(sys.stderr).progress)


def _costs(context: RunContext, selection: Selection) -> list[str]:
    """What the run takes, in words; nothing where only the run itself can tell what is wrong."""
    try:
        place = planned_elsewhere(context.config)
        reasons = plan_run(context, selection, verify=False, elsewhere=place)
        if all(why is None for _, why in reasons):
            return []
        from pipeline.scheduler.estimate import Estimates  # here: an up-to-date run costs nothing

        return Estimates(context).lines(reasons)
    except (PipelineError, OSError):
        return []


def dry_run(written: Written, selection: Selection) -> str:
    """The plan, with the reason for every step.

    Raises:
        ConfigError: The run cannot succeed; all that is wrong.
    """
    from pipeline.scheduler.estimate import Estimates

    config = written.config
    context = _looking(config)
    refuse_foreign(context, selection)
    require_sound(written, context, selection, load=False)
    place = planned_elsewhere(config)
    estimates, reasons = Estimates(context), plan_run(context, selection, elsewhere=place)
    rows = [_row(step, why, estimates) for step, why in reasons]
    # Lines, not a table: reasons may name long paths, and scripts read this.
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {why}" for a, b, why in rows]
    costs = estimates.lines(reasons)
    return "\n".join([*lines, "", *costs] if costs else lines)


def _row(step: Step, why: str | None, estimates: Estimates) -> tuple[str, str, str]:
    """A line of the plan: what a step is, why it runs, and how long it takes."""
    if why is None:
        return step.stage, step.name, "up to date"
    return step.stage, step.name, f"{why}; {estimates.in_words(step)}"
