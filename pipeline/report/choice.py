"""Which artifact of a target to use: decided by what was measured, not by hope.

The first precision of the configuration is the default. Another takes its place only if it passed
the gates, nothing was found against it when its graph was made, and it was faster beyond doubt in
the same interleaved run. What was found of its time then tells why it is not taken where that run
is missing, and nothing else: the artifacts of a run are opened as they are used. Where nothing was
measured, the first stays, and the choice says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.core.figures import ratio
from pipeline.report.model import NOT_SELECTED, BuiltArtifact, Choice, GateFailure
from pipeline.steps.facts.bench import Measured


def choose(
    artifacts: Sequence[BuiltArtifact], measured: Measured | None, failures: Sequence[GateFailure]
) -> Choice:
    """Choose among the artifacts of one target.

    Args:
        artifacts: Of this target, in the order of the configuration.
        measured: The target's measurement; None if there was none.
        failures: Gates that do not hold, of whatever artifacts.
    """
    why: dict[str, str] = {}
    able: list[BuiltArtifact] = []
    for artifact in artifacts:
        obstacle = _obstacle(artifact, failures)
        if obstacle:
            why[artifact.precision] = obstacle
        else:
            able.append(artifact)
    if not able:
        return Choice(None, why)
    samples = _samples(able, measured)
    best = able[0].precision
    for artifact in able[1:]:
        other, doubt = artifact.precision, artifact.why_not or _changed_by_approximation(artifact)
        if other not in samples or best not in samples:
            why[other] = (
                doubt
                or artifact.why_slow
                or f"not shown to be faster than {best}: {_unknown(able)}"
            )
            continue
        compared = ratio(samples[other], samples[best])
        low, high = compared.interval
        times = f"takes {compared.value:.2f} (95 %: {low:.2f} to {high:.2f}) of the time of"
        if compared.faster and not doubt:
            why[best] = f"{other} {times} {best}"
            best = other
        else:
            made = f", and when its graph was made: {doubt}" if doubt else ""
            why[other] = f"{times} {best}{made}"
    if changed := _changed_by_approximation(able[0]):
        why[able[0].precision] = "; ".join(filter(None, (why.get(able[0].precision), changed)))
    return Choice(best, why)


def _obstacle(artifact: BuiltArtifact, failures: Sequence[GateFailure]) -> str:
    """Why an artifact cannot be used at all; "" if it can."""
    if artifact.failure:
        return artifact.failure
    if artifact.built is None or not artifact.built.files:
        return "was not built" if artifact.selected else NOT_SELECTED
    for failure in failures:
        if (failure.target, failure.precision) == (artifact.target, artifact.precision):
            return f"a gate does not hold: {failure.words}"
    return ""


def _changed_by_approximation(artifact: BuiltArtifact) -> str:
    """That what its target approximates changes answers; "" if not: such a form has to keep all.

    It takes nobody's place then. The first of the configuration was asked for, and says so.
    """
    assert artifact.built is not None
    what, agreement = artifact.built.facts.more.get("approximates"), artifact.accuracy.agreement
    if not what or agreement is None or agreement.value is None or agreement.value == 1:
        return ""
    images = agreement.samples or 0
    changed = round((1 - agreement.value) * images)
    return f"{what} gives {changed} of {images} validation images another class than PyTorch"


def _unknown(artifacts: Sequence[BuiltArtifact]) -> str:
    """Why latencies do not decide."""
    doubts = [artifact.latency_doubt for artifact in artifacts if artifact.latency_doubt]
    if doubts:
        return f"latency is not to be trusted: {doubts[0]}"
    return "latency was not measured"


def _samples(
    artifacts: Sequence[BuiltArtifact], measured: Measured | None
) -> Mapping[str, Sequence[float]]:
    """Timed calls at the first batch size, by precision; only of what lies there now."""
    if measured is None:
        return {}
    known = {
        artifact.precision for artifact in artifacts if artifact.trusted_latency.value is not None
    }
    return {name: calls for name, calls in measured.samples_ms.items() if name in known and calls}
