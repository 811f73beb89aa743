"""What a deployment target is: it builds, opens, runs and explains artifacts of one runtime.

A new runtime is one package here with a `Target`, registered in `pipeline.targets.registry`.
Nothing else in the pipeline branches on a target's name. Modules here import their runtime only
inside functions: configuration, planning and help must not load it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from pipeline.core.cpu_classes import CpuClass, Purpose
from pipeline.core.errors import InputError, UnavailableError
from pipeline.core.figures import Number
from pipeline.core.network import Logits, Network
from pipeline.core.preprocess import Pictures
from pipeline.core.runner import PhotoRunner, Runner
from pipeline.steps.artifact import Artifact
from pipeline.targets.forms import Form
from pipeline.targets.refusals import signature

if TYPE_CHECKING:
    from torch import nn

    from pipeline.targets.forms import Form


MODULE = "module"
"""Graph form of targets that build from the fused PyTorch module instead of an ONNX graph."""


RESTRICTING = frozenset({"restrict", "why_not_as", "missing_on", "restricting"})
"""Methods of a target that let its runtime see another CPU."""

LOOKING = RESTRICTING | frozenset(
    {"requirements", "inspect", "profile", "diff", "fitness", "measure_on", "read_measurements"}
    | {"refusal", "refused_alike"}
)
"""Methods of a target that only look, at an artifact or at the machine. What the module of a target
imports inside of them, and nowhere else, makes none of its artifacts out of date."""


class TargetOptions(BaseModel):
    """Options of a target in pipeline.yaml; each target derives its own.

    Attributes:
        measuring: Names of options that change measurements only: artifacts do not depend on them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    measuring: ClassVar[frozenset[str]] = frozenset()

    def classes(self) -> tuple[str, ...]:
        """Classes of CPUs that artifacts are judged and measured for beside the one that is here.

        Names as in `pipeline.core.cpu_classes`.
        """
        return ()


@dataclass(frozen=True)
class Requirement:
    """Something that a target needs.

    Attributes:
        name: What it is, such as "tensorrt_rtx" or "an NVIDIA GPU".
        found: The version or device that is there, or None.
        needed_for: "build", "run" or "measure".
        remedy: How to get it, if it is missing.
    """

    name: str
    found: str | None
    needed_for: str
    remedy: str


@dataclass(frozen=True)
class BuildJob:
    """What a target needs to build one artifact.

    Attributes:
        network: Labels, shape and preprocessing.
        precision: One of the target's precisions.
        options: The target's own options.
        graph: The ONNX graph in the form that the precision needs; None for `MODULE`.
        module: Makes the fused float32 module in evaluation mode, on the CPU; every call makes
            a fresh one.
        calibration: Gives calibration images: at most so many as asked for.
        batch: Fixed batch size, or None for a dynamic one.
        log: Takes a line of the runtime's chatter for the log file.
        photo: Also build a model that takes decoded photographs, see `Target.takes_photos`.
        evaluations: A file in which a search keeps what it evaluated, so that one that is killed
            goes on; None to keep nothing. Its name stands for all that decides an evaluation.
    """

    network: Network
    precision: str
    options: TargetOptions
    graph: Path | None
    module: Callable[[], nn.Module]
    calibration: Callable[[int], Pictures]
    batch: int | None
    log: Callable[[str], None]
    evaluations: Path | None = None
    photo: bool = False


@dataclass(frozen=True)
class DeviceJob:
    """How to measure on a device, and what answers are compared with.

    Attributes:
        options: The target's own options.
        samples: Timed predictions.
        pictures: Validation images: read when called.
        expected: Logits of PyTorch for them, (batch, classes): computed when called.
    """

    options: TargetOptions
    samples: int
    pictures: Callable[[], Pictures]
    expected: Callable[[], Logits]


