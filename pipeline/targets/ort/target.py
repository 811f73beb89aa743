"""The ONNX Runtime target: what the pipeline sees of this package.

Planning loads this module: what builds, opens and measures is imported where it is needed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.core import machine, published
from pipeline.core.cpu_classes import CpuClass, Purpose
from pipeline.core.errors import ArtifactError, InputError, UnavailableError
from pipeline.core.network import Images
from pipeline.core.plain import parse_json
from pipeline.core.preprocess import Pictures
from pipeline.core.runner import PhotoRunner, Runner
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import versions
from pipeline.targets.base import BuildJob, Requirement, Target, TargetOptions, counted
from pipeline.targets.forms import Form
from pipeline.targets.ort import providers
from pipeline.targets.ort.layout import BLOCKED, OTHER_BLOCKED, PHOTO, PORTABLE, PROBE, block_size
from pipeline.targets.ort.options import OrtOptions
from pipeline.targets.ort.quantize import Int8Ort
from pipeline.targets.ort.repaired import RepairedInt8Ort
from pipeline.targets.ort.runner import OrtPhotoRunner, OrtRunner
from pipeline.targets.ort.session import Settings, runtime, start

if TYPE_CHECKING:
    from torch import nn

    from pipeline.targets.ort.profile import Row

INSTALL = "pip install onnxruntime"

FLOAT32 = "float32"


class OrtTarget(Target):
    """Builds and runs ONNX Runtime models for the CPU."""

    name = "ort"
    title = "ONNX Runtime"
    precisions: ClassVar[Mapping[str, str]] = {
        "fp32": FLOAT32,
        "int8": "int8-ort",
        "bf16": FLOAT32,
    }
    options = OrtOptions
    proposed = ("fp32", "int8")
    published_on = published.INTEL
    forms: ClassVar[tuple[Form, ...]] = (Int8Ort(), RepairedInt8Ort())
    takes_photos: ClassVar[bool] = True
    timed = True
    anywhere = True

    def requirements(self) -> list[Requirement]:
        """See `Target.requirements`."""
        found = metadata.version("onnxruntime") if find_spec("onnxruntime") else None
        return [
            Requirement("onnxruntime", found, "build", INSTALL),
            Requirement("CPU threads", str(machine.granted()), "run", "grant the process CPUs"),
        ]

    def versions(self) -> dict[str, str]:
        """See `Target.versions`."""
        return versions("onnxruntime", "onnx", "onnx-ir")

    def form(self, precision: str, options: TargetOptions | None) -> str:
        """The repaired form, if that is asked for; see `Target.form`."""
        name = self.precisions[precision]
        wanted = isinstance(options, OrtOptions) and options.repair
        return f"{name}-repaired" if wanted and name != FLOAT32 else name

    def repaired(self, precision: str, *, bfloat16: bool) -> str:
        """See `Target.repaired`."""
        if self.precisions.get(precision, FLOAT32) == FLOAT32 or not bfloat16:
            raise InputError(
                "ONNX Runtime's own kernels compute in float32 and int8; give --precision int8, "
                "without --no-bfloat16"
            )
        return f"{self.precisions[precision]}-repaired"

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """See `Target.build`."""
        options = job.options
        assert isinstance(options, OrtOptions)
        settings = Settings(
            threads=options.threads,
            level=options.graph_optimization,
            spinning=options.allow_spinning,
            provider=options.provider,
            huge_pages=options.huge_pages,
        )
        if job.precision == "bf16":
            # ONNX Runtime's own kernels for x86 have no bfloat16.
            settings = replace(settings, provider="openvino", precision="bf16")
        rewrite = self.precisions[job.precision] == FLOAT32
        if not rewrite:
            return self._build(job, folder, settings, options)
        if options.gelu == "exact" or job.precision != "fp32":
            return {"gelu": "exact", **self._build(job, folder, settings, options)}
        from pipeline.targets.ort.build import by_tanh

        with tempfile.TemporaryDirectory(prefix="gelu-") as temporary:
            other = by_tanh(job, Path(temporary))
            built = self._build(other, folder, settings, options)
            return {"gelu": "tanh", "approximates": "gelu: tanh", **built}

    def _build(
        self, job: BuildJob, folder: Path, settings: Settings, options: OrtOptions
    ) -> dict[str, Any]:
        from pipeline.targets.ort import certificate
        from pipeline.targets.ort.build import try_models, write_models, write_photo

        rewrite = self.precisions[job.precision] == FLOAT32
        facts = write_models(job, folder, rewrite=rewrite, provider=settings.provider)
        if not rewrite:
            found = certificate.of_graph(folder / PORTABLE)
            facts["certificate"] = {
                "certified_for": list(found.certified_for),
                "measured_on": found.measured_on,
                "unsafe_layers": [layer.layer for layer in found.unsafe],
            }
        tune_seconds = options.tune_seconds if options.tune else 0.0
        ran = try_models(
            job,
            folder,
            settings,
            tune_seconds=tune_seconds,
            allow_fallback=options.allow_fallback,
        )
        # The file for photographs is run by ONNX Runtime's own kernels.
        if job.photo and settings.precision == "fp32":
            facts["photo"] = write_photo(job, folder)
        return {**facts, **ran}

    def inspect(self, artifact: Artifact) -> str:
        """See `Target.inspect`."""
        model, settings = how_to_open(artifact)
        session = start(model, settings, 1)
        stated = session.get_modelmeta().custom_metadata_map.get("labels", "[]")
        labels = parse_json(stated, f"{model}: its labels")
        if not isinstance(labels, list):
            raise ArtifactError(f"{model}: its labels are no list: build again")
        shape = ", ".join(str(side) for side in session.get_inputs()[0].shape)
        return f"{model.name} opened by ONNX Runtime: input ({shape}), {len(labels)} labels"

    def operations(self, facts: Mapping[str, Any]) -> dict[str, int]:
        """Nodes that ran, by the type that they compute in; see `Target.operations`."""
        found: Counter[str] = Counter()
        ran = facts.get("nodes")
        for nodes in ran.values() if isinstance(ran, Mapping) else ():
            found.update(counted(nodes))
        return dict(found)

    def usage(self, place: str, input_shape: Sequence[int], kit: str) -> str:
        """See `Target.usage`."""
        shape = " x ".join(map(str, input_shape))
        narrow = place.endswith("/bf16")
        alone = "in float32, without OpenVINO" if narrow else "ONNX Runtime alone"
        lines = [
            f'session = onnxruntime.InferenceSession("{place}/{PORTABLE}")   # {alone}',
            f'logits = session.run(None, {{"image": image}})[0]   # float32, 1 x {shape}',
        ]
        if kit:
            check = f"python {kit}/check.py {place}/{PORTABLE}"
            lines.append(f"{check}   # does it compute here what was built?")
        return "\n".join(f"    {line}" for line in lines)

    def missing(self, artifact: Artifact) -> str | None:
        """See `Target.missing`."""
        if not find_spec("onnxruntime"):
            return f"onnxruntime is not installed: {INSTALL}"
        asked = _asked(artifact)
        # Every ONNX Runtime has the CPU: planning need not load it to know.
        if asked.provider == "cpu":
            return None
        return providers.missing(asked.provider, runtime(), asked.precision)

    def doubt(self, artifact: Artifact) -> str:
        """See `Target.doubt`: it is not certified for this CPU."""
        from pipeline.targets.ort import certificate

        stated = artifact.facts.get("certificate")
        if not isinstance(stated, dict):
            return ""
        certified = tuple(stated.get("certified_for", ()))
        return certificate.warning(certified, artifact.name) or ""

    def why_not_as(self, cls: CpuClass, purpose: Purpose = Purpose.BOTH) -> str | None:
        """See `Target.why_not_as`."""
        from pipeline.targets.ort import as_cpu

        return as_cpu.why_not(cls, purpose)

    def missing_on(self, artifact: Artifact, cls: CpuClass) -> str | None:
        """See `Target.missing_on`: none of the classes has products in bfloat16."""
        if _asked(artifact).precision != "bf16" or machine.BFLOAT16 - cls.hidden:
            return None
        return f"CPUs with {cls.title} have no bfloat16"

    def restrict(self, cls: CpuClass, purpose: Purpose = Purpose.BOTH) -> None:
        """See `Target.restrict`."""
        from pipeline.targets.ort import as_cpu

        as_cpu.enter(cls, purpose)

    def restricting(self) -> tuple[Path, ...]:
        """See `Target.restricting`."""
        from pipeline.targets.ort import as_cpu

        return as_cpu.SOURCES

    def diff(
        self,
        artifact: Artifact,
        module: nn.Module,
        pictures: Pictures,
        graph: Path | None = None,
        reference: Path | None = None,
    ) -> list[dict[str, Any]] | None:
        """Run the portable file beside the float32 graph; see `Target.diff`.

        The file in the blocked layout computes the same by operators of ONNX Runtime's own.
        """
        from pipeline.targets.layers import graph_rows

        if reference is None:
            return None
        return graph_rows(artifact.path(PORTABLE), reference, module, pictures)

    def profile(
        self, artifact: Artifact, pictures: Pictures, *, threads: int | None = None
    ) -> list[dict[str, Any]]:
        """See `Target.profile`."""
        return [asdict(row) for row in profile(artifact, pictures.images, threads=threads)]

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        """See `Target.open`.

        Raises:
            InputError: More threads are asked for than this process may use.
        """
        model, settings = self._checked(artifact)
        return OrtRunner(model, settings, machine.resolve_threads(_threads(threads, settings)))

    def open_to_judge(self, artifact: Artifact) -> Runner:
        """See `Target.open_to_judge`; threads that have nothing to do wait without the CPU.

        Waiting actively took 30 % of the CPU seconds of care_tiny's validation, and no answer
        depends on it.
        """
        model, settings = self._checked(artifact)
        quiet = replace(settings, spinning=False)
        return OrtRunner(model, quiet, machine.resolve_threads(settings.threads))

    def _checked(self, artifact: Artifact) -> tuple[Path, Settings]:
        """How to open an artifact that is whole and runs here."""
        reason = self.missing(artifact)
        if reason is not None:
            raise UnavailableError(reason)
        artifact.verify()
        if doubt := self.doubt(artifact):
            from pipeline.targets.ort import certificate

            warnings.warn(doubt, certificate.CertificateWarning, stacklevel=3)
        return how_to_open(artifact)

    def open_photo(self, artifact: Artifact) -> PhotoRunner | None:
        """See `Target.open_photo`; ONNX Runtime's own kernels run it."""
        if PHOTO not in artifact.files:
            return None
        if reason := self.missing(artifact):
            raise UnavailableError(reason)
        artifact.verify()
        settings = replace(_settings(artifact)[0], provider="cpu")
        threads = machine.resolve_threads(settings.threads)
        return OrtPhotoRunner(artifact.path(PHOTO), settings, threads)


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
    from pipeline.targets.ort.profile import table, trace

    model, settings = how_to_open(artifact)
    return table(
        trace(model, settings, machine.resolve_threads(_threads(threads, settings)), images, runs)
    )


