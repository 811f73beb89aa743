"""Which weights can do with how many bits: the smallest package within a limit on accuracy.

1. Each weight tensor is stored in each way alone, and the executor says how far the logits move.
2. A price is put on that error; at each price every tensor takes its cheapest way. A falling price
   gives a sequence of mixes, from nearly all float16 to all 4 bits.
3. Each mix is evaluated as a whole. The smallest within the limit is built.

Accuracy is judged by agreement with float32: the share of images whose class changes is never less
than the loss of top-1, so that the limit holds without labels.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.kept import Kept
from calibration.sensitivity import Outcome
from pipeline.core import figures
from pipeline.core.errors import BuildError
from pipeline.core.files import digest_of, file_hash
from pipeline.core.network import Logits, Pixels
from pipeline.steps.facts.graphs import TriedCompression
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.compress import INT8, PALETTE4, PALETTE6, Scheme, Weight, simulate
from pipeline.targets.coreml.runner import answer

SCHEMES = (INT8, PALETTE6, PALETTE4)
_MIXES = 12
_EVALUATIONS = 4096
"""Images that are evaluated for the sensitivities, over all tensors: bounds the time they take."""


@dataclass(frozen=True)
class Mix:
    """A way to store each weight tensor.

    Attributes:
        schemes: By the tensor's name; those in float16 are missing.
        size: Bytes of the package, estimated.
        changed: Share of images whose class changes; what top-1 can fall at most.
    """

    schemes: Mapping[str, Scheme]
    size: int
    changed: float


class WeightFile:
    """The weights of a float16 package, and copies of the package with other numbers in them.

    Args:
        package: A saved package.
        threshold: Tensors with at most so many values are left out.
    """

    def __init__(self, package: Path, threshold: int) -> None:
        self.package = package
        self._places = {
            name: place
            for name, place in weight_places(package).items()
            if math.prod(place.shape) > threshold
        }
        data = (package / saved.WEIGHTS / "weight.bin").read_bytes()
        self.tensors: dict[str, Weight] = {
            name: np.frombuffer(data, np.float16, math.prod(p.shape), p.offset).reshape(p.shape)
            for name, p in self._places.items()
        }

    def replaced(self, tensors: Mapping[str, Weight], copy: Path) -> Path:
        """Write a copy of the package in which some tensors have other values."""
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.package, copy)
        with (copy / saved.WEIGHTS / "weight.bin").open("r+b") as stream:
            for name, values in tensors.items():
                stream.seek(self._places[name].offset)
                stream.write(np.ascontiguousarray(values, np.float16).tobytes())
        return copy


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the weight file: the offset of its first byte, and its shape."""

    offset: int
    shape: tuple[int, ...]


def weight_places(package: Path) -> dict[str, Place]:
    """Where the float16 weights of convolutions and linear layers lie, by their name."""
    import coremltools

    specification = coremltools.proto.Model_pb2.Model()
    specification.ParseFromString((package / saved.SPECIFICATION).read_bytes())
    function = specification.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    used = {
        operation.inputs["weight"].arguments[0].name
        for operation in operations
        if operation.type in ("conv", "linear")
    }
    data = (package / saved.WEIGHTS / "weight.bin").read_bytes()
    half = coremltools.proto.MIL_pb2.DataType.FLOAT16
    places = {}
    for operation in operations:
        if operation.type != "const" or operation.outputs[0].name not in used:
            continue
        value, kind = operation.attributes["val"], operation.outputs[0].type.tensorType
        if value.WhichOneof("value") == "blobFileValue" and kind.dataType == half:
            record = value.blobFileValue.offset
            # A record of 64 bytes: sentinel and type (4 bytes each), size, start (8 bytes each).
            start = int.from_bytes(data[record + 16 : record + 24], "little")
            shape = tuple(dimension.constant.size for dimension in kind.dimensions)
            places[operation.outputs[0].name] = Place(start, shape)
    return places


