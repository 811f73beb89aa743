"""Which artifact of a target to use: decided by what was measured, not by hope.

The first precision of the configuration is the default. Another takes its place only if it passed
the gates, was found worth it when its graph was made, and was faster beyond doubt in the same
interleaved run. Where nothing was measured, the first stays, and the choice says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.figures import ratio


@dataclass(frozen=True)
class Choice:
    """Which precision of one target to use.

    Attributes:
        precision: The one; None if none was built and passed the gates.
        why: By precision, what speaks for or against each of the others.
    """

    precision: str | None
    why: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"precision": self.precision, "why": dict(self.why)}


def choose(
    artifacts: Sequence[Mapping[str, Any]], bench: Mapping[str, Any], gates: Sequence[str]
) -> Choice:
    """Choose among the artifacts of one target.

    Args:
        artifacts: Of this target, in the order of the configuration, as in results.json; `why_not`
            is what the maker of the graph found against it.
        bench: Facts of the target's measurement; empty if there was none.
        gates: Gates that do not hold, each beginning with "target/precision: ".
    """
    why: dict[str, str] = {}
    able: list[str] = []
    doubts: dict[str, str] = {}
    for artifact in artifacts:
        precision = artifact["precision"]
        doubts[precision] = artifact.get("why_not", "")
        prefix = f"{artifact['target']}/{precision}: "
        broken = next((gate.removeprefix(prefix) for gate in gates if gate.startswith(prefix)), "")
        if artifact["failure"] or not artifact.get("files"):
            why[precision] = artifact["failure"] or "was not built"
        elif broken:
            why[precision] = f"a gate does not hold: {broken}"
        else:
            able.append(precision)
    if not able:
        return Choice(None, why)
    samples = _samples(bench)
    best = able[0]
    for other in able[1:]:
        if other not in samples or best not in samples:
            unknown = f"comes after {best} in the configuration, and latency was not measured"
            why[other] = doubts[other] or unknown
            continue
        compared = ratio(samples[other], samples[best])
        low, high = compared.interval
        times = f"takes {compared.value:.2f} (95 %: {low:.2f} to {high:.2f}) of the time of"
        if compared.faster and not doubts[other]:
            why[best] = f"{other} {times} {best}"
            best = other
        else:
            doubt = f", and when its graph was made: {doubts[other]}" if doubts[other] else ""
            why[other] = f"{times} {best}{doubt}"
    return Choice(best, why)


def _samples(bench: Mapping[str, Any]) -> Mapping[str, Sequence[float]]:
    """Timed calls of every runner at the first batch size; empty if nothing was measured."""
    for batch in bench.get("batches", {}).values():
        found: Mapping[str, Sequence[float]] = batch["samples_ms"]
        return found
    return {}
