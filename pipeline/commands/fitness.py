"""`fitness`: does an artifact suit the device's accelerator?"""

from __future__ import annotations

from pipeline.commands.artifacts import one_artifact
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.targets.registry import TARGETS, able


def fitness(config: Config, target: str | None, *, precision: str | None, images: int) -> str:
    """Checks of a built artifact for the device's accelerator, with advice.

    Raises:
        InputError: The artifact is not built, or the target has no such checks.
    """
    target = target or able("fitness")[0]
    with one_artifact(config, target, precision, images) as (_, step, chosen):
        rows = TARGETS[target].fitness(step.artifact(), chosen)
    if rows is None:
        raise InputError(
            f"{target} has no checks of fitness; {', '.join(able('fitness'))} can tell"
        )
    lines = []
    for row in rows:
        lines.append(f"{row['level']:<8} {row['check']}: {row['found']}")
        if row["advice"]:
            lines.append(f"{'':<8} {row['advice']}")
        if row["where"]:
            lines.append(f"{'':<8} such as {', '.join(row['where'])}")
    return "\n".join(lines)
