"""What the steps of the stages work with: the configuration, the network and the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.steps.step import Context, Step

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.source import Source


@dataclass(frozen=True, kw_only=True)
class RunContext(Context):
    """What every step of a run works with.

    Attributes:
        config: The configuration.
        source: The network and the images that the configuration names.
    """

    config: Config
    source: Source


class StageStep(Step):
    """A step of one of the stages."""

    context: RunContext
    from_source: bool = False
    """Whether it works with the network or the images themselves, see `source`."""

    def modules(self) -> list[str]:
        """See `Step.modules`."""
        own = super().modules()
        return [*own, type(self.context.source).__module__] if self.from_source else own

    @property
    def source(self) -> Source:
        """The network and the images that the configuration names.

        The code that opens and reads them is part of the key of a step that says `from_source`, so
        that no other step may ask.
        """
        assert self.from_source, f"{type(self).__name__} uses the source without from_source"
        return self.context.source
