"""Artifacts of a results' folder, made from each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.files import file_hash
from pipeline.core.seals import sealed
from pipeline.steps import artifact
from pipeline.steps.artifact import CHECKPOINT, MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.library import Library

CHAIN = {
    "export": (),
    "onnx": ("export",),
    "ort/fp32": ("onnx", "export"),
    "bench/ort": ("ort/fp32",),
}


def make(folder: Path, name: str, *made_from: str, content: bytes = b"x", **facts: Any) -> Artifact:
    """An artifact of a folder, made from others; from a checkpoint, if from none."""

    def build(place: Path) -> Mapping[str, Any]:
        (place / "file").write_bytes(content)
        return facts

    sources = [Artifact.read(folder / source) for source in made_from]
    digests = {source.name: source.digest for source in sources} or {CHECKPOINT: "c" * 64}
    return artifact.make(
        folder / name,
        kind="validate",
        name=name,
        key="0" * 64,
        made_from=digests,
        seals={source.name: source.seal for source in sources},
        tools={},
        build=build,
        inputs={},
    )


def fill(folder: Path, *, report: bool = True) -> Path:
    """A chain of artifacts, and a results.json that states their seals."""
    for name, made_from in CHAIN.items():
        make(folder, name, *made_from, content=name.encode(), top1=0.9)
    if report:
        state(folder)
    return folder


def state(folder: Path, **seals: str) -> None:
    """A results.json that states what lies there, and nothing else that a report would tell."""
    found = {name: each.seal for name, each in Library(folder).artifacts.items()}
    (folder / RESULTS_FILE).write_text(sealed({"format": 3, "seals": {**found, **seals}}))


def sign_again(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and give it the seal that fits."""
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    del values["seal"]
    change(values)
    path.write_text(sealed(values))


def other_content(folder: Path, content: bytes = b"another", name: str = "file") -> None:
    """Another file, with the hash and the seal that fit it."""
    (folder / name).write_bytes(content)
    record = {"sha256": file_hash(folder / name), "size": len(content)}
    sign_again(folder, lambda values: values["files"].update({name: record}))


def other_fact(folder: Path) -> None:
    """Another fact, with the seal that fits it."""
    sign_again(folder, lambda values: values["facts"].update(top1=1.0))