@dataclass(frozen=True)
class DeviceMeasurement:
    """What was measured of one artifact on a device.

    Attributes:
        latency: The figure that stands for it.
        line: One line for people.
        content: The result file, as text: `Target.read_measurements` reads it back.
        tables: Further results for the report, rows by name of the table.
    """

    latency: Number
    line: str
    content: str
    tables: Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Swift:
    """What the Swift packages that measure two formats differ in, see `exports.coreml_bench`.

    Attributes:
        module: Name of the Swift library.
        program: Name of the program, and of the file that it writes.
        model: The model's folder within an artifact.
        digest: Names a model's content.
        prefix: With which the names of its own templates begin, beside the shared ones.
        takes_image: The model takes an image, and says itself of which size.
    """

    module: str
    program: str
    model: str
    digest: Callable[[Path], str]
    prefix: str
    takes_image: bool


class Target(ABC):
    """One runtime.

    Attributes:
        name: Its name in pipeline.yaml and in folders, such as "trt".
        title: Its name for people.
        precisions: Precision -> form of the ONNX graph that it is built from, see
            `pipeline.targets.forms`, or `MODULE`.
        forms: Forms of the graph that it alone builds from.
        options: Type of its options.
        published_on: Device of the published latencies that stands for it, as
            `pipeline.core.published` names it; "" if there is none.
        resource: What workers of a fleet state that have the hardware to run its artifacts.
        builds_on: What workers of a fleet state on which `build` is best done, where there are any;
            the others can do it as well.
        builds_differ: Why two builds from the same inputs are not the same bytes; "" if they are.
        devices: Kinds of connected device that `measure_on` takes.
        swift: How a Swift package measures its artifacts on a device that is not connected; None
            where none does.
        calibrated: Precisions of which `build` asks for calibration images. Forms of the graph have
            their own, see `pipeline.targets.forms`.
        anywhere: What it builds for this machine runs on others, so that examples show it first.
        checks: Programs of a golden kit that check its artifacts, beside `check.py`, as
            `pipeline.exports.golden` names them.
        proposed: Precisions that a first configuration asks for, those that need calibration images
            only where there are some; empty for a target that is proposed to nobody.
        emulates_at: Seconds of one CPU for an image and 1e9 multiply-accumulates in the executor
            that `emulate` gives, by precision, as far as that was measured.
        takes_photos: Its artifacts can hold a model with preprocessing inside, see `open_photo`.
        timed: `build` chooses by measuring on the machine that builds: its result belongs to that
            class of machines, see `pipeline.core.machine.cpu_class` and `hardware`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    precisions: ClassVar[Mapping[str, str]]
    options: ClassVar[type[TargetOptions]]
    forms: ClassVar[tuple[Form, ...]] = ()
    published_on: ClassVar[str] = ""
    resource: ClassVar[str] = "cpu"
    builds_on: ClassVar[str] = "cpu"
    builds_differ: ClassVar[str] = ""
    devices: ClassVar[tuple[str, ...]] = ()
    swift: ClassVar[Swift | None] = None
    calibrated: ClassVar[frozenset[str]] = frozenset()
    anywhere: ClassVar[bool] = False
    checks: ClassVar[tuple[str, ...]] = ()
    proposed: ClassVar[tuple[str, ...]] = ()
    emulates_at: ClassVar[Mapping[str, float]] = {}
    takes_photos: ClassVar[bool] = False

    @property
    def timed(self) -> bool:
        """See the attributes."""
        return False

    def hardware(self) -> dict[str, str]:
        """What beside the CPU decides what is measured on this machine, such as its GPU."""
        return {}

    @abstractmethod
    def requirements(self) -> list[Requirement]:
        """What it needs and what is there, for `python -m pipeline doctor`."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that decide what is built, without importing them."""

    def form(self, precision: str, options: TargetOptions | None) -> str:
        """Name of the form of the graph that a precision is built from, or `MODULE`.

        Args:
            precision: One of `precisions`.
            options: The target's own options; None for the defaults.
        """
        return self.precisions[precision]

    def repaired(self, precision: str, *, bfloat16: bool) -> str:
        """Name of the form in which a graph that a precision breaks is mended for this runtime.

        Args:
            precision: What all computes in but for what is raised.
            bfloat16: Parts may be raised to bfloat16, and not to float32 alone.

        Raises:
            InputError: There is none for this precision, or `bfloat16` does not go with it.
        """
        raise InputError(f"{self.title} has no repaired form of an ONNX graph")

    def calibrates(self, precision: str, options: TargetOptions | None) -> bool:
        """Whether `build` asks for calibration images.

        Args:
            precision: One of `precisions`.
            options: The target's own options; None for the defaults.
        """
        return precision in self.calibrated

    def check(self, precision: str, options: TargetOptions) -> None:  # noqa: B027
        """Raise ConfigError if this precision cannot be built with these options."""

    @abstractmethod
    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """Write the artifact's files into `folder` and return the facts about it.

        Raises:
            BuildError: The runtime refused; the message carries its reason.
            UnavailableError: The runtime is not installed.
        """

    @abstractmethod
    def inspect(self, artifact: Artifact) -> str:
        """Open the artifact with the runtime's own library, as far as this machine can.

        Returns:
            What was looked at, in a few words.

        Raises:
            ArtifactError: The runtime does not accept it.
        """

    def operations(self, facts: Mapping[str, Any]) -> dict[str, int]:
        """How many operations of each kind an artifact has, for the comparison of two runs.

        Args:
            facts: What `build` told. What it calls `operations` is taken, by kind, where a target
                says nothing else.

        Returns:
            Their number by kind; nothing where nobody wrote it down.
        """
        return counted(facts.get("operations"))

    def usage(self, place: str, input_shape: Sequence[int], kit: str) -> str:
        """How to run an artifact with its runtime alone, for people who have nothing of this.

        Args:
            place: Path of the artifact's folder.
            input_shape: Of one image, (channels, height, width).
            kit: Path of its golden kit; "" where it has none.

        Returns:
            A few lines of Markdown, for the README of a bundle.
        """
        return f"`{place}` is opened by {self.title}."

    @abstractmethod
    def missing(self, artifact: Artifact) -> str | None:
        """Why this machine cannot run the artifact: what is missing, and how to get it."""

    @abstractmethod
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        """Open the artifact to run it.

        Args:
            artifact: What `build` made.
            threads: CPU threads, where that means something; None for the target's own choice.

        Raises:
            UnavailableError: This machine cannot run it, see `missing`.
            ArtifactError: It is damaged.
        """

    def open_to_judge(self, artifact: Artifact) -> Runner:
        """Open the artifact for its answers, which are those of `open`; nothing is timed.

        Args:
            artifact: What `build` made.

        Raises:
            UnavailableError, ArtifactError: As for `open`.
        """
        return self.open(artifact)

    def open_photo(self, artifact: Artifact) -> PhotoRunner | None:
        """Open the model that takes decoded photographs; None where the artifact holds none.

        Raises:
            UnavailableError: This machine cannot run it, see `missing`.
            ArtifactError: It is damaged.
        """
        return None

    def profile(
        self, artifact: Artifact, pictures: Pictures, *, threads: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Time by operator, the most expensive first; None where the runtime cannot tell.

        Args:
            artifact: What `build` made.
            pictures: The batch to run.
            threads: As for `open`.

        Returns:
            Rows of equal keys: a table.
        """
        return None

    def diff(
        self,
        artifact: Artifact,
        module: nn.Module,
        pictures: Pictures,
        graph: Path | None = None,
        reference: Path | None = None,
    ) -> list[dict[str, Any]] | None:
        """Error against PyTorch layer by layer; None where the target cannot tell.

        Args:
            artifact: What `build` made.
            module: The fused float32 module that it was made from.
            pictures: A few images.
            graph: The ONNX graph that it was built from, if it was.
            reference: The float32 ONNX graph that `graph` was made from.

        Returns:
            Rows of `pipeline.emulate.layers.rows`: a row a module, in order, and `jump`, true for
            the first that is at fault.
        """
        return None

    def refusal(self, graph: Path, precision: str, log: Callable[[str], None]) -> str | None:
        """Why the runtime does not build a part of a network; None if it does.

        The part is built as it is: no second try, and whatever kills the builder kills no more.

        Args:
            graph: An ONNX graph in the form of the precision, with any number of inputs and
                outputs. Open axes are multiples of the batch, see `pipeline.graphs.parts.BATCH`.
            precision: One of the target's precisions.
            log: Takes a line of the runtime's chatter.

        Raises:
            UnavailableError: The runtime is not installed.
        """
        raise InputError(f"{self.name} does not build parts of networks")

    def refused_alike(self, first: str, other: str) -> bool:
        """Whether two answers of `refusal` tell of the same failure, as far as they tell."""
        return signature(first) == signature(other)

    def fitness(self, artifact: Artifact, pictures: Pictures) -> list[dict[str, Any]] | None:
        """Is the artifact fit for the device's accelerator? None where the target cannot tell.

        Args:
            artifact: What `build` made.
            pictures: Some real images.

        Returns:
            A row a check: check, level ("fine", "advice" or "problem"), found, advice, and where.
        """
        return None

    def doubt(self, artifact: Artifact) -> str:
        """What speaks against the answers of an artifact on this machine; "" if nothing does."""
        return ""

    def why_not_as(self, cls: CpuClass, purpose: Purpose = Purpose.BOTH) -> str | None:
        """What is missing here to run as on a CPU of a class; None if nothing is.

        Args:
            cls: The class.
            purpose: What is to be found out: that decides what may stand in for instructions that
                the CPU lacks.
        """
        return f"{self.title} does not run as on another CPU"

    def missing_on(self, artifact: Artifact, cls: CpuClass) -> str | None:
        """Why CPUs of a class cannot run an artifact that others run; None if they can."""
        return None

    def restrict(self, cls: CpuClass, purpose: Purpose = Purpose.BOTH) -> None:
        """Let the runtime see a CPU of a class only, in this process and for good.

        Args:
            cls: The class.
            purpose: See `why_not_as`.

        Raises:
            UnavailableError: That cannot be done here; the message says what is missing.
        """
        raise UnavailableError(f"as {cls.name} not measured: {self.why_not_as(cls)}")

    def restricting(self) -> tuple[Path, ...]:
        """Files beside Python's modules that decide what a restricted process measures."""
        return ()

    def measure_on(
        self, device: str, artifacts: Mapping[str, Artifact], job: DeviceJob
    ) -> dict[str, DeviceMeasurement]:
        """Measure artifacts on a device that is connected to this machine.

        Args:
            device: One of `devices`.
            artifacts: What `build` made, by precision.
            job: How to measure, and what to compare answers with.

        Returns:
            By precision, what was measured.

        Raises:
            UnavailableError: The device, or what talks to it, is missing.
            BuildError: What measures cannot be built or started.
        """
        raise InputError(f"{self.name} is not measured on connected devices")

    def read_measurements(
        self, file: Path, artifacts: Mapping[str, Artifact], device: str | None
    ) -> dict[str, DeviceMeasurement]:
        """Read what was measured elsewhere, and find the artifact that it belongs to.

        Args:
            file: A result file of a kind that the target knows.
            artifacts: What `build` made, by precision: those that come into question.
            device: Kind of device that it has to be from; None for any.

        Returns:
            By precision, what was measured.

        Raises:
            DataError: The file is no measurement, or one of another kind of device.
            ArtifactError: It is one of a model that was not built here.
            InputError: It fits several artifacts, or the target imports no measurements.
        """
        raise InputError(f"{self.name} imports no measurements")

    def emulate(self, artifact: Artifact, graph: Path | None) -> Runner | None:
        """A faithful executor of the artifact on the CPU, or None if there is none.

        Args:
            artifact: What `build` made.
            graph: The ONNX graph that it was built from, if it was.
        """
        return None


def counted(values: Any) -> dict[str, int]:
    """Numbers by name, of facts that anybody may have written; what is no number is left out."""
    if not isinstance(values, Mapping):
        return {}
    return {str(name): count for name, count in values.items() if type(count) is int}
