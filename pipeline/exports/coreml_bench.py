"""Writes a Swift package that measures a Core ML or Core AI model on an iPhone, iPad or Mac.

The package holds the model as it is; what it measures names it by its digest, so that the result
cannot be taken for that of another model. See the targets' `results` for the file that it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.replacing import Whose, cannot_write, put, workspace
from pipeline.exports import golden
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import Swift
from pipeline.targets.registry import TARGETS, able

_TEMPLATES = Path(__file__).parent / "templates"
_WRITTEN_FOR = "CoreMLBench", "coreml-bench"
"""Module and program that the shared templates name."""


def write_bench_package(
    artifact: Artifact,
    folder: Path,
    *,
    samples: int = 700,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the Swift package.

    Args:
        artifact: What a target built whose `swift` says how.
        folder: Where it shall lie; must not exist, or be empty.
        samples: Timed predictions on each set of compute units; with 662 and more there is a p99.
        say: Is told if the package holds no golden kit, by which the device shows that it computes
            what was built.

    Returns:
        `folder`.

    Raises:
        ArtifactError: The artifact is damaged, or the folder cannot be written.
        InputError: No Swift package measures such an artifact, or the folder holds something.
    """
    swift = _swift_of(artifact)
    artifact.verify()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: name a new folder")
    place = folder.resolve()
    try:
        with workspace(place) as new:
            _write(artifact, swift, new, samples, say)
            put(new, place, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    return folder


def _swift_of(artifact: Artifact) -> Swift:
    """How a Swift package measures an artifact."""
    target = artifact.name.partition("/")[0]
    swift = TARGETS[target].swift if target in TARGETS else None
    if swift is None:
        raise InputError(
            f"no Swift package measures {artifact.name}: give --target {' or '.join(able('swift'))}"
        )
    return swift


def _files(swift: Swift) -> Iterator[tuple[Path, str]]:
    """The templates, a target's own in place of the shared ones, and where each goes."""
    library, tests = f"Sources/{swift.module}", f"Tests/{swift.module}Tests"
    places = {
        "Package.swift": "Package.swift",
        "README.md": "README.md",
        "Benchmark.swift": f"{library}/Benchmark.swift",
        "Measurements.swift": f"{library}/Measurements.swift",
        "GoldenKit.swift": f"{library}/GoldenKit.swift",
        "main.swift": f"Sources/{swift.program}/main.swift",
        "BenchmarkTests.swift": f"{tests}/BenchmarkTests.swift",
    }
    for name, place in places.items():
        own = _TEMPLATES / f"{swift.prefix}{name}.txt"
        yield own if own.exists() else _TEMPLATES / f"{name}.txt", place


def _write(
    artifact: Artifact, swift: Swift, folder: Path, samples: int, say: Callable[[str], object]
) -> None:
    for template, destination in _files(swift):
        path = folder / destination
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_named_for(swift, template.read_text()))
    resources = folder / "Sources" / swift.module / "Resources"
    for name in artifact.files:
        if name.startswith(f"{swift.model}/"):
            artifact.copy(name, resources / name)
    network = artifact.network()
    facts = {
        "name": f"{network.name} {artifact.name}",
        "digest": swift.digest(resources / swift.model),
        "samples": samples,
    }
    if not swift.takes_image:
        facts["shape"] = [1, *network.input_shape]
    (resources / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
    kit = golden.kit_of(artifact)
    if isinstance(kit, str):
        say(f"without a golden kit: {kit}")
        return
    (resources / golden.FOLDER).mkdir()
    golden.write_data(kit, resources / golden.FOLDER)


def _named_for(swift: Swift, text: str) -> str:
    """A template's text, with the names of this library and program."""
    module, program = _WRITTEN_FOR
    return text.replace(module, swift.module).replace(program, swift.program)
