"""Calibration in shards: what was seen of some of the images, as artifacts of their own.

    .evaluations/precision-int8-trt/00001/
      observed.json, counts.npy   see `calibration.parts`
      artifact.json

What several shards saw is merged to the bit into what one pass over all images sees, however many
there are and whoever looks: see `calibration.observe`. A calibration that is killed goes on with
the shards that are there; a run with several processes or workers hands them out before the whole.
They go when the whole is there, whose key knows none.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError
from pipeline.stages.calibration_set import read_calibration
from pipeline.stages.context import RunContext
from pipeline.stages.images import read_labels
from pipeline.stages.shards import Shard, Sharded
from pipeline.steps.step import Step

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration.observe import Statistics
    from pipeline.config import Config
    from pipeline.core.network import Images
    from pipeline.stages.samples import CalibrationStep
    from pipeline.stages.simplify import SimplifyStep

OF = "of"
"""The fact of a shard that says which tensors of which graph were observed."""

BATCH = 16
"""Images that are observed at a time, at most, see `calibration.observe.observe`: a shard is whole
batches."""


class ObservingStep(Sharded):
    """A step that observes tensors of a graph over the calibration images.

    Attributes:
        simplify: Makes the graph.
        calibration: Decodes the images.
    """

    simplify: SimplifyStep
    calibration: CalibrationStep

    def __init__(self, context: RunContext, name: str, requires: Sequence[Step]) -> None:
        super().__init__(context, name, requires)
        self._shared_out = False

    @abstractmethod
    def observed(self) -> Observed:
        """What the step begins by observing."""

    @property
    def observes(self) -> bool:
        """Whether it begins by observing a graph."""
        return True

    def shards(self) -> list[ObservationShard]:
        """See `Step.shards`: those of what is longer than one; the images have to be there."""
        if self._in_one or not self.observes:
            return []
        total = len(read_labels(self.calibration.artifact()))
        count = -(-total // size_of(self.context.config))
        return [ObservationShard(self, number) for number in range(count)] if count > 1 else []

    def look(
        self, model: Path | ModelProto, images: Images, tensors: Sequence[str] | None = None
    ) -> dict[str, Statistics]:
        """What the tensors of a graph hold over the images, see `calibration.observe.observe`.

        The graph that is asked for first is the one that shards have seen, or see now.

        Args:
            model: The graph.
            images: The calibration images.
            tensors: Which ones; None for all.
        """
        from calibration.observe import merge, observe

        shards = [] if self._shared_out else self.shards()
        self._shared_out = True
        if not shards:
            return observe(model, images, tensors)
        wanted = Observed(model, tensors)
        return merge([shard.found(wanted, images) for shard in shards])


class Observed:
    """Some tensors of a graph.

    Args:
        model: The graph.
        tensors: Which ones; None for all that `calibration.observe.observe` takes.

    Attributes:
        digest: Hash of both.
    """

    def __init__(self, model: Path | ModelProto, tensors: Sequence[str] | None = None) -> None:
        self.model, self.tensors = model, tensors
        if isinstance(model, Path):
            content = model.read_bytes()
        else:
            content = model.SerializeToString(deterministic=True)
        named = json.dumps(None if tensors is None else list(tensors))
        self.digest = hashlib.sha256(content + named.encode()).hexdigest()


class ObservationShard(Shard["dict[str, Statistics]"]):
    """What was seen of some consecutive calibration images.

    Args:
        whole: The step that observes.
        number: Which shard, from 0 on.
    """

    stage = "calibrate"
    whole: ObservingStep

    def __init__(self, whole: ObservingStep, number: int) -> None:
        super().__init__(whole, number, [whole.simplify, whole.calibration])
        self._given: tuple[Observed, Images] | None = None

    def inputs(self) -> Mapping[str, Any]:
        """Which images."""
        return {"shard": {"number": self.number, "images": size_of(self.context.config)}}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Look at the images of the shard."""
        from calibration.observe import observe
        from calibration.parts import write_part

        if self._given is None:
            wanted, images = self.whole.observed(), self._images()
        else:
            wanted, images = self._given
        size, total = size_of(self.context.config), len(images)
        first = self.number * size
        self.context.progress(first, total, "observing the calibration images")
        last = None if first + size >= total else first + size
        self._seen = observe(wanted.model, images, wanted.tensors, between=(first, last))
        write_part(folder, self._seen)
        return {OF: wanted.digest}

    def _images(self) -> Images:
        return read_calibration(self.whole.calibration.artifact()).images

    def found(self, wanted: Observed, images: Images) -> dict[str, Statistics]:
        """What was seen: kept before, or looked at now.

        Args:
            wanted: The graph.
            images: All calibration images.
        """
        if (kept := self._kept(wanted)) is not None:
            return kept
        self._given = wanted, images
        return self._run()

    def _kept(self, wanted: Observed) -> dict[str, Statistics] | None:
        """What lies there, is up to date, and was seen of this graph; None if nothing is."""
        from calibration.parts import read_part

        try:
            if self.stale() is not None or self.artifact().facts.get(OF) != wanted.digest:
                return None
            return read_part(self.folder)
        except ArtifactError:
            return None  # it is looked at again


def size_of(config: Config) -> int:
    """Images of a shard: at least so many as configured, and whole batches."""
    return -(-config.calibration.shard // BATCH) * BATCH
