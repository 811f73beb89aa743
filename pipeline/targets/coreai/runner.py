"""The two ways to run an asset: Apple's runtime, or the executor with the runtime as its judge."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core import figures
from pipeline.core.balanced import balanced
from pipeline.core.errors import InputError, UnsupportedOperatorError
from pipeline.core.network import Images, Logits, Network
from pipeline.core.runner import Numerics, Runner
from pipeline.targets.coreai.package import check
from pipeline.targets.coreai.runtime import Runtime

if TYPE_CHECKING:
    from pipeline.targets.coreai.executor import Executor

APPLE = f"Apple's Core AI runtime on {platform.system()}"
EXECUTOR = "Core AI program executor on the CPU, results rounded to float16 where typed so"
_LARGEST_FLOAT16 = 65504.0

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bound:
    """How far the emulation may be from Apple's runtime on the same images.

    Attributes:
        relative: Largest relative difference of the logits, Euclidean.
        flips: Largest share of images with another class that this difference does not explain,
            see `unexplained`.
    """

    relative: float
    flips: float


FLOAT32 = Bound(1e-4, 0.0)
# Usual is 0.002, and 0.008 was seen: the runtime rounds inside of its convolutions, too.
FLOAT16 = Bound(2e-2, 0.02)


def unexplained(logits: Logits, reference: Logits, relative: float) -> int:
    """Number of images whose class changes by more than an allowed error of the logits may change.

    Be `a` the class of the reference and `b` that of the logits. What `a` leads by in the one and
    `b` in the other, together, is the change of the difference of these two logits. An error of
    norm e changes the difference of two logits by sqrt(2) e at most: (1, -1) has the norm sqrt(2).

    Args:
        logits: (images, classes), finite.
        reference: Likewise.
        relative: Largest error of an image's logits, relative to the norm of its reference.
    """
    rows = np.arange(len(logits))
    left, right = logits.astype(np.float64), reference.astype(np.float64)
    named, expected = left.argmax(1), right.argmax(1)
    leads = left[rows, named] - left[rows, expected] + right[rows, expected] - right[rows, named]
    allowed = np.sqrt(2) * relative * np.linalg.norm(right, axis=1)
    return int((leads > allowed).sum())


class AppleRunner(Runner):
    """An asset run by Apple's runtime, image by image.

    Args:
        package: The asset's folder.
        network: What it has to be.
        compute_unit: See `runtime.UNITS`.

    Raises:
        ArtifactError: The asset is damaged or foreign, or the runtime does not load it.
    """

    def __init__(self, package: Path, network: Network, compute_unit: str = "default") -> None:
        check(package, network)
        self._runtime: Runtime | None = Runtime(package, compute_unit)
        self.device = f"{APPLE}, {platform.machine()}, {compute_unit.replace('_', ' ')}"

    def __call__(self, images: Images) -> Logits:
        """See `Runner`."""
        if self._runtime is None:
            raise InputError("the runner is closed: open the artifact again")
        return self._runtime(images)

    def close(self) -> None:
        """See `Runner`."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None


