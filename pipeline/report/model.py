"""What a run came to, typed: all that results.json holds.

`pipeline.report.results` fills it from the artifacts, `Run.read` reads results.json back; all else
in this package takes attributes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Number, State
from pipeline.core.files import read_regular
from pipeline.core.machine import Machine
from pipeline.core.network import Network
from pipeline.core.plain import Facts, Plain
from pipeline.core.published import Published
from pipeline.core.runner import Numerics
from pipeline.core.words import shown
from pipeline.steps.artifact import FileRecord
from pipeline.steps.facts.accuracy import (
    Accuracy,
    EmulationError,
    NarrowSums,
    PhotoCheck,
    ReferenceFacts,
)
from pipeline.steps.facts.bench import BenchFacts, Measured
from pipeline.steps.facts.cpu_class import ClassFacts
from pipeline.steps.facts.graphs import (
    BuildFacts,
    CalibrationFacts,
    ExportFacts,
    FormFacts,
    RepairFacts,
    SimplifyFacts,
)
from pipeline.steps.facts.resizes import ResizesFacts
from pipeline.steps.stated import MOST_BYTES, unsealed_results
from pipeline.steps.step import State as StepState

FORMAT = 3

_AGAIN = "run python -m pipeline run again"

IMAGENET_CLASSES = 1000

NOT_SELECTED = "not selected in this run"
EARLIER = "from an earlier run"

FactsT = TypeVar("FactsT", bound=Facts)


@dataclass(frozen=True)
class Part(Plain, Generic[FactsT]):
    """One artifact that lies in the results' folder.

    Attributes:
        name: Its name, such as "trt/fp16".
        earlier: It is from an earlier run: this one neither made it nor found it up to date.
        size: Bytes of all its files.
        digest: SHA-256 over names and contents of its files.
        key: Content hash of everything that could change it.
        files: Hash and size of every file.
        made_from: Digests of what it was made from, by name.
        tools: Versions of what made it.
        build_seconds: How long that took; None if it was made elsewhere.
        facts: What its stage tells of it.
    """

    name: str
    earlier: bool
    size: int
    digest: str
    key: str
    files: Mapping[str, FileRecord]
    made_from: Mapping[str, str]
    tools: Mapping[str, str]
    build_seconds: float | None
    facts: FactsT


@dataclass(frozen=True)
class BuiltArtifact(Plain):
    """One target in one precision, with its figures.

    Attributes:
        target: The target.
        title: The target's name for people.
        precision: The precision.
        selected: Whether this run looked at its build.
        failure: Why its build failed in this run; "" if it did not.
        why_not: What the maker of its graph found against using it, beside its time; "" if nothing.
        built: What lies there; None if nothing does.
        accuracy: Its accuracy, or why there is none.
        accuracy_earlier: Its accuracy is from an earlier run.
        numerics: What values an executor saw in it.
        narrow_sums: The second verdict, with sums of products in half precision.
        emulation: How far its emulation is from what was measured on hardware.
        latency: The latency that stands for it, or why there is none.
        latency_earlier: Its latency is from an earlier run.
        repair: What was raised to a wider type in its graph; None where nobody looked.
        photo: What its model with preprocessing inside gives; None where it has none.
        latency_doubt: Why its latency is not to be trusted; "" if it is. Gates and the choice take
            it for not measured then.
        why_slow: What the maker of its graph found of its time that speaks against it, where no
            latency counts; "" if nothing.
    """

    target: str
    title: str
    precision: str
    selected: bool
    failure: str
    why_not: str
    built: Part[BuildFacts] | None
    accuracy: Accuracy
    accuracy_earlier: bool
    numerics: Numerics | None
    latency: Number
    latency_earlier: bool
    narrow_sums: NarrowSums | None = None
    emulation: EmulationError | None = None
    latency_doubt: str = ""
    repair: RepairFacts | None = None
    photo: PhotoCheck | None = None
    why_slow: str = ""

    @property
    def trusted_latency(self) -> Number:
        """Its latency, or why there is none that counts."""
        if self.latency.value is None or not self.latency_doubt:
            return self.latency
        return Number.not_measured(f"not to be trusted: {self.latency_doubt}", unit="ms")

    @property
    def overflowed(self) -> bool:
        """Whether an executor saw values that are not finite."""
        seen = self.numerics
        return seen is not None and bool(seen.overflowed_values or seen.overflowed_tensors)

    @property
    def name(self) -> str:
        """Such as "trt/fp16"."""
        return f"{self.target}/{self.precision}"

    @property
    def size(self) -> int:
        """Bytes of what is shipped; 0 where nothing lies there."""
        return self.built.size - self.alternatives_size if self.built else 0

    @property
    def alternatives_size(self) -> int:
        """Bytes of the files that stand for others where they fit; they are not shipped."""
        if self.built is None:
            return 0
        files = self.built.files
        return sum(files[name].size for name in self.built.facts.alternatives if name in files)

    @property
    def standing(self) -> str:
        """`EARLIER` or `NOT_SELECTED`; "" where this run made it, or should have."""
        if self.built:
            return EARLIER if self.built.earlier else ""
        return "" if self.selected else NOT_SELECTED


@dataclass(frozen=True)
class StepEnd(Plain):
    """How a step of this run ended; see `pipeline.steps.step.StageResult`."""

    stage: str
    name: str
    state: StepState
    why: str
    seconds: float


@dataclass(frozen=True)
class GateFailure(Plain):
    """A limit of the configuration that does not hold.

    Attributes:
        target: The target.
        precision: The precision.
        figure: What is limited, for people, such as "top-1 drop".
        gate: The configuration's key, such as "max_top1_drop".
        limit: What it allows.
        value: What was found; may be NaN.
        state: How that came about.
        cause: What in the network itself explains it; "" if nothing is known.
        doubt: Why it cannot be told for sure; "" if it can.
    """

    target: str
    precision: str
    figure: str
    gate: str
    limit: float
    value: float
    state: State
    cause: str = ""
    doubt: str = ""

    @property
    def words(self) -> str:
        """What does not hold, without the artifact's name."""
        doubt = f"; {self.doubt}" if self.doubt else ""
        cause = f"; {self.cause}" if self.cause else ""
        return (
            f"{self.figure} is {self.value:.4g}, {self.gate} allows {self.limit:g} ({self.state})"
            f"{doubt}{cause}"
        )

    def __str__(self) -> str:
        return f"{self.target}/{self.precision}: {self.words}"


