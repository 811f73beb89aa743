"""From the checkpoint to an artifact: what was made from what, and whether it still fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.report.model import BuiltArtifact, Part, Run


@dataclass(frozen=True)
class Link:
    """One artifact on the way from the checkpoint.

    Attributes:
        name: Its name.
        digest: Its SHA-256; "" if it is not known.
        problem: What does not fit; "" if all does.
    """

    name: str
    digest: str
    problem: str = ""


def chain(run: Run, artifact: BuiltArtifact) -> Iterator[Link]:
    """The way from the checkpoint to an artifact: each one after what it was made from."""
    known = {part.name: part for part in parts(run)}
    seen: set[str] = set()

    def walk(name: str, digest: str) -> Iterator[Link]:
        if name in seen:
            return
        seen.add(name)
        part = known.get(name)
        if part is None:  # the checkpoint, or what was deleted since
            yield Link(name, digest)
            return
        for source, source_digest in part.made_from.items():
            yield from walk(source, source_digest)
        fits = part.digest == digest
        problem = f"made from {digest[:12]}, now there is {part.digest[:12]}"
        yield Link(name, digest, "" if fits else problem)

    if artifact.built:
        yield from walk(artifact.built.name, artifact.built.digest)


def parts(run: Run) -> Iterator[Part[Any]]:
    """All artifacts that a run tells of, each after what it is made from."""
    built = (artifact.built for artifact in run.artifacts)
    first = (run.export, run.simplified, run.calibration)
    for part in (*first, *run.forms.values(), *built, run.reference):
        if part:
            yield part
