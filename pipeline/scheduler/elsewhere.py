"""Where steps run that do not run in a run's own process: a fleet, or processes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.source import Source
from pipeline.steps.step import Elsewhere

if TYPE_CHECKING:
    from pipeline.scheduler.side_by_side import Running


def require_sound_place(config: Config) -> None:
    """Refuse a fleet that no run can work with; nothing is asked of it.

    Raises:
        ConfigError: There is no store that workers can reach, or the way there is not encrypted.
    """
    if config.fleet is None:
        return
    from pipeline.scheduler.fleet import require_sound_fleet  # here: few runs need a fleet

    require_sound_fleet(config)


def planned_elsewhere(config: Config) -> Elsewhere | None:
    """What is known of the machines where a run's steps run, without asking a fleet.

    Its workers' machines are not: what they made counts, and the run itself looks closer.
    """
    if config.fleet is None:
        return None
    from pipeline.scheduler.fleet import hardware  # here: few runs need a fleet
    from pipeline.scheduler.places import FleetPlaces

    there = config.fleet.resources or ()
    return FleetPlaces(lambda step: hardware(step, there), lambda step: None)


@contextmanager
def elsewhere(
    config: Config, jobs: int, source: Source, warn: Callable[[str], object]
) -> Iterator[Running | None]:
    """What runs the steps; None if they run in this process, one after the other.

    Args:
        config: The configuration: its fleet comes before local processes.
        jobs: How many local processes.
        source: The network.
        warn: Is told what a step waits for.

    Raises:
        ConfigError: See `require_sound_place`.
        UnavailableError: The scheduler does not answer, or dask.distributed is not installed.
    """
    if config.fleet is not None:
        from pipeline.scheduler.fleet import connected

        with connected(config, source, warn) as fleet:
            yield fleet
    elif jobs > 1:
        from pipeline.scheduler.side_by_side import local  # here: most runs need one process

        with local(config, jobs) as running:
            yield running
    else:
        yield None
