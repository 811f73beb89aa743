"""Steps that a run cut into shards, so that several processes or workers share their work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.steps.step import StageResult, State, Step


@dataclass
class Cuts:
    """Which shards there are, and of which steps.

    Attributes:
        wholes: The step that a shard belongs to, by shard.
        since: When a step was cut, by the monotonic clock, in seconds.
        new: Shards that nothing waits for yet, and after them the steps that wait for them.
    """

    wholes: dict[Step, Step] = field(default_factory=dict)
    since: dict[Step, float] = field(default_factory=dict)
    new: list[Step] = field(default_factory=list)

    def cut(self, step: Step) -> bool:
        """Cut a step, if it has shards; whether it has."""
        shards = step.shards()
        if not shards:
            return False
        self.wholes |= dict.fromkeys(shards, step)
        self.since[step] = time.monotonic()
        self.new += [*shards, step]
        return True

    def take_new(self) -> list[Step]:
        """What was cut since this was asked last."""
        found, self.new = self.new, []
        return found

    def shards_of(self, step: Step) -> list[Step]:
        """The shards of a step that was cut, in order."""
        return [shard for shard, whole in self.wholes.items() if whole is step]

    def is_in_vain(self, step: Step, ended: Mapping[str, StageResult]) -> bool:
        """Whether a step is a shard of which another one failed.

        The whole then finds the same fault by itself, and says so; or it does without that shard.
        """
        if step not in self.wholes:
            return False
        results = [ended.get(shard.name) for shard in self.shards_of(self.wholes[step])]
        return any(result is not None and result.state is State.FAILED for result in results)
