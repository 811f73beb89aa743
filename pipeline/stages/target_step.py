"""What the steps of one target share: the target's code in their key, and the machine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import machine
from pipeline.stages.context import RunContext, StageStep
from pipeline.targets.base import LOOKING

if TYPE_CHECKING:
    from pipeline.targets.base import Target


def code_beside(
    context: RunContext,
    runtime: Target,
    modules: Sequence[str],
    aside: Collection[str] = LOOKING,
) -> dict[str, str]:
    """Hashes of modules of a step, but for the target's forms and what only looks at artifacts.

    Args:
        context: The run's.
        runtime: The target, whose module is among the modules.
        modules: Full names.
        aside: Methods of the target that only look.
    """
    forms = {type(form).__module__ for form in runtime.forms}
    return context.code.hashes(modules, registered=forms, aside=aside)


class TargetStep(StageStep):
    """A step that builds, opens or runs artifacts of a target.

    Attributes:
        runtime: The target.
    """

    runtime: Target

    def modules(self) -> list[str]:
        """The step's own, and the target's, which imports what builds, opens and runs."""
        return [*super().modules(), type(self.runtime).__module__]

    def code(self) -> dict[str, str]:
        """See `Step.code`.

        The target's module also imports its forms, to make them known: the graph that a form made
        is an input of the step. And it imports what only looks at artifacts.
        """
        return code_beside(self.context, self.runtime, self.modules())

    @property
    def takes_photos(self) -> bool:
        """Whether the artifacts hold a model that prepares photographs itself."""
        able = self.runtime.takes_photos
        return able and self.context.config.export.preprocessing == "graph"

    def machine(self) -> dict[str, Any]:
        """What machines have in common of which one's measurement holds for the other."""
        return {**machine.cpu_class(), **self.runtime.hardware()}
