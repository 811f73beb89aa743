"""Writes a Swift package that measures a Core ML or Core AI model on an iPhone, iPad or Mac.

The package holds the model as it is; what it measures names it by its digest, so that the result
cannot be taken for that of another model. See the targets' `results` for the file that it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.replacing import Whose, cannot_write, put, workspace
from pipeline.exports import golden
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreai import package as coreai
from pipeline.targets.coreml import package as coreml


@dataclass(frozen=True)
class Kind:
    """What the Swift packages of two formats differ in.

    Attributes:
        module: Name of the Swift library.
        program: Name of the program, and of the file that it writes.
        model: The model's folder within an artifact.
        digest: Names a model's content.
        templates: Templates of its own, by what they stand for; the others are shared.
    """

    module: str
    program: str
    model: str
    digest: Callable[[Path], str]
    templates: Mapping[str, str]

    def files(self) -> dict[str, str]:
        """Where each template goes."""
        library, tests = f"Sources/{self.module}", f"Tests/{self.module}Tests"
        return {
            "Package.swift": "Package.swift",
            "README.md": "README.md",
            "Benchmark.swift": f"{library}/Benchmark.swift",
            "Measurements.swift": f"{library}/Measurements.swift",
            "GoldenKit.swift": f"{library}/GoldenKit.swift",
            "main.swift": f"Sources/{self.program}/main.swift",
            "BenchmarkTests.swift": f"{tests}/BenchmarkTests.swift",
        }


_COREML = Kind("CoreMLBench", "coreml-bench", coreml.MODEL, coreml.digest, {})
_OWN = ("Package.swift", "README.md", "Benchmark.swift", "Measurements.swift", "GoldenKit.swift")
KINDS = {
    "coreml": _COREML,
    "coreai": Kind(
        "CoreAIBench",
        "coreai-bench",
        coreai.MODEL,
        coreai.digest,
        {name: f"CoreAI{name}" for name in _OWN},
    ),
}
"""By target."""


def write_bench_package(
    artifact: Artifact,
    folder: Path,
    *,
    samples: int = 700,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the Swift package.

    Args:
        artifact: What `CoreMLTarget` or `CoreAITarget` built.
        folder: Where it shall lie; must not exist, or be empty.
        samples: Timed predictions on each set of compute units; with 662 and more there is a p99.
        say: Is told if the package holds no golden kit, by which the device shows that it computes
            what was built.

    Returns:
        `folder`.

    Raises:
        ArtifactError: The artifact is damaged, or the folder cannot be written.
        InputError: The folder holds something.
    """
    artifact.verify()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: name a new folder")
    place = folder.resolve()
    try:
        with workspace(place) as new:
            _write(artifact, new, samples, say)
            put(new, place, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    return folder


def _write(artifact: Artifact, folder: Path, samples: int, say: Callable[[str], object]) -> None:
    kind = next(kind for kind in KINDS.values() if (artifact.folder / kind.model).is_dir())
    templates = Path(__file__).parent / "templates"
    for name, destination in kind.files().items():
        path = folder / destination
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (templates / f"{kind.templates.get(name, name)}.txt").read_text()
        path.write_text(_named_for(kind, text))
    resources = folder / "Sources" / kind.module / "Resources"
    for name in artifact.files:
        if name.startswith(f"{kind.model}/"):
            artifact.copy(name, resources / name)
    network = artifact.network()
    facts = {
        "name": f"{network.name} {artifact.name}",
        "digest": kind.digest(resources / kind.model),
        "samples": samples,
    }
    if kind is not _COREML:  # which takes an image, whose size the model tells
        facts["shape"] = [1, *network.input_shape]
    (resources / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
    kit = golden.kit_of(artifact)
    if isinstance(kit, str):
        say(f"without a golden kit: {kit}")
        return
    (resources / golden.FOLDER).mkdir()
    golden.write_data(kit, resources / golden.FOLDER)


def _named_for(kind: Kind, text: str) -> str:
    """Templates that both share are written for Core ML."""
    return text.replace(_COREML.module, kind.module).replace(_COREML.program, kind.program)
