"""How each precision of the Core ML target is made, and how close it has to be.

The target names its precisions by this module: what converts is imported where it is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.targets.base import BuildJob
from pipeline.targets.coreml.compress import INT8, PALETTE4, PALETTE6, Scheme, apply, apply_mixed

if TYPE_CHECKING:
    from pipeline.targets.coreml.network import Deployed
    from pipeline.targets.coreml.options import CoreMLOptions

Facts = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Largest relative errors of logits, Euclidean.

    Attributes:
        exact: Of the program without rounding; None for packages whose weights were changed.
        rounded: With every result rounded to its type; None likewise.
        half_weights: The package's weights are in float16. Where these alone move the module's
            logits further, as in a network whose large values cancel, twice that is the limit, up
            to `verify.MOST_FOR_WEIGHTS`: an error that comes near to the logits' own size is an
            error, whatever the network.
    """

    exact: float | None
    rounded: float | None
    half_weights: bool = False


FLOAT32 = Limits(1e-4, 1e-4)
# Usual are 0.001 and 0.002. Where features vary as little as the epsilon of a LayerNorm, as in a
# network before its training, weights and epsilon in float16 alone come to a percent.
FLOAT16 = Limits(2e-2, 5e-2, half_weights=True)
COMPRESSED = Limits(None, None)


@dataclass(frozen=True)
class Recipe:
    """How a precision is made.

    Attributes:
        float32: Operations in float32, given those that the options name; None for all.
        limits: How close a package has to be to its module.
        deployment_target: The oldest that has what it needs.
        deploy: Exports the network, and says what it did.
        compress: Makes the weights smaller, and says what it did.
        calibrated: Needs calibration images.
        schemes: How all weights are stored, one after the other; none where that is not all.
    """

    float32: Callable[[Collection[str]], Collection[str] | None]
    limits: Limits
    deployment_target: str
    deploy: Callable[[BuildJob], tuple[Deployed, Facts]]
    compress: Callable[[Any, BuildJob], tuple[Any, Facts]]
    calibrated: bool
    schemes: tuple[Scheme, ...]


def _options(job: BuildJob) -> CoreMLOptions:
    from pipeline.targets.coreml.options import CoreMLOptions

    assert isinstance(job.options, CoreMLOptions)
    return job.options


def _plain(job: BuildJob) -> tuple[Deployed, Facts]:
    from pipeline.targets.coreml.network import deploy

    return deploy(job.module(), job.network), {}


def _quantized(job: BuildJob) -> tuple[Deployed, Facts]:
    from pipeline.targets.coreml.network import deploy
    from pipeline.targets.coreml.quantize import with_quantized_inputs

    images = job.calibration(_options(job).calibration_images).images
    module, scales = with_quantized_inputs(job.module(), images)
    return deploy(module, job.network), {
        "calibration_images": len(images),
        "activation_scales": scales,
    }


def _as_it_is(model: Any, job: BuildJob) -> tuple[Any, Facts]:
    return model, {}


def _stored(*schemes: Scheme) -> Callable[[Any, BuildJob], tuple[Any, Facts]]:
    """Apply schemes one after the other; those after the first keep what was pruned."""

    def compress(model: Any, job: BuildJob) -> tuple[Any, Facts]:
        threshold = _options(job).weight_threshold
        for position, scheme in enumerate(schemes):
            model = apply(model, scheme, threshold, joint=position > 0)
        return model, {"weight_threshold": threshold}

    return compress


def _searched(model: Any, job: BuildJob) -> tuple[Any, Facts]:
    import torch

    from calibration.kept import Kept
    from pipeline.targets.coreml.convert import finish
    from pipeline.targets.coreml.search import Search, tried

    options = _options(job)
    pictures = job.calibration(options.calibration_images)
    with torch.inference_mode():
        reference = job.module()(torch.from_numpy(pictures.images)).numpy()
    limit = None if options.max_size_mb is None else 1e6 * options.max_size_mb
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "float16.mlpackage")
        finish(model, job.network, package, "fp16")
        search = Search(
            package,
            pictures.pixels,
            reference,
            options.weight_threshold,
            Path(folder),
            Kept(job.evaluations),
        )
        best, mixes = search.run(options.max_top1_drop, limit)
    return apply_mixed(model, best.schemes), {
        "calibration_images": len(pictures),
        "chosen": tried(best).to_dict(),
        "curve": [tried(mix).to_dict() for mix in mixes],
        "weights": search.weights(best),
    }


def _recipe(
    *schemes: Scheme,
    float32: Callable[[Collection[str]], Collection[str] | None] = lambda named: (),
    limits: Limits = COMPRESSED,
    deployment_target: str = "iOS16",
    deploy: Callable[[BuildJob], tuple[Deployed, Facts]] = _plain,
    compress: Callable[[Any, BuildJob], tuple[Any, Facts]] | None = None,
    calibrated: bool = False,
) -> Recipe:
    compress = compress or (_stored(*schemes) if schemes else _as_it_is)
    return Recipe(float32, limits, deployment_target, deploy, compress, calibrated, schemes)


_HALF, _THREE_QUARTERS = Scheme("pruned", sparsity=0.5), Scheme("pruned", sparsity=0.75)

RECIPES: dict[str, Recipe] = {
    "fp32": _recipe(float32=lambda named: None, limits=FLOAT32),
    "fp16": _recipe(limits=FLOAT16),
    "mixed": _recipe(float32=lambda named: named, limits=FLOAT16),
    "int8": _recipe(INT8),
    "palette6": _recipe(PALETTE6),
    "palette4": _recipe(PALETTE4),
    "pruned50": _recipe(_HALF),
    "pruned75": _recipe(_THREE_QUARTERS),
    "pruned50_int8": _recipe(_HALF, INT8, deployment_target="iOS18"),
    "pruned50_palette6": _recipe(_HALF, PALETTE6, deployment_target="iOS18"),
    "w8a8": _recipe(INT8, deployment_target="iOS17", deploy=_quantized, calibrated=True),
    "auto": _recipe(compress=_searched, calibrated=True),
}
