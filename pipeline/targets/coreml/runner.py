"""Running Core ML packages: by Core ML on a Mac, or by the ML Program executor anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import figures
from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.network import Logits, Network, Pixels
from pipeline.core.runner import Numerics, Runner
from pipeline.core.threads import batches_for
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.convert import COMPUTE_UNITS
from pipeline.targets.coreml.network import preprocess_of

if TYPE_CHECKING:
    from pipeline.emulate.mil.executor import MilExecutor

_PROBABILITY_ERROR = 5e-3
"""float16 keeps 11 bits of a probability, and Core ML's exponential is an approximation."""

_COMPARED_IMAGES = 32


def check_probabilities(logits: Logits, probabilities: Logits, package: Path) -> None:
    """Check that a package's probabilities are the softmax of its logits, (batch, classes) both.

    Raises:
        ArtifactError: They are not, as in a package without a softmax.
    """
    usable = np.isfinite(logits).all(1)
    powers = np.exp(logits[usable] - logits[usable].max(1, keepdims=True, initial=-np.inf))
    error = np.abs(probabilities[usable] - powers / powers.sum(1, keepdims=True)).max(initial=0)
    if not error <= _PROBABILITY_ERROR:
        raise ArtifactError(
            f"{package}: its probabilities are no softmax of its logits (they differ by up to "
            f"{error:.3g}): the conversion is damaged, build it again"
        )


class PackageRunner(Runner):
    """Runs a Core ML package, which takes pixels and normalizes them itself.

    Args:
        package: The package's folder.
        network: Its labels and preprocessing.

    Raises:
        ConfigError: See `preprocess_of`.
    """

    takes = "pixels"

    def __init__(self, package: Path, network: Network) -> None:
        self._package, self._network, self._labels = package, network, network.labels
        self._channels = preprocess_of(network).depth

    def _check(self, pixels: Pixels) -> None:
        """Raise InputError if these are no pixels of the package's number of channels."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != self._channels:
            raise InputError(
                f"the package takes uint8 pixels of shape (batch, height, width, {self._channels}),"
                f" not {pixels.dtype} of shape {pixels.shape}: it normalizes them itself"
            )


class EmulatedRunner(PackageRunner):
    """A package evaluated by the ML Program executor on the CPU.

    Args:
        package: The package's folder.
        network: Its preprocessing.
    """

    def __init__(self, package: Path, network: Network) -> None:
        from pipeline.emulate.mil.executor import MilExecutor

        super().__init__(package, network)
        self._executor: MilExecutor | None = MilExecutor(package)
        # What the program means without rounding, and where float16 is short of range.
        self._exact = MilExecutor(package, precision="float32", record=True)
        self._compared: list[tuple[Logits, Logits]] = []
        self._seen = 0
        self.divides = batches_for(math.prod(network.input_shape))
        self.device = "ML Program executor on the CPU, results rounded to float16 where typed so"

    def __call__(self, pixels: Pixels) -> Logits:
        """Logits of pixels, (batch, height, width, channels)."""
        if self._executor is None:
            raise InputError("the runner is closed: open the artifact again")
        self._check(pixels)
        logits = answer(self._executor, pixels, self._package)
        count = _COMPARED_IMAGES - self._seen
        self._seen += len(pixels)
        if count > 0:
            exact = answer(self._exact, pixels[:count], self._package)
            self._compared.append((exact, logits[:count]))
        return logits

    def narrow_sums(self) -> Runner | None:
        """See `Runner`."""
        if self._executor is None or not self._executor.holds_float16:
            return None
        return _NarrowRunner(self._package, self._network)

    def numerics(self) -> Numerics | None:
        """How far rounding moved the logits, and the range of the network's values."""
        if not self._compared:
            return None
        exact, rounded = (np.concatenate(part) for part in zip(*self._compared, strict=True))
        difference = figures.compare(rounded, exact)
        ranges = [entry for entry in self._exact.ranges() if entry.largest > 0]
        widest = max(ranges, key=lambda entry: entry.largest)
        half = self._exact.program.in_float16()
        narrow = [entry for entry in ranges if entry.name in half]
        overflowed = [entry for entry in narrow if entry.overflows]
        least = min((entry.headroom for entry in narrow), default=None)
        return Numerics(
            overflowed_values=sum(entry.overflows for entry in overflowed),
            overflowed_tensors=tuple(f"{e.name} ({e.operation})" for e in overflowed[:10]),
            more={
                "images": len(exact),
                "float16_relative_error": difference.relative_error,
                "float16_flips": difference.flips,
                "subnormals": sum(entry.subnormals for entry in narrow),
                "vanished": sum(entry.vanished for entry in narrow),
                "largest_value": widest.largest,
                "largest_value_at": f"{widest.name} ({widest.operation})",
                **({} if least is None else {"headroom": least}),
            },
        )

    def noted(self) -> Any:
        """See `Runner`."""
        return {
            "compared": [[part.tolist() for part in pair] for pair in self._compared],
            "ranges": [asdict(entry) for entry in self._exact.ranges()],
        }

    def go_on(self, images: int, noted: Any) -> None:
        """See `Runner`."""
        from pipeline.emulate.mil.record import TensorRange

        ranges = [TensorRange(**entry) for entry in noted["ranges"]]
        pairs = [[np.array(part, np.float32) for part in pair] for pair in noted["compared"]]
        self._compared = [(exact, rounded) for exact, rounded in pairs]
        self._exact.go_on(ranges)
        self._seen = images

    def begin(self, images: int) -> None:
        """See `Runner`."""
        self.go_on(images, {"compared": [], "ranges": []})

    def joined(self, noted: Sequence[Any]) -> Any:
        """See `Runner`."""
        from pipeline.emulate.mil.record import TensorRange, joined

        ranges = [[TensorRange(**entry) for entry in part["ranges"]] for part in noted]
        return {
            "compared": [pair for part in noted for pair in part["compared"]],
            "ranges": [asdict(entry) for entry in joined(ranges)],
        }

    def close(self) -> None:
        """Let go of the package."""
        self._executor = None