@dataclass(frozen=True)
class GateDoubt(Plain):
    """A limit that lies inside of its figure's interval: whether it holds cannot be told.

    Attributes:
        target: The target.
        precision: The precision.
        figure: What is limited, for people.
        gate: The configuration's key.
        limit: What it allows.
        value: What was found.
        why: Its interval, and with how many images or calls it cannot be told.
        fails: The run counts it as one that does not hold.
    """

    target: str
    precision: str
    figure: str
    gate: str
    limit: float
    value: float
    why: str
    fails: bool

    @property
    def words(self) -> str:
        """What cannot be told, without the artifact's name."""
        return f"{self.figure} is {self.value:.4g}, {self.gate} allows {self.limit:g}; {self.why}"

    def __str__(self) -> str:
        return f"{self.target}/{self.precision}: {self.words}"


@dataclass(frozen=True)
class GateReport(Plain):
    """What became of the limits of the configuration.

    Attributes:
        limits: How many are set, over all artifacts.
        judged: How many had a figure to judge.
        failures: Those that do not hold.
        doubts: Those of which that cannot be told for sure, whether they count as failures or not.
    """

    limits: int = 0
    judged: int = 0
    failures: tuple[GateFailure, ...] = ()
    doubts: tuple[GateDoubt, ...] = ()


