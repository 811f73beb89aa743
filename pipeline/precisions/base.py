"""What a precision is: one form of the ONNX graph, made from the float32 graph.

Runtimes without precision flags (TensorRT 11, TensorRT-RTX) and with them alike take the precision
from the graph: its types and its quantize/dequantize pairs. A new precision is one module here with
a `Form`, registered in `pipeline.precisions`. Targets name the form that they build from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.targets.base import Images, Network


@dataclass(frozen=True)
class CalibrationSet:
    """Images from the training split, for ranges and for decisions about precision.

    Attributes:
        images: Preprocessed images, (images, channels, height, width).
        labels: Their classes, (images,).
        hashes: SHA-256 of every source image, in the same order.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class FormJob:
    """What a form needs to make its graph.

    Attributes:
        source: The float32 ONNX graph (simplified), one input and one output, float32 both.
        network: Labels, shape and preprocessing.
        options: Settings of the form, from the configuration.
        calibration: Reads the calibration set; costs time, so only forms that need it call it.
        log: Takes a line for the log file.
    """

    source: Path
    network: Network
    options: Mapping[str, Any]
    calibration: Callable[[], CalibrationSet]
    log: Callable[[str], None]


class Form(ABC):
    """One form of the graph.

    Attributes:
        name: Its name in folders, such as "float16".
        calibrated: The result depends on the calibration set.
        code: Modules of this project, beside the form's own, that decide the result.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    code: ClassVar[tuple[str, ...]] = ()

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
