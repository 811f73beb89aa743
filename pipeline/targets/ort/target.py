"""The ONNX Runtime target: what the pipeline sees of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline import threads as cpu
from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError, InputError, UnavailableError
from pipeline.system import cpu_name
from pipeline.targets.base import (
    BuildJob,
    Images,
    Logits,
    Requirement,
    Runner,
    Target,
    TargetOptions,
)
from pipeline.targets.ort import providers
from pipeline.targets.ort.build import BLOCKED, PORTABLE, try_models, write_models
from pipeline.targets.ort.layout import PROBE, block_size
from pipeline.targets.ort.profile import Row, table, trace
from pipeline.targets.ort.session import Settings, runtime, start

INSTALL = "pip install onnxruntime"

FLOAT32 = "float32"


class OrtOptions(TargetOptions):
    """Options of the ONNX Runtime target."""

    provider: Literal["cpu", "openvino"] = Field(
        default="cpu", description="What executes: ONNX Runtime's own kernels, or OpenVINO's."
    )
    threads: int | None = Field(
        default=None, gt=0, description="Default: as many as this process may use."
    )
    graph_optimization: Literal["none", "basic", "extended", "layout", "all"] = Field(
        default="all", description="How far ONNX Runtime optimizes the graph on opening."
    )
    allow_spinning: bool = Field(
        default=True,
        description="Threads wait actively for work, for a millisecond: faster, but busy.",
    )
    allow_fallback: bool = Field(
        default=False, description="Nodes that the provider cannot run may run elsewhere."
    )
    tune: bool = Field(
        default=True, description="Measure the ways to run the model and take the fastest."
    )
    tune_seconds: float = Field(default=3.0, gt=0, description="How long to measure them.")


class OrtRunner(Runner):
    """A model in an ONNX Runtime session.

    Args:
        model: An ONNX file with one input and one output.
        settings: How to open it.
        threads: How many threads.
    """

    def __init__(self, model: Path, settings: Settings, threads: int) -> None:
        self._session: Any = start(model, settings, threads)
        self._input = self._session.get_inputs()[0]
        self._output = self._session.get_outputs()[0].name
        if isinstance(self._input.shape[0], int):
            self.smallest = self.largest = self._input.shape[0]
        self.device = (
            f"ONNX Runtime {runtime().__version__}, {self._session.get_providers()[0]}, "
            f"{threads} {'thread' if threads == 1 else 'threads'}, {cpu_name()}"
        )

    def __call__(self, images: Images) -> Logits:
        """See `Runner.__call__`."""
        if self._session is None:
            raise InputError("the runner is closed: open the artifact again")
        self._check(images)
        logits: Logits = self._session.run([self._output], {self._input.name: images})[0]
        return logits

    def _check(self, images: Images) -> None:
        wanted = self._input.shape
        fits = len(images.shape) == len(wanted) and all(
            not isinstance(want, int) or want == have
            for want, have in zip(wanted, images.shape, strict=True)
        )
        if not fits or images.dtype != np.float32 or not len(images):
            shape = ", ".join(str(side) for side in wanted)
            raise InputError(
                f"the model takes float32 images of shape ({shape}), not {images.dtype} of shape "
                f"{images.shape}: preprocess them with the artifact's own preprocessing"
            )

    def close(self) -> None:
        """See `Runner.close`."""
        self._session = None


class OrtTarget(Target):
    """Builds and runs ONNX Runtime models for the CPU."""

    name = "ort"
    title = "ONNX Runtime"
    precisions: ClassVar[Mapping[str, str]] = {"fp32": FLOAT32, "int8": "int8-ort"}
    options = OrtOptions
    code = ("pipeline.measure", "pipeline.optimize", "pipeline.targets.ort")

    def requirements(self) -> list[Requirement]:
        """See `Target.requirements`."""
        found = metadata.version("onnxruntime") if find_spec("onnxruntime") else None
        return [
            Requirement("onnxruntime", found, "build", INSTALL),
            Requirement("CPU threads", str(cpu.granted()), "run", "grant the process CPUs"),
        ]

    def versions(self) -> dict[str, str]:
        """See `Target.versions`."""
        return {name: metadata.version(name) for name in ("onnxruntime", "onnx", "onnx-ir")}

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """See `Target.build`."""
        options = job.options
        assert isinstance(options, OrtOptions)
        settings = Settings(
            threads=options.threads,
            level=options.graph_optimization,
            spinning=options.allow_spinning,
            provider=options.provider,
        )
        rewrite = self.precisions[job.precision] == FLOAT32
        facts = write_models(job, folder, rewrite=rewrite, provider=options.provider)
        tune_seconds = options.tune_seconds if options.tune else 0.0
        ran = try_models(
            job,
            folder,
            settings,
            tune_seconds=tune_seconds,
            allow_fallback=options.allow_fallback,
        )
        return {**facts, **ran}

    def inspect(self, artifact: Artifact) -> str:
        """See `Target.inspect`."""
        model, settings = how_to_open(artifact)
        session = start(model, settings, 1)
        labels = json.loads(session.get_modelmeta().custom_metadata_map.get("labels", "[]"))
        shape = ", ".join(str(side) for side in session.get_inputs()[0].shape)
        return f"{model.name} opened by ONNX Runtime: input ({shape}), {len(labels)} labels"

    def missing(self, artifact: Artifact) -> str | None:
        """See `Target.missing`."""
        if not find_spec("onnxruntime"):
            return f"onnxruntime is not installed: {INSTALL}"
        provider = _settings(artifact).provider
        # Every ONNX Runtime has the CPU: planning need not load it to know.
        return None if provider == "cpu" else providers.missing(provider, runtime())

    def profile(
        self, artifact: Artifact, images: Images, *, threads: int | None = None
    ) -> list[dict[str, Any]]:
        """See `Target.profile`."""
        return [asdict(row) for row in profile(artifact, images, threads=threads)]

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        """See `Target.open`.

        Raises:
            InputError: More threads are asked for than this process may use.
        """
        reason = self.missing(artifact)
        if reason is not None:
            raise UnavailableError(reason)
        artifact.verify()
        model, settings = how_to_open(artifact)
        return OrtRunner(model, settings, cpu.resolve(_threads(threads, settings)))


def profile(
    artifact: Artifact, images: Images, *, threads: int | None = None, runs: int = 50
) -> list[Row]:
    """Where an artifact's time goes, operator by operator, the most expensive first.

    Args:
        artifact: What `OrtTarget.build` made.
        images: Preprocessed images, (batch, channels, height, width).
        threads: CPU threads; None for the artifact's own choice.
        runs: How many runs to take the median of.

    Raises:
        InputError: More threads are asked for than this process may use.
        UnavailableError, ArtifactError: See `OrtTarget.open`.
    """
    model, settings = how_to_open(artifact)
    return table(trace(model, settings, cpu.resolve(_threads(threads, settings)), images, runs))


def how_to_open(artifact: Artifact) -> tuple[Path, Settings]:
    """The artifact's file for this machine, and how to open it.

    The file in the blocked layout is taken where it was chosen and fits: the same width of blocks,
    the same ONNX Runtime. Everywhere else the portable one is.
    """
    settings = _settings(artifact)
    facts = artifact.facts
    if facts.get("model") != BLOCKED:
        return artifact.path(PORTABLE), settings
    layout = facts.get("layout", {})
    fits = layout.get("onnxruntime") == runtime().__version__ and block_size(
        artifact.path(PROBE)
    ) == layout.get("block")
    return artifact.path(BLOCKED if fits else PORTABLE), settings


def _threads(asked: int | None, settings: Settings) -> int | None:
    return settings.threads if asked is None else asked


def _settings(artifact: Artifact) -> Settings:
    try:
        return Settings.from_dict(artifact.facts["session"])
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{artifact.folder} does not say how to open it: build it again"
        ) from error