class _NarrowRunner(PackageRunner):
    """A package whose sums of products are rounded to float16 on the way."""

    def __init__(self, package: Path, network: Network) -> None:
        from pipeline.emulate.mil.executor import MilExecutor

        super().__init__(package, network)
        self._executor = MilExecutor(package, accumulate="float16")
        self.divides = batches_for(math.prod(network.input_shape))
        self.device = "ML Program executor on the CPU, sums of products in float16"

    def __call__(self, pixels: Pixels) -> Logits:
        """Logits of pixels, (batch, height, width, channels)."""
        self._check(pixels)
        return answer(self._executor, pixels, self._package)


def answer(executor: MilExecutor, pixels: Pixels, package: Path) -> Logits:
    """Logits of pixels by an executor, with the probabilities checked against them."""
    answers = executor.predict(pixels)
    if saved.LOGITS not in answers or saved.LABEL_PROBABILITIES not in answers:
        raise ArtifactError(f"{package} is no classifier with logits: build it again")
    logits: Logits = answers[saved.LOGITS]
    check_probabilities(logits, answers[saved.LABEL_PROBABILITIES], package)
    return logits


class CoreMLRunner(PackageRunner):
    """A package run by Core ML, on a Mac.

    Args:
        package: The package's folder.
        network: Its labels and preprocessing.
        compute_units: One of `COMPUTE_UNITS`.

    Raises:
        ArtifactError: Core ML does not load the package.
    """

    def __init__(self, package: Path, network: Network, compute_units: str) -> None:
        import platform

        import coremltools as ct

        super().__init__(package, network)
        units = getattr(ct.ComputeUnit, COMPUTE_UNITS[compute_units])
        try:
            self._model: Any = ct.models.MLModel(str(package), compute_units=units)
        # coremltools hands on Core ML's own refusal as a bare exception.
        except Exception as error:
            raise ArtifactError(f"Core ML does not load {package}: {error}") from error
        self.device = (
            f"Core ML, macOS {platform.mac_ver()[0]}, {platform.machine()}, "
            f"{compute_units.replace('_', ' ')}"
        )

    def __call__(self, pixels: Pixels) -> Logits:
        """Logits of pixels, (batch, height, width, channels)."""
        if self._model is None:
            raise InputError("the runner is closed: open the artifact again")
        self._check(pixels)
        # Several images go to Core ML in one call, which batches them as it sees fit.
        inputs = [{saved.IMAGE: _picture(image)} for image in pixels]
        answers = [self._model.predict(inputs[0])] if len(inputs) == 1 else self._predict(inputs)
        logits = np.concatenate([a[saved.LOGITS].reshape(1, -1) for a in answers])
        probabilities = np.array(
            [[a[saved.LABEL_PROBABILITIES][label] for label in self._labels] for a in answers]
        )
        check_probabilities(logits, probabilities, self._package)
        return logits.astype(np.float32)

    def _predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self._model.predict(inputs)
        return answers

    def close(self) -> None:
        """Let go of the package."""
        self._model = None


def _picture(pixels: Pixels) -> Any:
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
