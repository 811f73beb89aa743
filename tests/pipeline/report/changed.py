"""Runs with something changed in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.report.model import BuiltArtifact, Run
from pipeline.steps.facts.bench import Measured


def artifact_of(run: Run, name: str) -> BuiltArtifact:
    """One artifact, such as "ort/fp32"."""
    return next(artifact for artifact in run.artifacts if artifact.name == name)


def with_artifact(run: Run, name: str, **changes: Any) -> Run:
    """A run in which attributes of one artifact are others."""
    changed = [
        replace(artifact, **changes) if artifact.name == name else artifact
        for artifact in run.artifacts
    ]
    return replace(run, artifacts=tuple(changed))


def with_build(run: Run, name: str, **changes: Any) -> Run:
    """A run in which a target told something else of one build."""
    built = artifact_of(run, name).built
    assert built is not None
    return with_artifact(run, name, built=replace(built, facts=replace(built.facts, **changes)))


def with_measured(run: Run, target: str, **changes: Any) -> Run:
    """A run in which something else was measured of a target."""
    part = run.bench[target]
    assert part is not None
    measured = replace(measured_of(run, target), **changes)
    changed = replace(part, facts=replace(part.facts, measured=measured))
    return replace(run, bench={**run.bench, target: changed})


def hasty(run: Run) -> Run:
    """A run in which ort was timed by six calls a runner."""
    batches = {}
    for batch, latency in measured_of(run, "ort").batches.items():
        phases = {
            name: {phase: replace(calls, samples=6) for phase, calls in each.items()}
            for name, each in latency.phases.items()
        }
        batches[batch] = replace(latency, phases=phases)
    run = with_measured(run, "ort", batches=batches)
    for precision in ("fp32", "int8"):
        doubt = measured_of(run, "ort").doubt(precision)
        run = with_artifact(run, f"ort/{precision}", latency_doubt=doubt)
    return run


def measured_of(run: Run, target: str) -> Measured:
    """What was measured of a target."""
    measured = run.measured(target)
    assert measured is not None
    return measured