class JudgedRunner(Runner):
    """An asset evaluated by the executor, and on some of the images by Apple's runtime as well.

    Args:
        package: The asset's folder.
        network: What it has to be.
        images: How many images Apple's runtime judges.
        bound: How far the executor may be from it.

    Raises:
        ArtifactError: The asset is damaged or foreign, or the runtime does not load it.
        UnsupportedOperatorError: The executor does not know an operation.
    """

    def __init__(self, package: Path, network: Network, images: int, bound: Bound) -> None:
        from pipeline.targets.coreai.executor import Executor

        program = check(package, network)
        self._executor: Executor | None = Executor(program)
        self._exact = Executor(program, half=False, record=True)
        self._runtime = Runtime(package)
        self._bound, self._count = bound, images
        self._chosen: npt.NDArray[np.int64] = np.arange(images)
        self._labels: Labels | None = None
        self._seen = 0
        self._judged: list[tuple[Logits, Logits, Logits]] = []
        self.device = EXECUTOR

    def expect(self, labels: Labels) -> None:
        """See `Runner`: which images are judged is chosen by their classes."""
        self._labels, self._chosen = labels, balanced(labels, self._count)

    def __call__(self, images: Images) -> Logits:
        """See `Runner`."""
        if self._executor is None:
            raise InputError("the runner is closed: open the artifact again")
        logits = self._executor(images)
        places = self._chosen[np.searchsorted(self._chosen, self._seen) :] - self._seen
        places = places[places < len(images)]
        if len(places):
            some = images[places]
            self._judged.append((logits[places], self._runtime(some), self._exact(some)))
        self._seen += len(images)
        return logits

    def numerics(self) -> Numerics | None:
        """What Apple's runtime found on the images that it judged, beside the executor.

        Raises:
            UnsupportedOperatorError: The two differ by more than the bound: the executor's figures
                count for nothing.
        """
        if not self._judged:
            return None
        emulated, apple, exact = (np.concatenate(part) for part in zip(*self._judged, strict=True))
        self._check(emulated, apple)
        found = figures.compare(emulated, apple)
        self.device = (
            f"{EXECUTOR}; {APPLE} gives the same class for {len(apple) - found.flips} of "
            f"{len(apple)} images (relative difference {found.relative_error:.1e}, "
            f"limit {self._bound.relative:g})"
        )
        largest = self._exact.largest()
        over = [name for name, value in largest.items() if not value <= _LARGEST_FLOAT16]
        rounded = figures.compare(apple, exact)
        return Numerics(
            overflowed_tensors=tuple(name.rpartition(" ")[0] for name in over[:10]),
            more={
                "images": len(apple),
                "float16_relative_error": rounded.relative_error,
                "float16_flips": rounded.flips,
                "largest_value": max(largest.values(), default=0.0),
                f"{APPLE}, {len(apple)} images": [
                    self._row("measured", APPLE, apple, apple),
                    self._row("emulated", "executor", emulated, apple),
                ],
            },
        )

    def noted(self) -> Any:
        """See `Runner`."""
        return {
            "judged": [[part.tolist() for part in parts] for parts in self._judged],
            "largest": dict(self._exact.largest()),
        }

    def go_on(self, images: int, noted: Any) -> None:
        """See `Runner`."""
        largest = {str(name): float(value) for name, value in noted["largest"].items()}
        judged = [[np.array(part, np.float32) for part in parts] for parts in noted["judged"]]
        self._judged = [(emulated, apple, exact) for emulated, apple, exact in judged]
        self._exact.go_on(largest)
        self._seen = images

    def begin(self, images: int) -> None:
        """See `Runner`."""
        self.go_on(images, {"judged": [], "largest": {}})

    def joined(self, noted: Sequence[Any]) -> Any:
        """See `Runner`."""
        from pipeline.targets.coreai.executor import larger

        largest: dict[str, float] = {}
        for part in noted:
            for name, value in part["largest"].items():
                largest[name] = larger(largest.get(name, -1.0), value)
        judged = [parts for part in noted for parts in part["judged"]]
        return {"judged": judged, "largest": largest}

    def _check(self, emulated: Logits, apple: Logits) -> None:
        finite = np.isfinite(apple).all(1)
        if not np.array_equal(finite, np.isfinite(emulated).all(1)):
            raise UnsupportedOperatorError(
                f"{APPLE} gives NaN or infinity for {(~finite).sum()} of {len(apple)} images, and "
                "the executor for others"
            )
        if not finite.any():
            return
        found, images = figures.compare(emulated[finite], apple[finite]), int(finite.sum())
        beyond = unexplained(emulated[finite], apple[finite], self._bound.relative)
        allowed = self._bound.flips * images
        if found.relative_error > self._bound.relative or beyond > allowed:
            raise UnsupportedOperatorError(
                f"{APPLE} was run on {images} images ({self._top1(apple)}), and the executor "
                f"differs from it by {found.relative_error:.2g} of the logits' size (limit "
                f"{self._bound.relative:g}) and in the class of {found.flips} of them, {beyond} by "
                f"a lead that such a difference cannot turn (limit {allowed:.1f})"
            )

    def _top1(self, logits: Logits) -> str:
        share = self._share(logits)
        return "no labels are known" if share is None else f"top-1 {share:.2%}"

    def _share(self, logits: Logits) -> float | None:
        if self._labels is None:
            return None
        labels = self._labels[self._chosen[: len(logits)]]
        return figures.top_k(logits, labels) / len(labels)

    def _row(self, state: str, by: str, logits: Logits, apple: Logits) -> dict[str, Any]:
        compared = figures.compare(logits, apple)
        row: dict[str, Any] = {"state": state, "by": by, "images": len(logits)}
        share = self._share(logits)
        if share is not None:
            row["top1"] = share
            low, high = figures.wilson(round(share * len(logits)), len(logits))
            row["interval"] = f"{low:.4f} … {high:.4f}"
        row["flips"] = compared.flips
        row["relative_difference"] = compared.relative_error
        return row

    def close(self) -> None:
        """See `Runner`."""
        self._executor = None
        self._runtime.close()
