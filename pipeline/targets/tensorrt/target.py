"""The target `trt`: engines for NVIDIA GPUs, by TensorRT-RTX or full TensorRT.

TensorRT-RTX builds on any Linux box for GPUs of the 20 to 50 series; full TensorRT builds on the
GPU box, for its GPU. Details are in `pipeline.targets.tensorrt`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import runpy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pipeline.core import published
from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    InputError,
    UnavailableError,
    UnsupportedOperatorError,
)
from pipeline.core.preprocess import Pictures
from pipeline.core.runner import Runner
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob, Requirement, Target, TargetOptions, counted
from pipeline.targets.forms import Form
from pipeline.targets.tensorrt import api, limits, nvml
from pipeline.targets.tensorrt.build import ENGINE, EngineJob, build_engine
from pipeline.targets.tensorrt.device import Gpu, find_gpu
from pipeline.targets.tensorrt.limits import ComputeCapability
from pipeline.targets.tensorrt.options import TrtOptions
from pipeline.targets.tensorrt.process import INTERNAL_FAULT, build_apart
from pipeline.targets.tensorrt.quantize import Fp8Trt, Int8Trt
from pipeline.targets.tensorrt.repaired import (
    RepairedFp8Trt,
    RepairedInt8Trt,
    RepairedInt8TrtOnly,
)

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger(__name__)

_PART_BATCHES = (1, 8, 64)
"""Batches that parts with an open batch are built for: those of networks, see `TrtOptions`."""

TORCH = "install torch for CUDA as https://pytorch.org/get-started/locally says"


class TrtTarget(Target):
    """Engines for NVIDIA GPUs."""

    name: ClassVar[str] = "trt"
    title: ClassVar[str] = "TensorRT"
    precisions: ClassVar[dict[str, str]] = dict(limits.FORMS)
    options: ClassVar[type[TargetOptions]] = TrtOptions
    proposed: ClassVar[tuple[str, ...]] = ("fp16", "int8")
    emulates_at: ClassVar[Mapping[str, float]] = {"fp16": 0.13}
    """CARE-S0 (0.7 GMACs) took 0.09 seconds an image."""
    published_on: ClassVar[str] = published.RTX
    resource: ClassVar[str] = "rtx"
    checks: ClassVar[tuple[str, ...]] = ("check_tensorrt.cpp",)
    builds_on: ClassVar[str] = "rtx"  # full TensorRT builds on a GPU only
    builds_differ: ClassVar[str] = "two builds of an engine differ"
    forms: ClassVar[tuple[Form, ...]] = (
        Int8Trt(),
        Fp8Trt(),
        RepairedInt8Trt(),
        RepairedInt8TrtOnly(),
        RepairedFp8Trt(),
    )

    @property
    def timed(self) -> bool:
        """Full TensorRT chooses kernels by timing them on the GPU that is there; see `Target`."""
        return isinstance(find_gpu(), Gpu) and api.installed(api.FULL) is not None

    def hardware(self) -> dict[str, str]:
        """The GPU, and the CUDA version that its driver serves; see `Target`."""
        gpu = find_gpu()
        if not isinstance(gpu, Gpu):
            return {}
        cuda_version = ".".join(str(part) for part in gpu.driver_cuda)
        return {"gpu": gpu.name, "compute_capability": gpu.capability, "driver_cuda": cuda_version}

    def requirements(self) -> list[Requirement]:
        """What is needed and found; see `Target`."""
        gpu = find_gpu()
        return [
            Requirement("tensorrt_rtx", api.installed(api.RTX), "build", api.INSTALL[api.RTX]),
            Requirement(
                "tensorrt", api.installed(api.FULL), "build on a GPU", api.INSTALL[api.FULL]
            ),
            Requirement(
                "an NVIDIA GPU",
                gpu.name if isinstance(gpu, Gpu) else None,
                "run",
                gpu if isinstance(gpu, str) else "",
            ),
            Requirement("torch with CUDA", torch_cuda(), "run", TORCH),
            Requirement("pynvml", _version("nvidia-ml-py"), "measure", nvml.INSTALL),
        ]

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that can build here; see `Target`."""
        names = (api.RTX, api.FULL) if isinstance(find_gpu(), Gpu) else (api.RTX,)
        found = ((name, api.installed(name)) for name in names)
        return {name: version for name, version in found if version}

    def form(self, precision: str, options: TargetOptions | None) -> str:
        """The repaired form, if that is asked for; see `Target`."""
        name = self.precisions[precision]
        if options is None or name == "float32" or not _options(options).repair:
            return name
        return _repaired(name, bfloat16=_has_bfloat16(_options(options)))

    def repaired(self, precision: str, *, bfloat16: bool) -> str:
        """See `Target.repaired`."""
        if precision not in limits.REPAIRED:
            raise InputError(f"TensorRT repairs {', '.join(limits.REPAIRED)}, not {precision}")
        if not bfloat16 and not limits.REPAIRED[precision]:
            alone = " and ".join(name for name, without in limits.REPAIRED.items() if without)
            raise InputError(f"--no-bfloat16 is for {alone}, not for {precision}")
        return _repaired(self.precisions[precision], bfloat16=bfloat16)

    def check(self, precision: str, options: TargetOptions) -> None:
        """Refuse impossible combinations before anything is built; see `Target`."""
        chosen = _options(options)
        if precision not in self.precisions:
            raise ConfigError(
                f"trt: unknown precision {precision!r}; it has {', '.join(self.precisions)}"
            )
        name = _choose(chosen.library)
        gpu = find_gpu()
        if name == api.RTX:
            limits.check_capabilities(precision, chosen.compute_capabilities)
        elif isinstance(gpu, Gpu):
            limits.check_capabilities(precision, (gpu.capability,), rtx=False)

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """Write `model.engine` and `layers.json`; see `Target`."""
        options = _options(job.options)
        self.check(job.precision, options)
        if job.graph is None:
            raise BuildError("trt: there is no ONNX graph to build from")
        name = _choose(options.library)
        gpu = find_gpu()
        if name == api.FULL and isinstance(gpu, str):
            raise UnavailableError(
                f"full TensorRT builds on a GPU only: {gpu}; or set library: rtx"
            )
        batch = job.batch
        engine = EngineJob(
            graph=job.graph,
            tf32=job.precision == "tf32",
            capabilities=options.compute_capabilities,
            batches=options.batches if batch is None else (batch, batch, batch),
            workspace=options.workspace_mib and options.workspace_mib << 20,
            gpu=gpu if isinstance(gpu, Gpu) else None,
        )
        return _build(name, engine, folder, job.log)

    def inspect(self, artifact: Artifact) -> str:
        """Look at the header, or deserialize the engine where a GPU is; see `Target`."""
        path = artifact.path(ENGINE)
        name = str(artifact.facts.get("library", api.RTX))
        if api.installed(name) is None:
            return f"not opened: {name} is not installed ({api.INSTALL[name]})"
        library, engine = api.load(name), path.read_bytes()
        with library.listening(_LOG.debug) as (logger, messages):
            checked = api.refuse_malformed(library, logger, engine, path)
            if why := self.missing(artifact):
                looked = "header accepted" if checked else "header not checked"
                return f"{library.title}: {looked}; not deserialized: {why}"
            if library.module.Runtime(logger).deserialize_cuda_engine(engine) is None:
                raise ArtifactError(f"{path} cannot be opened: {messages.reason}; build it again")
        return f"{library.title}: deserialized"

    def operations(self, facts: Mapping[str, Any]) -> dict[str, int]:
        """Layers that compute, by kind; see `Target.operations`."""
        layers = facts.get("layers")
        return counted(layers.get("by_kind") if isinstance(layers, Mapping) else None)

    def usage(self, place: str, input_shape: Sequence[int], kit: str) -> str:
        """See `Target.usage`."""
        return f"`{place}/{ENGINE}` needs the version of TensorRT that `manifest.json` names."

    def missing(self, artifact: Artifact) -> str | None:
        """Why this machine cannot run the engine; see `Target`."""
        facts = artifact.facts
        name = str(facts.get("library", api.RTX))
        gpu = find_gpu()
        if isinstance(gpu, str):
            return gpu
        if (here := api.installed(name)) is None:
            return f"{name} is not installed: {api.INSTALL[name]}"
        if here.split(".")[:3] != str(facts["library_version"]).split(".")[:3]:
            return (
                f"the engine was built by {name} {facts['library_version']}, installed is {here}: "
                "build it again, or install that version"
            )
        if gpu.driver_cuda < (int(facts["cuda_major"]), 0):
            return (
                f"the driver serves CUDA {gpu.driver_cuda[0]}.{gpu.driver_cuda[1]}, {name} needs "
                f"{facts['cuda_major']}.0: install a newer NVIDIA driver"
            )
        if gpu.capability not in facts["compute_capabilities"]:
            return _wrong_gpu(gpu, facts["compute_capabilities"])
        if torch_cuda() is None:
            return f"the installed torch has no CUDA: {TORCH}"
        return None

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        """Open the engine on the GPU; `threads` means nothing there. See `Target`."""
        from pipeline.targets.tensorrt.runner import GpuRunner

        if why := self.missing(artifact):
            raise UnavailableError(f"{artifact.name} cannot run here: {why}")
        artifact.verify()  # a damaged engine could do anything to the GPU
        path, gpu = artifact.path(ENGINE), find_gpu()
        assert isinstance(gpu, Gpu)  # `missing` has seen it
        return GpuRunner(
            api.load(artifact.facts["library"]),
            path.read_bytes(),
            path,
            gpu,
            largest=int(artifact.facts["batches"]["max"]),
            cache=cache_path(artifact, gpu),
            log=_LOG.debug,
        )

    def diff(
        self,
        artifact: Artifact,
        module: nn.Module,
        pictures: Pictures,
        graph: Path | None = None,
        reference: Path | None = None,
    ) -> list[dict[str, Any]] | None:
        """Run the engine's own graph beside the float32 one; see `Target.diff`."""
        from pipeline.targets.layers import graph_rows
        from pipeline.targets.tensorrt.emulation import check_graph

        if graph is None or reference is None:
            return None
        check_graph(artifact, graph)
        tf32 = bool(artifact.facts.get("tf32"))
        return graph_rows(graph, reference, module, pictures, tf32=tf32)

    def refusal(self, graph: Path, precision: str, log: Callable[[str], None]) -> str | None:
        """Build by TensorRT-RTX, for all GPUs that have the precision; see `Target.refusal`."""
        with tempfile.TemporaryDirectory(prefix="part-") as folder:
            job = EngineJob(
                graph=graph,
                tf32=precision == "tf32",
                capabilities=limits.capabilities_with(precision),
                batches=(1, 1, 1),
                workspace=None,
                gpu=None,
                part=True,
                shapes=_shapes(graph),
            )
            try:
                build_apart(job, Path(folder), log)
            except BuildError as error:
                return str(error)
        return None

    def refused_alike(self, first: str, other: str) -> bool:
        """All faults of the builder's own may be the same one.

        Where its memory lies decides what it notices: TensorRT-RTX 1.7.1 reads a value that it
        never wrote, and one graph gives two messages or a crash, by the length of a path.
        """
        own = [INTERNAL_FAULT in told for told in (first, other)]
        return all(own) or (not any(own) and super().refused_alike(first, other))

    def emulate(self, artifact: Artifact, graph: Path | None) -> Runner | None:
        """The strict executor on the engine's own graph; see `Target`."""
        from pipeline.targets.tensorrt.emulation import EmulatedRunner

        return EmulatedRunner(artifact, graph) if graph is not None else None


