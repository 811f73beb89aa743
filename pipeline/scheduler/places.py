"""Whether what another machine made counts for a run whose steps run on a fleet.

Where a run is planned nobody knows the machines of a fleet: no GPU is here to be asked. So a plan
compares all that it can decide, takes from the artifact what that says of its machine, and asks
here about the rest. What is judged on its hardware, and what was decided by timing, counts only
where the fleet has such a machine: no worker's figure stands for another one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.steps.artifact import Artifact
from pipeline.steps.step import MACHINE, Step, flat, machine_of

CPU = "cpu"
"""What every worker states that runs what needs no hardware."""

MachineFacts = Mapping[str, Any]
"""What a worker tells of its machine: "cpu", and by target what else there decides a figure."""


@dataclass(frozen=True)
class FleetPlaces:
    """The machines of a fleet, as far as they are known; see `pipeline.steps.step.Elsewhere`.

    Attributes:
        resource: What a step needs beside `bench`, of what the fleet has.
        machines: What the workers tell that a step may run on; None where nobody was asked.
    """

    resource: Callable[[Step], str]
    machines: Callable[[Step], Sequence[MachineFacts] | None]

    def why_not(self, step: Step, made: Artifact) -> str | None:
        """See `pipeline.steps.step.Elsewhere`."""
        told = machine_of(made.inputs or {})
        measured_on = {name: value for name, value in told.items() if _tells_of(name)}
        lacking = [value for name, value in told.items() if name not in measured_on and value]
        resource = self.resource(step)
        if lacking and resource != CPU:
            return f"it did not run on its hardware, and the fleet has {resource}"
        if not measured_on:
            return None
        there = self.machines(step)
        if there is None or any(_as_told(step, facts) == measured_on for facts in there):
            return None
        return "measured on a machine such as the fleet has none"


def _tells_of(name: str) -> bool:
    return name.partition(".")[0] == MACHINE


def _as_told(step: Step, facts: MachineFacts) -> dict[str, Any]:
    """What a step's key would say of a worker's machine."""
    hardware = facts.get("targets", {}).get(step.target, {})
    return flat({MACHINE: {**facts.get("cpu", {}), **hardware}})
