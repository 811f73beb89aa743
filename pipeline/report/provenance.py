"""From the checkpoint to an artifact: what was made from what, and whether it still fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.results import Results


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


def chain(results: Results, artifact: Mapping[str, Any]) -> Iterator[Link]:
    """The way from the checkpoint to an artifact: each one after what it was made from."""
    known = {a["name"]: a for a in parts(results)}
    seen: set[str] = set()

    def walk(name: str, digest: str) -> Iterator[Link]:
        if name in seen:
            return
        seen.add(name)
        part = known.get(name)
        for source, source_digest in (part or {}).get("made_from", {}).items():
            yield from walk(source, source_digest)
        now = (part or {}).get("digest", digest)
        problem = "" if now == digest else f"made from {digest[:12]}, now there is {now[:12]}"
        yield Link(name, digest, problem)

    if artifact.get("digest"):
        yield from walk(artifact["name"], artifact["digest"])


def parts(results: Results) -> Iterator[Mapping[str, Any]]:
    """All artifacts that results tell of, each after what it is made from."""
    single = (results.get(key) for key in ("export", "onnx", "calibration"))
    forms = results.get("forms", {}).values()
    for part in (*single, *forms, *results["artifacts"], results.get("pytorch")):
        if part and part.get("digest"):
            yield part
