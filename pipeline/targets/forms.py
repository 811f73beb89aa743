"""What a precision is: one form of the ONNX graph, made from the float32 graph.

Runtimes without precision flags (TensorRT 11, TensorRT-RTX) and with them alike take the precision
from the graph: its types and its quantize/dequantize pairs. The forms that serve any runtime are in
`pipeline.targets.floats`; one that belongs to a single runtime lives in that target's package and
is named in its `Target.forms`. Targets name the form that each precision builds from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.core.network import Images, Network

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration.observe import Statistics
    from calibration.sample import CalibrationSet


class Look(Protocol):
    """Observes the tensors of a graph."""

    def __call__(
        self, model: Path | ModelProto, images: Images, tensors: Sequence[str] | None = None
    ) -> dict[str, Statistics]:
        """See `calibration.observe.observe`."""


def look(
    model: Path | ModelProto, images: Images, tensors: Sequence[str] | None = None
) -> dict[str, Statistics]:
    """Observe the tensors of a graph in one pass."""
    from calibration.observe import observe

    return observe(model, images, tensors)


@dataclass(frozen=True)
class FormJob:
    """What a form needs to make its graph.

    Attributes:
        source: The float32 ONNX graph (simplified), one input and one output, float32 both.
        network: Labels, shape and preprocessing.
        options: Settings of the form, from the configuration.
        calibration: Reads the calibration set; costs time, so only forms that need it call it.
        log: Takes a line for the log file.
        batch: Fixed batch size that models are built for, or None for a dynamic one. The source
            may take any batch all the same.
        evaluations: Where a search writes down what it evaluated, so that it goes on there after a
            kill; None to keep nothing.
        look: Observes the graph: at once, or in shards that others have seen.
    """

    source: Path
    network: Network
    options: Mapping[str, Any]
    calibration: Callable[[], CalibrationSet]
    log: Callable[[str], None]
    batch: int | None = None
    evaluations: Path | None = None
    look: Look = look


class Form(ABC):
    """One form of the graph.

    Attributes:
        name: Its name in folders, such as "float16".
        calibrated: The result depends on the calibration set.
        timed: The form is chosen by measuring on the machine that makes it: the result belongs to
            that class of machines, see `pipeline.core.machine.cpu_class`.
        mends_first: What it raises it raises before it quantizes; what its search leaves out of 8
            bits comes beside that.
        observes: `convert` begins by looking at what `observed` says, by `FormJob.look`.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    mends_first: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that decide the result, without importing them."""

    @abstractmethod
    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the graph in this form to `destination` and return the facts about it.

        Inputs and outputs stay float32.

        Raises:
            BuildError: The graph has no such form.
        """

    def observed(self, source: Path) -> tuple[Path | ModelProto, Sequence[str]]:
        """What `convert` looks at first, of a form that `observes`: a graph, and tensors of it.

        Args:
            source: See `FormJob`.

        Raises:
            BuildError: The graph has no such form.
        """
        raise NotImplementedError(f"{self.name} observes no graph")