def how_to_open(artifact: Artifact) -> tuple[Path, Settings]:
    """The artifact's file for this machine, and how to open it.

    A file in the blocked layout is taken only where it fits: the same width of blocks, the same
    ONNX Runtime. On the class of CPUs that decided by measuring, it is taken if it was chosen; on
    another class if it answers as the portable file does, since no measurement says more.
    """
    settings, decided = _settings(artifact)
    facts, layout = artifact.facts, artifact.facts.get("layout", {})
    if (decided and facts.get("model") != BLOCKED) or settings.provider != "cpu":
        return artifact.path(PORTABLE), settings
    if PROBE not in artifact.files or layout.get("onnxruntime") != runtime().__version__:
        return artifact.path(PORTABLE), settings
    block = block_size(artifact.path(PROBE))
    if block == layout.get("block"):
        return artifact.path(BLOCKED), settings
    if block == layout.get("other") and _answers_alike(artifact):
        return artifact.path(OTHER_BLOCKED), settings
    return artifact.path(PORTABLE), settings


_ALIKE: dict[tuple[str, str], bool] = {}
"""By digest of an artifact and class of CPU, whether its unmeasured file answers right: a process
asks once."""


def _answers_alike(artifact: Artifact) -> bool:
    """Whether the file for the other width of blocks, which nobody has run yet, answers right."""
    from pipeline.targets.ort import certificate
    from pipeline.targets.ort.build import same_answers

    key = (artifact.digest, certificate.here())
    if key not in _ALIKE:
        _ALIKE[key] = same_answers(artifact.path(OTHER_BLOCKED), artifact.path(PORTABLE))
    return _ALIKE[key]


def _threads(asked: int | None, settings: Settings) -> int | None:
    return settings.threads if asked is None else asked


def _settings(artifact: Artifact) -> tuple[Settings, bool]:
    """How to open an artifact on this CPU, and whether a measurement on such a one decided it.

    What was measured holds for the class of CPUs that it was measured on, where the provider that
    it chose is there; else the artifact is opened as it was asked for.
    """
    from pipeline.targets.ort import certificate

    chosen, asked = _stated(artifact, "session"), _asked(artifact)
    decided = artifact.facts.get("decided_on", certificate.here()) == certificate.here()
    if decided and chosen.provider != asked.provider:
        decided = providers.missing(chosen.provider, runtime()) is None
    return (chosen, True) if decided else (asked, False)


def _asked(artifact: Artifact) -> Settings:
    """How an artifact was asked to be opened; of an older build, how it was chosen to be."""
    return _stated(artifact, "asked" if "asked" in artifact.facts else "session")


def _stated(artifact: Artifact, fact: str) -> Settings:
    try:
        return Settings.from_dict(artifact.facts[fact])
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{artifact.folder} does not say how to open it: build it again"
        ) from error
