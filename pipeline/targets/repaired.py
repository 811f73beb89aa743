"""The forms of the graph in 16 bits with those parts raised that 16 bits would break.

See `pipeline.graphs.repair` for how parts are chosen. Where nothing has to be raised, the graph is
byte for byte that of the plain form.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from calibration.budget import Budget
from calibration.kept import Kept
from pipeline.core.errors import GateFailedError
from pipeline.steps.facts.graphs import RaisedPart, RepairFacts
from pipeline.steps.keys import versions
from pipeline.targets.forms import Form, FormJob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

    from calibration.sensitivity import Alone, Outcome, Search
    from pipeline.graphs.float16 import HalfType
    from pipeline.graphs.repair import Repaired

DECISION_VALUES = 64 * 3 * 224 * 224
MOST_IMAGES = 512
"""Graphs are judged on so many input values: those of 64 images of 224 pixels, and at most on so
many images."""

FLOAT16_ERROR = Budget().max_error
"""Largest error of the logits in float16 where none is stated: the usual one is 0.001. In bfloat16
and 8 bits, sound networks may have as much, and accuracy alone decides."""


class _Repaired(Form):
    """What the forms in 16 bits share.

    Attributes:
        narrow: Name of the type of all that is not raised.
        bfloat16: Parts may be raised to bfloat16, which costs less than float32.
        max_error: Largest error of the logits where none is stated.
    """

    calibrated = True
    narrow: ClassVar[str] = "float16"
    bfloat16: ClassVar[bool] = True
    max_error: ClassVar[float | None] = FLOAT16_ERROR

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return versions("onnx", "torch")

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the repaired graph; see `Form`.

        Options: the limits of `Budget`, by name.

        Raises:
            GateFailedError: No choice of parts holds the budget.
            InputError: The graph is none that can be repaired, see `repair`.
        """
        from pipeline.graphs import float16

        budget = Budget.of(job.options, self.max_error)
        half = float16.FLOAT16 if self.narrow == "float16" else float16.BFLOAT16
        graph = float16.read_graph(job.source)
        found = repaired(graph, job, half, budget, bfloat16=self.bfloat16)
        float16.write_graph(found.model, destination)
        return {**found.facts.to_dict(), "repair": repair_facts(found).to_dict()}


class RepairedFloat16(_Repaired):
    """float16, and bfloat16 or float32 where float16 breaks the network."""

    name = "float16-repaired"


class RepairedFloat16Only(_Repaired):
    """float16, and float32 where float16 breaks the network: for GPUs without bfloat16."""

    name = "float16-repaired-float32"
    bfloat16 = False


class RepairedBFloat16(_Repaired):
    """bfloat16, and float32 where bfloat16 loses too much."""

    name = "bfloat16-repaired"
    narrow = "bfloat16"
    max_error = None


REPAIRED: tuple[Form, ...] = (RepairedFloat16(), RepairedFloat16Only(), RepairedBFloat16())
"""Repaired forms that any target may build from."""


def most_images(shape: Sequence[int]) -> int:
    """On how many images of a shape (channels, height, width) a repair is judged at most."""
    return min(MOST_IMAGES, max(1, DECISION_VALUES // max(1, math.prod(shape))))


def repaired(
    graph: onnx.ModelProto, job: FormJob, half: HalfType, budget: Budget, *, bfloat16: bool = True
) -> Repaired:
    """Repair the float32 graph of a job, on its calibration images.

    Args:
        graph: The float32 graph.
        job: What is to be made.
        half: The type of all that is not raised.
        budget: What has to hold.
        bfloat16: Parts may be raised to bfloat16.

    Raises:
        GateFailedError: No choice of parts holds the budget.
        InputError: The graph is none that can be repaired, see `repair`.
    """
    from pipeline.graphs.float16 import BFLOAT16
    from pipeline.graphs.repair import Request, repair

    images = job.calibration()
    most = most_images(images.images.shape[1:])
    wide = (BFLOAT16, None) if bfloat16 else (None,)
    request = Request(base=half, raise_to=wide, budget=budget, images=most)
    try:
        return repair(graph, images, request, kept=Kept(job.evaluations), log=job.log)
    except GateFailedError as error:
        raise GateFailedError(
            f"cannot repair {job.network.name} in {half.name}: {error}"
        ) from error


def repair_facts(found: Repaired) -> RepairFacts:
    """What a repair did, for the artifact and for people."""
    headroom = found.after.headroom
    return RepairFacts(
        base=found.conversion.base.name,
        broke=found.broke,
        raised=tuple(RaisedPart(r.part, r.type, r.share, r.why) for r in found.raised),
        parts=found.parts,
        share=found.share,
        error=found.after.outcome.logit_error,
        headroom=headroom if math.isfinite(headroom) else None,
        beyond=found.beyond,
        images=found.images,
        evaluations=found.evaluations,
    )


def repaired_by_search(
    found: Search,
    budget: Budget,
    network: str,
    *,
    types: tuple[str, str],
    shares: Mapping[str, float],
    images: int,
) -> RepairFacts:
    """What a search for groups that stay in a wider type mended, for the artifact and for people.

    Args:
        found: The search, over the groups of `shares`.
        budget: What has to hold beside the limits of the search.
        network: Its name.
        types: Of what is not raised, and of what is.
        shares: Share of the network's products in each group, in the order of the network.
        images: How many images decided.

    Raises:
        GateFailedError: No choice of groups holds the limits; the message says how near it came.
    """
    narrow, wide = types
    alone = {each.group: each for each in found.ranking}
    raised = tuple(
        RaisedPart(group, wide, share, _harm(alone.get(group), found.baseline, narrow))
        for group, share in shares.items()
        if group in found.excluded
    )
    share = sum(part.share for part in raised)
    before = found.evaluations[0].outcome
    if not found.holds or share > budget.max_share:
        raise GateFailedError(
            f"cannot repair {network} in {narrow}: no choice of blocks holds the budget (a drop of "
            f"{found.limits.max_top1_drop:.2%} and {100 * budget.max_share:g}% of the products "
            f"raised): with {len(raised)} of {len(shares)} raised to {wide}, {share:.1%} of the "
            f"products, {_did(found.outcome, found.baseline)}; with none, "
            f"{_did(before, found.baseline)}; build a precision in {wide}, or allow more"
        )
    return RepairFacts(
        base=narrow,
        broke=_did(before, found.baseline) if raised else "",
        raised=raised,
        parts=len(shares),
        share=share,
        error=found.outcome.logit_error,
        headroom=None,
        beyond="",
        images=images,
        evaluations=len(found.evaluations),
    )


def _harm(alone: Alone | None, baseline: Outcome, narrow: str) -> str:
    """Why a group was raised."""
    return "" if alone is None else f"alone in {narrow}: {_did(alone.outcome, baseline)}"


def _did(outcome: Outcome, baseline: Outcome) -> str:
    """How a network does, for people."""
    if not math.isfinite(outcome.logit_error):
        return "no finite answer"
    drop = 100 * (baseline.top1 - outcome.top1)
    return f"error {outcome.logit_error:.2g}, {drop:.2f} points of top-1 lost"
