"""The Core ML target: what the pipeline sees of it.

A package takes one image at a time, whatever batch the other targets are built for: Core ML batches
predictions itself.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.core import published
from pipeline.core.errors import (
    ArtifactError,
    ConfigError,
    UnavailableError,
    UnsupportedOperatorError,
)
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
    TargetOptions,
)
from pipeline.targets.coreml.build import RECIPES, Limits, Recipe
from pipeline.targets.coreml.options import DEPLOYMENT_TARGETS, CoreMLOptions
from pipeline.targets.coreml.package import MODEL, digest
from pipeline.targets.coreml.quiet import logged

if TYPE_CHECKING:
    from torch import nn

    from pipeline.emulate.mil.program import Program
    from pipeline.targets.coreml.network import Deployed

SPECIFICATION_VERSIONS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
REPAIRABLE = ("fp32", "fp16", "auto")
"""Precisions that `repair` goes with: float32 needs none, and auto searches for itself."""

_MAC = (
    "Core ML predictions need macOS 13 or newer: run the same command on a Mac, or import what was "
    "measured on a device: python -m pipeline bench --target coreml --import FILE, which keeps it "
    "as bench/coreml of the results and shows it in the report"
)


class CoreMLTarget(Target):
    """Builds Core ML packages anywhere, runs them on a Mac and emulates them elsewhere."""

    name = "coreml"
    title = "Core ML"
    precisions = dict.fromkeys(RECIPES, MODULE)
    options = CoreMLOptions
    proposed = ("fp16", "int8")
    emulates_at: ClassVar[Mapping[str, float]] = {"fp16": 0.16}
    """CARE-S0 (0.7 GMACs) took 0.11 seconds an image."""
    published_on = published.IPHONE
    resource = "mac"
    devices = ("mac", "iphone", "ipad")
    swift = Swift("CoreMLBench", "coreml-bench", MODEL, digest, prefix="", takes_image=True)
    calibrated = frozenset(name for name, recipe in RECIPES.items() if recipe.calibrated)

    def requirements(self) -> list[Requirement]:
        """What building and running need."""
        found = metadata.version("coremltools") if find_spec("coremltools") else None
        mac = platform.mac_ver()[0] or None
        return [
            Requirement("coremltools", found, "build", "pip install coremltools"),
            Requirement("macOS", mac, "run", _MAC),
        ]

    def versions(self) -> dict[str, str]:
        """Of what converts."""
        return versions("coremltools", "torch")

    def check(self, precision: str, options: TargetOptions) -> None:
        """Refuse what a deployment target does not have."""
        assert isinstance(options, CoreMLOptions)
        recipe, order = RECIPES[precision], DEPLOYMENT_TARGETS.index
        if order(options.deployment_target) < order(recipe.deployment_target):
            raise ConfigError(
                f"coreml: precision {precision} needs {recipe.deployment_target}: set "
                f"deployment_target: {recipe.deployment_target}, not {options.deployment_target}"
            )
        if precision == "mixed" and not options.float32_operations:
            raise ConfigError(
                "coreml: precision mixed needs float32_operations; without them it is fp16"
            )
        if options.repair and precision not in REPAIRABLE:
            raise ConfigError(
                "coreml: repair chooses modules that compute in float32 in place of float16, for "
                f"fp16 and not for {precision}, whose weights lose more: auto stores each in as "
                "few bits as accuracy allows; or give this precision a configuration of its own"
            )

    def calibrates(self, precision: str, options: TargetOptions | None) -> bool:
        """See `Target.calibrates`."""
        repairs = isinstance(options, CoreMLOptions) and options.repair and precision == "fp16"
        return repairs or super().calibrates(precision, options)

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """Convert, compress, verify."""
        if find_spec("coremltools") is None:
            raise UnavailableError("coremltools is not installed: pip install coremltools")
        self.check(job.precision, job.options)
        with logged(job.log):
            return _build(job, folder / MODEL, RECIPES[job.precision])

    def inspect(self, artifact: Artifact) -> str:
        """Read the whole program with its weights; on a Mac, load it."""
        program = _program(artifact)
        count = sum(op.type != "const" for op in program.operations)
        read = f"{count} operations, {len(program.labels)} labels"
        if self.missing(artifact) is None:
            with self.open(artifact):
                return f"loaded by Core ML: {read}"
        return f"specification and weights read: {read}"

    def diff(
        self,
        artifact: Artifact,
        module: nn.Module,
        pictures: Pictures,
        graph: Path | None = None,
        reference: Path | None = None,
    ) -> list[dict[str, Any]]:
        """Compare the saved program with the module; see `Target.diff`."""
        from pipeline.emulate.layers import rows
        from pipeline.targets.coreml.diff import diff

        return rows(diff(artifact, module, pictures))

    def fitness(self, artifact: Artifact, pictures: Pictures) -> list[dict[str, Any]]:
        """Check for the Neural Engine, ranges on real images included; see `Target.fitness`."""
        from pipeline.targets.coreml.fitness import fitness

        findings = fitness(artifact.folder / MODEL, pictures.pixels)
        return [finding.to_dict() for finding in findings]

    def usage(self, place: str, input_shape: Sequence[int], kit: str) -> str:
        """See `Target.usage`."""
        return f"`{place}/{MODEL}` takes an image and names its class: add it to an app in Xcode."

    def missing(self, artifact: Artifact) -> str | None:
        """A Mac."""
        return _MAC if platform.system() != "Darwin" else None

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        """Load the package with Core ML."""
        if missing := self.missing(artifact):
            raise UnavailableError(missing)
        from pipeline.targets.coreml.runner import CoreMLRunner

        artifact.verify()
        network = artifact.network()
        return CoreMLRunner(artifact.folder / MODEL, network, artifact.facts["compute_units"])

    def measure_on(
        self, device: str, artifacts: Mapping[str, Artifact], job: DeviceJob
    ) -> dict[str, DeviceMeasurement]:
        """Measure on this Mac or the device connected to it; see `Target`."""
        from pipeline.targets.coreml.measured import measure_on

        return measure_on(device, artifacts, job)

    def read_measurements(
        self, file: Path, artifacts: Mapping[str, Artifact], device: str | None
    ) -> dict[str, DeviceMeasurement]:
        """Read our result file or Xcode's report; see `Target`."""
        from pipeline.targets.coreml.measured import read_measurements

        return read_measurements(file, artifacts, device)

    def emulate(self, artifact: Artifact, graph: Path | None) -> Runner | None:
        """The ML Program executor over the saved package."""
        from pipeline.targets.coreml.runner import EmulatedRunner

        artifact.verify()
        return EmulatedRunner(artifact.folder / MODEL, artifact.network())


