"""The 8-bit form for ONNX Runtime that holds its limits, or is not made.

The search of the plain form leaves blocks in float32 until accuracy holds. Here the limits are a
promise: where no choice of blocks holds them, or float32 gets too large a share of the products,
there is no graph. float32 itself needs no repair: nothing is narrower than the network was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.budget import Budget
from pipeline.targets.forms import FormJob
from pipeline.targets.ort.quantize import Int8Ort
from pipeline.targets.repaired import repaired_by_search

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calibration.sensitivity import Search


class RepairedInt8Ort(Int8Ort):
    """int8 as in `Int8Ort`, with those blocks in float32 that 8 bits break."""

    name = "int8-ort-repaired"

    def told(
        self, job: FormJob, found: Search, shares: Mapping[str, float], images: int
    ) -> dict[str, Any]:
        """See `Int8Ort.told`.

        Raises:
            GateFailedError: No choice of blocks holds the limits.
        """
        budget = Budget.of(job.options, None)
        facts = repaired_by_search(
            found, budget, job.network.name, types=("int8", "float32"), shares=shares, images=images
        )
        return {"repair": facts.to_dict()}
