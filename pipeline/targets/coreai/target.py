"""The Core AI target: what the pipeline sees of it.

An asset takes one image at a time, whatever batch the other targets are built for.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UnavailableError
from pipeline.core.preprocess import Pictures
from pipeline.core.runner import Runner
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import versions
from pipeline.targets.base import (
    MODULE,
    BuildJob,
    DeviceJob,
    DeviceMeasurement,
    Requirement,
    Swift,
    Target,
)
from pipeline.targets.coreai.build import RECIPES, build
from pipeline.targets.coreai.options import CoreAIOptions
from pipeline.targets.coreai.package import MODEL, PACKAGES, check, digest, producers

if TYPE_CHECKING:
    from pipeline.targets.coreai.runner import Bound

INSTALL = "pip install 'care-deploy[coreai]'"
_MODULES = {"coreai": "coreai-core", "coreai_torch": "coreai-torch", "coreai_opt": "coreai-opt"}
"""What is imported, and the package that it is of."""

_SYSTEM = 27
"""Version of macOS and iOS with which Core AI came."""

_MAC = (
    "Core AI's device runtime needs macOS 27 or iOS 27: run the same command on a Mac, or measure "
    "with the package that export coreml-bench --target coreai writes and give the result to "
    "python -m pipeline bench --target coreai --import FILE. Here Apple's runtime is a judge, too "
    "slow for all images: it judges runtime_images of them"
)
_CONNECTED = (
    "Apple's packages for Core AI drive no connected device: python -m pipeline export "
    "coreml-bench NAME --target coreai writes a Swift package; run it on the {kind} and give its "
    "result to python -m pipeline bench --target coreai --import FILE"
)


class CoreAITarget(Target):
    """Builds Core AI assets anywhere: Apple's runtime judges them on Linux, runs them on a Mac."""

    name = "coreai"
    title = "Core AI"
    precisions = dict.fromkeys(RECIPES, MODULE)
    options = CoreAIOptions
    devices = ("mac", "iphone", "ipad")
    swift = Swift("CoreAIBench", "coreai-bench", MODEL, digest, prefix="CoreAI", takes_image=False)

    def requirements(self) -> list[Requirement]:
        """See `Target.requirements`."""
        needed = [
            Requirement(name, _there(version), "build", INSTALL)
            for name, version in versions(*PACKAGES).items()
        ]
        system = platform.mac_ver()[0] or None
        return [*needed, Requirement(f"macOS {_SYSTEM}", system, "measure", _MAC)]

    def versions(self) -> dict[str, str]:
        """See `Target.versions`."""
        return producers()

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """See `Target.build`."""
        _require()
        return build(job, folder / MODEL, RECIPES[job.precision])

    def inspect(self, artifact: Artifact) -> str:
        """Read the program with its weights, and let Apple's runtime load it."""
        from pipeline.targets.coreai.runtime import Runtime

        _require()
        program = check(artifact.folder / MODEL, artifact.network())
        Runtime(artifact.folder / MODEL).close()
        return (
            f"loaded by Apple's runtime: {program.counts().total()} operations, "
            f"{len(artifact.network().labels)} labels"
        )

    def fitness(self, artifact: Artifact, pictures: Pictures) -> list[dict[str, Any]]:
        """Range of float16 on real images, and what was reported of devices; see `Target`."""
        from pipeline.targets.coreai.fitness import fitness

        _require()
        program = check(artifact.folder / MODEL, artifact.network())
        return [finding.to_dict() for finding in fitness(program, pictures.images)]

    def usage(self, place: str, input_shape: Sequence[int], kit: str) -> str:
        """See `Target.usage`."""
        return f"`{place}/{MODEL}` gives logits: add it to an app in Xcode, for system {_SYSTEM}."

    def missing(self, artifact: Artifact) -> str | None:
        """See `Target.missing`."""
        if lacking := _lacking():
            return lacking
        if platform.system() != "Darwin":
            return _MAC
        return None if _system() >= _SYSTEM else _MAC

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        """See `Target.open`."""
        if missing := self.missing(artifact):
            raise UnavailableError(missing)
        from pipeline.targets.coreai.runner import AppleRunner

        artifact.verify()
        unit = artifact.facts["compute_unit"]
        return AppleRunner(artifact.folder / MODEL, artifact.network(), unit)

    def emulate(self, artifact: Artifact, graph: Path | None) -> Runner | None:
        """The executor of the saved program, with Apple's runtime as its judge."""
        if _lacking():
            return None
        from pipeline.targets.coreai.runner import JudgedRunner

        artifact.verify()
        package, network = artifact.folder / MODEL, artifact.network()
        return JudgedRunner(package, network, artifact.facts["runtime_images"], _bound(artifact))

    def measure_on(
        self, device: str, artifacts: Mapping[str, Artifact], job: DeviceJob
    ) -> dict[str, DeviceMeasurement]:
        """Measure on this Mac; results of an iPhone or iPad are imported. See `Target`."""
        if device != "mac":
            raise UnavailableError(_CONNECTED.format(kind=device))
        for artifact in artifacts.values():
            if missing := self.missing(artifact):
                raise UnavailableError(missing)
        from pipeline.targets.coreai.device import measure_mac

        return measure_mac(artifacts, job)

    def read_measurements(
        self, file: Path, artifacts: Mapping[str, Artifact], device: str | None
    ) -> dict[str, DeviceMeasurement]:
        """Read the result file of the measuring program; see `Target`."""
        from pipeline.targets.coreai.results import read_measurements

        return read_measurements(file, artifacts, device)


def _bound(artifact: Artifact) -> Bound:
    return RECIPES[artifact.facts["precision"]].limits.runtime


def _there(version: str) -> str | None:
    return None if version == "missing" else version


def _lacking() -> str | None:
    """Which package is missing, and how to get it."""
    for name, package in _MODULES.items():
        if find_spec(name) is None:
            return f"{package} is not installed: {INSTALL}"
    return None


def _require() -> None:
    if lacking := _lacking():
        raise UnavailableError(lacking)


def _system() -> int:
    return int(platform.mac_ver()[0].partition(".")[0] or 0)