@dataclass(frozen=True)
class Choice(Plain):
    """Which precision of one target to use.

    Attributes:
        precision: The one; None if none was built and passed the gates.
        why: By precision, what speaks for or against each of the others.
    """

    precision: str | None
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run(Plain):
    """All that a run knows.

    Attributes:
        format: Version of this format.
        name: The configuration's name.
        config: Path of the configuration.
        folder: Where the results lie.
        date: When it ended, as "YYYY-MM-DD hh:mm".
        exit_code: The exit code of the command.
        steps: How every selected step ended, in order.
        not_selected: Names of the configuration's other steps, in order.
        gates: What became of its limits.
        problems: What lies there and cannot be read, a line each.
        seals: Seal of every artifact that lies there, by name.
        machine: Where it ran.
        versions: Versions of packages, or "missing".
        export: The exported graph.
        simplified: The simplified graph.
        forms: Graphs in the forms that precisions need, by form.
        calibration: The calibration images.
        reference: PyTorch's accuracy.
        artifacts: What the configuration asks for, in the order of targets and precisions.
        bench: Measurements by target; None where there is none.
        choice: Which precision to use, by target.
        published: Published results of networks.
        cpu_classes: Artifacts as on CPUs of other classes, by target and class.
        class_failures: Limits that do not hold on such a class, by name of its part.
        resizes: What other ways of preparing images cost, where somebody asked.
    """

    format: int
    name: str
    config: str
    folder: str
    date: str
    exit_code: int
    steps: tuple[StepEnd, ...]
    not_selected: tuple[str, ...]
    gates: GateReport
    problems: tuple[str, ...]
    seals: Mapping[str, str]
    machine: Machine
    versions: Mapping[str, str]
    export: Part[ExportFacts] | None
    simplified: Part[SimplifyFacts] | None
    forms: Mapping[str, Part[FormFacts]]
    calibration: Part[CalibrationFacts] | None
    reference: Part[ReferenceFacts] | None
    artifacts: tuple[BuiltArtifact, ...]
    bench: Mapping[str, Part[BenchFacts] | None]
    choice: Mapping[str, Choice]
    published: tuple[Published, ...]
    cpu_classes: tuple[Part[ClassFacts], ...] = ()
    class_failures: Mapping[str, tuple[GateFailure, ...]] = field(default_factory=dict)
    resizes: tuple[Part[ResizesFacts], ...] = ()

    @property
    def network(self) -> Network | None:
        """The network, as its export states it."""
        return self.export.facts.network if self.export else None

    @property
    def published_of_it(self) -> tuple[Published, ...]:
        """Published rows of this very network, with as many classes; none for any other."""
        network = self.network
        if network is None or len(network.labels) != IMAGENET_CLASSES:
            return ()
        name = network.description.get("model", "").removeprefix("timm/")
        return tuple(row for row in self.published if row.model == name)

    @property
    def pytorch(self) -> Accuracy:
        """PyTorch's accuracy, or why there is none."""
        if self.reference is None:
            return Accuracy.not_measured("not validated")
        return self.reference.facts.numbers

    def measured(self, target: str) -> Measured | None:
        """What was measured of a target on this machine."""
        bench = self.bench.get(target)
        return bench.facts.measured if bench else None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read results.json.

        Raises:
            ArtifactError: It is not there, of another format, or damaged; the message says where.
        """
        values = read_values(path)
        try:
            return cls.from_dict(values, str(path))
        except ArtifactError as error:
            raise ArtifactError(f"{error}: {_AGAIN}") from error


def read_values(path: Path) -> dict[str, Any]:
    """What results.json holds, as plain values: sealed and of this format, and not looked at else.

    Raises:
        ArtifactError: See `Run.read`.
    """
    try:
        values, seal = unsealed_results(read_regular(path, MOST_BYTES), str(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing: {_AGAIN}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{error}: {_AGAIN}") from error
    found = values.get("format")
    if found != FORMAT:
        raise ArtifactError(
            f"{path} has format {shown(found)}, this version reads {FORMAT}: {_AGAIN}, which "
            "keeps what is up to date"
        )
    if not seal:
        raise ArtifactError(f"{path} has lost its seal: {_AGAIN}")
    return values
