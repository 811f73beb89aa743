"""How each precision of the Core AI target is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.targets.base import BuildJob
from pipeline.targets.coreai import package as saved
from pipeline.targets.coreai.convert import canonical, convert
from pipeline.targets.coreai.fitness import fitness
from pipeline.targets.coreai.network import export
from pipeline.targets.coreai.options import CoreAIOptions
from pipeline.targets.coreai.quantize import Compress, int8, palette
from pipeline.targets.coreai.quiet import logged
from pipeline.targets.coreai.runner import FLOAT16, FLOAT32
from pipeline.targets.coreai.verify import Limits, verify


def _as_it_is(program: Any, threshold: int) -> Any:
    return program


@dataclass(frozen=True)
class Recipe:
    """How a precision is made.

    Attributes:
        half: Stores and computes in float16.
        limits: How close an asset has to be to its module, and to Apple's runtime.
        compress: Makes the weights smaller.
    """

    half: bool
    limits: Limits
    compress: Compress = _as_it_is


_COMPRESSED = Limits(None, None, False, FLOAT16)
RECIPES: dict[str, Recipe] = {
    # Usual are 0.0005 and 0.002; of networks before their training 0.01 and 0.025 were seen.
    "fp16": Recipe(True, Limits(2e-2, 5e-2, True, FLOAT16)),
    "fp32": Recipe(False, Limits(1e-4, 1e-4, False, FLOAT32)),
    "int8": Recipe(True, _COMPRESSED, int8),
    "palette8": Recipe(True, _COMPRESSED, palette(8)),
    "palette6": Recipe(True, _COMPRESSED, palette(6)),
    "palette4": Recipe(True, _COMPRESSED, palette(4)),
}


def build(job: BuildJob, package: Path, recipe: Recipe) -> dict[str, Any]:
    """Export, convert, compress, save and verify; see `Target.build`."""
    options, network = job.options, job.network
    assert isinstance(options, CoreAIOptions)
    with logged(job.log):
        program = convert(export(job.module(), network, half=recipe.half), network)
        program = recipe.compress(program, options.weight_threshold)
        saved.save(canonical(program), network, job.precision, package)
    written = saved.check(package, network)
    return {
        "runtime_images": options.runtime_images,
        "compute_unit": options.compute_unit,
        "weight_threshold": options.weight_threshold,
        "size": saved.size(package),
        "digest": saved.digest(package),
        "operations": dict(sorted(written.counts().items())),
        "fitness": [finding.to_dict() for finding in fitness(written)],
        "network": network.to_dict(),
        "verified": _verified(job, package, recipe.limits),
    }


def _verified(job: BuildJob, package: Path, limits: Limits) -> dict[str, Any]:
    """What the comparison with the module found; an operation that is not emulated is said."""
    try:
        return verify(package, job.module(), job.network, limits)
    except UnsupportedOperatorError as error:
        return {"not_emulated": str(error)}