def _program(artifact: Artifact) -> Program:
    """Read the package and check that it is the one that the artifact describes."""
    from pipeline.emulate.mil.program import read_program

    package = artifact.folder / MODEL
    program, network = read_program(package), artifact.network()
    version = SPECIFICATION_VERSIONS[artifact.facts["deployment_target"]]
    if program.specification > version:
        raise ArtifactError(
            f"{package} has specification version {program.specification}, "
            f"{artifact.facts['deployment_target']} reads up to {version}: build it again"
        )
    if program.labels != network.labels:
        raise ArtifactError(
            f"{package} has {len(program.labels)} labels that are not the {len(network.labels)} "
            "of its network: build it again"
        )
    return program


def _repaired(job: BuildJob, deployed: Deployed) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Modules that compute in float32 for float16 to hold, and the facts about that."""
    from pipeline.targets.coreml.repair import repair
    from pipeline.targets.repaired import most_images

    assert isinstance(job.options, CoreMLOptions)
    count = min(job.options.calibration_images, most_images(job.network.input_shape))
    pictures = job.calibration(count)
    with tempfile.TemporaryDirectory(prefix="repair-") as folder:
        mended = repair(job, deployed, pictures, Path(folder))
    facts = {"repair": mended.facts.to_dict(), "calibration_images": len(pictures)}
    return mended.float32, facts


def _build(job: BuildJob, package: Path, recipe: Recipe) -> dict[str, Any]:
    from pipeline.emulate.mil.program import read_program
    from pipeline.targets.coreml import package as saved
    from pipeline.targets.coreml.convert import convert, finish
    from pipeline.targets.coreml.fitness import fitness

    options, network = job.options, job.network
    assert isinstance(options, CoreMLOptions)
    deployed, prepared = recipe.deploy(job)
    if not deployed.folded:
        job.log("the network begins with no plain convolution: std becomes a multiplication")
    float32 = recipe.float32(options.float32_operations)
    if options.repair and job.precision == "fp16":
        float32, told = _repaired(job, deployed)
        prepared |= told
    core = convert(deployed, network, options.deployment_target, float32)
    model, found = recipe.compress(core, job)
    finish(model, network, package, job.precision)
    program = read_program(package)
    operations = [op.type for op in program.operations if op.type != "const"]
    return {
        "deployment_target": options.deployment_target,
        "compute_units": options.compute_units,
        "std": "folded" if deployed.folded else "multiplied",
        "size": saved.size(package),
        "operations": {kind: operations.count(kind) for kind in sorted(set(operations))},
        "fitness": [finding.to_dict() for finding in fitness(package)],
        "network": network.to_dict(),
        "verified": _verified(job, package, recipe.limits),
        **prepared,
        **found,
    }


def _verified(job: BuildJob, package: Path, limits: Limits) -> dict[str, Any]:
    """What the comparison with the module found; a gap of the executor says nothing of a package.

    Raises:
        BuildError: The package computes something else than the module.
    """
    from pipeline.targets.coreml.verify import verify

    try:
        return verify(package, job.module(), job.network, limits)
    except UnsupportedOperatorError as error:
        job.log(f"the package cannot be checked here: {error}")
        # Facts say nothing of where a package was while it was made.
        return {"not_emulated": str(error).replace(f"{package}: ", "")}