class Search:
    """Finds the mix of schemes; see the module's description.

    Args:
        package: The float16 package, a classifier of ours.
        pixels: Calibration images, (images, height, width, channels).
        reference: PyTorch's float32 logits of them, (images, classes).
        threshold: Tensors with at most so many values stay in float16.
        workspace: A folder for packages that are made to be evaluated.
        kept: Remembers evaluations, so that a search that was killed goes on.
    """

    def __init__(
        self,
        package: Path,
        pixels: Pixels,
        reference: Logits,
        threshold: int,
        workspace: Path,
        kept: Kept | None = None,
    ) -> None:
        self._weights = WeightFile(package, threshold)
        self._pixels, self._reference = pixels, reference
        self._trial = workspace / "trial.mlpackage"
        self._size = saved.size(package)
        self._errors: dict[tuple[str, Scheme], float] = {}
        self._kept = kept or Kept()
        self._digest = file_hash(package / saved.WEIGHTS / "weight.bin")
        if not self._weights.tensors:
            raise BuildError(
                f"auto: no weight has more than {threshold} values: lower weight_threshold"
            )
        self._simulated = {
            (name, scheme): simulate(weight, scheme)
            for name, weight in self._weights.tensors.items()
            for scheme in SCHEMES
        }

    def run(self, max_changed: float, max_size: float | None) -> tuple[Mix, list[Mix]]:
        """Search.

        Args:
            max_changed: Largest share of images whose class may change.
            max_size: Largest size in bytes.

        Returns:
            The best mix and all that were evaluated, from the largest to the smallest.

        Raises:
            BuildError: No mix is within the limits; the message says how close they come.
        """
        self._errors = self.sensitivities()
        mixes = [self._evaluated(schemes) for schemes in self._mixes(self._errors)]
        mixes = [self._evaluated({}), *mixes]
        mixes.sort(key=lambda mix: -mix.size)
        fitting = [mix for mix in mixes if mix.changed <= max_changed]
        if not fitting:
            best = min(mix.changed for mix in mixes)
            raise BuildError(
                f"auto: even the best mix changes the class of {best:.2%} of the images, the limit "
                f"max_top1_drop is {max_changed:.2%}: raise it"
            )
        smallest = min(fitting, key=lambda mix: mix.size)
        if max_size is not None and smallest.size > max_size:
            raise BuildError(
                f"auto: within max_top1_drop {max_changed:.2%} the package has "
                f"{smallest.size / 1e6:.2f} MB, the limit max_size_mb is {max_size / 1e6:.2f}: "
                "raise one of them"
            )
        return smallest, mixes

    def sensitivities(self) -> dict[tuple[str, Scheme], float]:
        """Mean squared error of the logits when one tensor alone is stored in one way."""
        pixels = self._pixels[: min(24, max(4, _EVALUATIONS // len(self._simulated)))]
        # Its logits are needed only where something is evaluated anew.
        unchanged = functools.cache(lambda: self._logits({}, pixels))
        return {
            (name, scheme): self._moved(name, scheme, pixels, unchanged)
            for name, scheme in self._simulated
        }

    def _moved(
        self, name: str, scheme: Scheme, pixels: Pixels, unchanged: Callable[[], Logits]
    ) -> float:
        """Mean squared error of the logits with one tensor stored in one way."""

        def evaluate() -> Outcome:
            logits = self._logits({name: self._simulated[name, scheme]}, pixels)
            before = unchanged()
            moved = float(np.mean((logits - before) ** 2, dtype=np.float64))
            same = float((logits.argmax(1) == before.argmax(1)).mean())
            return Outcome(same, same, moved)

        return self._kept.outcome(self._key({name: scheme}, len(pixels)), evaluate).logit_error

    def _key(self, schemes: Mapping[str, Scheme], images: int) -> str:
        """By what an evaluation is kept: the weights, how they are stored, and how many images."""
        stored = {name: scheme.name for name, scheme in schemes.items()}
        return digest_of({"weights": self._digest, "stored": stored, "images": images})

    def weights(self, best: Mix) -> list[dict[str, Any]]:
        """For each weight tensor how far storing it alone moved the logits, and what was chosen.

        Args:
            best: What `run` found.

        Returns:
            Rows for JSON, the most sensitive first. Errors are relative to the size of the logits.
        """
        size = float(np.mean(self._reference**2, dtype=np.float64)) or 1.0
        rows = [
            {
                "tensor": name,
                "numbers": weight.size,
                **{s.name: math.sqrt(self._errors[name, s] / size) for s in SCHEMES},
                "chosen": best.schemes[name].name if name in best.schemes else "float16",
            }
            for name, weight in self._weights.tensors.items()
        ]
        return sorted(rows, key=lambda row: -row[SCHEMES[0].name])

    def _mixes(self, errors: Mapping[tuple[str, Scheme], float]) -> list[dict[str, Scheme]]:
        """The best mix at each of a falling sequence of prices of an error, each mix once."""
        # The prices at which a tensor's choice between two ways changes, over all tensors.
        prices = sorted(
            {
                (weight.nbytes - scheme.bytes(weight)) / error
                for name, weight in self._weights.tensors.items()
                for scheme in SCHEMES
                if (error := errors[name, scheme]) > 0
            },
            reverse=True,
        )
        picked = [prices[i] for i in np.linspace(0, len(prices) - 1, _MIXES).round().astype(int)]
        mixes: list[dict[str, Scheme]] = []
        for price in [*picked, 0.0]:
            mix = {}
            for name, weight in self._weights.tensors.items():
                costs: dict[Scheme | None, float] = {None: float(weight.nbytes)}
                for scheme in SCHEMES:
                    costs[scheme] = scheme.bytes(weight) + price * errors[name, scheme]
                if (best := min(costs, key=lambda key: costs[key])) is not None:
                    mix[name] = best
            if mix and mix not in mixes:
                mixes.append(mix)
        return mixes

    def _evaluated(self, schemes: Mapping[str, Scheme]) -> Mix:
        def evaluate() -> Outcome:
            values = {name: self._simulated[name, scheme] for name, scheme in schemes.items()}
            found = figures.compare(self._logits(values, self._pixels), self._reference)
            return Outcome(found.agreement, found.agreement, found.relative_error)

        # All images against PyTorch, where a single tensor is held against the package itself.
        key = f"mix-{self._key(schemes, len(self._pixels))}"
        found = self._kept.outcome(key, evaluate)
        tensors = self._weights.tensors
        saved_bytes = sum(tensors[n].nbytes - s.bytes(tensors[n]) for n, s in schemes.items())
        return Mix(schemes, self._size - saved_bytes, 1 - found.agreement)

    def _logits(self, values: Mapping[str, Weight], pixels: Pixels) -> Logits:
        from pipeline.emulate.mil.executor import MilExecutor

        trial = self._weights.replaced(values, self._trial)
        return answer(MilExecutor(trial), pixels, trial)


def tried(mix: Mix) -> TriedCompression:
    """A mix for the report: how many tensors are stored in which way."""
    kinds = [scheme.name for scheme in mix.schemes.values()]
    tensors = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return TriedCompression(mix.size, mix.changed, tensors)
