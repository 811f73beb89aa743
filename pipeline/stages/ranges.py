"""The step that observes ranges and histograms of every tensor, for `calibrate` to show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.plain import read_json
from pipeline.stages.calibration_set import read_calibration
from pipeline.stages.context import RunContext
from pipeline.stages.names import GRAPH
from pipeline.stages.observing import Observed, ObservingStep
from pipeline.stages.samples import CalibrationStep
from pipeline.stages.simplify import SimplifyStep
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    from calibration.table import Table

RANGES = "ranges.json"


class RangesStep(ObservingStep):
    """Ranges of all tensors of the graph over the calibration set."""

    stage = "calibrate"

    def __init__(
        self,
        context: RunContext,
        simplify: SimplifyStep,
        calibration: CalibrationStep,
        *,
        method: str,
        stored: str,
    ) -> None:
        super().__init__(context, f"ranges/{method}-{stored}", [simplify, calibration])
        self.simplify, self.calibration = simplify, calibration
        self.method, self.stored = method, stored

    def inputs(self) -> Mapping[str, Any]:
        """How ranges are chosen."""
        return {"settings of the ranges": {"method": self.method, "stored": self.stored}}

    def observed(self) -> Observed:
        """See `ObservingStep`."""
        return Observed(self.simplify.artifact().path(GRAPH))

    def tools(self) -> dict[str, str]:
        """What runs the graph."""
        return versions("onnxruntime")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Observe the tensors and choose their ranges."""
        from calibration.ranges import ACTIVATIONS_INT8, ACTIVATIONS_UINT8, Method
        from calibration.table import make_table

        scheme = ACTIVATIONS_INT8 if self.stored == "int8" else ACTIVATIONS_UINT8
        images = read_calibration(self.calibration.artifact()).images
        self.context.progress(0, None, "observing every tensor")
        statistics = self.look(self.simplify.artifact().path(GRAPH), images)
        table = make_table(statistics, Method(self.method), scheme, images=len(images))
        (folder / RANGES).write_text(json.dumps(table.to_dict(), indent=1) + "\n")
        return {"method": self.method, "stored": self.stored, "tensors": len(table.tensors)}


def read_ranges(artifact: Artifact) -> Table:
    """The table that a `RangesStep` wrote.

    Raises:
        ArtifactError: It is damaged.
    """
    from calibration.table import Table

    path = artifact.path(RANGES)
    try:
        return Table.from_dict(read_json(path))
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArtifactError,
        DataError,
    ) as error:
        raise ArtifactError(f"{path} is damaged: calibrate again") from error