def _build(name: str, job: EngineJob, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Build an engine; one for a fixed batch with a profile to one image more, if it must be.

    TensorRT-RTX 1.7.1 dies on linear attention with a single head and a single image, where the
    product with the normalizer has a single row: it drops all axes of one, and then looks for them.
    With a profile it has to keep that of the batch.

    Raises:
        BuildError: The graph is refused in either way: the first refusal.
    """
    smallest, _, largest = job.batches
    try:
        return _build_once(name, job, folder, log)
    except UnsupportedOperatorError:
        raise
    except BuildError as error:
        if smallest != largest:
            raise
        refusal = error
    log(f"{refusal}; trying a profile of {smallest} to {smallest + 1} images")
    wider = dataclasses.replace(job, batches=(smallest, smallest, smallest + 1))
    try:
        facts = _build_once(name, wider, folder, log)
    except BuildError:
        raise refusal from None
    served = dict.fromkeys(("min", "opt", "max"), smallest)
    told = (
        f"TensorRT did not build for batches of {smallest} alone, and did with a profile of "
        f"{smallest} to {smallest + 1}"
    )
    return {
        **facts,
        "batches": served,
        "profile": facts["batches"],
        "workarounds": [told],
        "why_wider": str(refusal),
    }


def _build_once(
    name: str, job: EngineJob, folder: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    if name == api.RTX:
        return build_apart(job, folder, log)
    return build_engine(api.load(name), job, folder, log)


def _shapes(part: Path) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Smallest, usual and largest shape of each input of a part that has an open axis."""
    import onnx

    from pipeline.graphs.parts import times_batch

    shapes = {}
    for port in onnx.load(part, load_external_data=False).graph.input:
        sides = port.type.tensor_type.shape.dim
        by = [times_batch(side.dim_param) for side in sides]
        if any(by):
            shapes[port.name] = tuple(
                tuple(n * times or side.dim_value for times, side in zip(by, sides, strict=True))
                for n in _PART_BATCHES
            )
    return shapes


def cache_path(artifact: Artifact, gpu: Gpu) -> Path:
    """File for what TensorRT-RTX compiles on a GPU: beside the artifact, for this engine alone."""
    engine = artifact.files[ENGINE].sha256[:12]
    folder = artifact.folder
    return folder.with_name(f"{folder.name}-{engine}-sm{gpu.capability.replace('.', '')}.cache")


def torch_cuda() -> str | None:
    """CUDA version for which torch was built; None if it is not installed or was built for CPUs."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    # `torch.version` would import all of torch, which takes seconds. Its file holds constants.
    version: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    return version


def _options(options: TargetOptions) -> TrtOptions:
    if not isinstance(options, TrtOptions):
        raise ConfigError(f"trt: these are options of another target: {options!r}")
    return options


def _repaired(form: str, *, bfloat16: bool) -> str:
    """Name of the repaired form of a plain one."""
    return f"{form}-repaired" + ("" if bfloat16 else "-float32")


def _has_bfloat16(options: TrtOptions) -> bool:
    """Whether all GPUs that an engine is for have bfloat16."""
    gpu = find_gpu()
    capabilities: Sequence[str] = options.compute_capabilities
    if isinstance(gpu, Gpu) and _choose(options.library) == api.FULL:
        capabilities = (gpu.capability,)
    return not any(limits.why_not("bf16", each) for each in capabilities)


def _choose(choice: api.Choice) -> str:
    """Module of the library that is to build."""
    if choice == "auto":
        full = isinstance(find_gpu(), Gpu) and api.installed(api.FULL)
        return api.FULL if full else api.RTX
    return api.FULL if choice == "tensorrt" else api.RTX


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _wrong_gpu(gpu: Gpu, capabilities: Sequence[str]) -> str:
    known = get_args(ComputeCapability)
    remedy = (
        f"add {gpu.capability!r} to compute_capabilities and build again"
        if gpu.capability in known
        else f"TensorRT-RTX compiles for {', '.join(known)} only: use full TensorRT on this machine"
    )
    return (
        f"the engine is for compute capability {', '.join(capabilities)} and {gpu.name} has "
        f"{gpu.capability}: {remedy}"
    )
