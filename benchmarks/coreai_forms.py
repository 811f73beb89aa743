"""Core AI assets of a network's published and inference form, judged by Apple's runtime on Linux.

    pip install 'care-deploy[coreai]'
    python benchmarks/coreai_forms.py care_s0 --images 1

Prints size, operations, and the relative error of the logits to PyTorch in float32, by Apple's
runtime and by the executor. Weights come from a formula. Apple's runtime takes 13 s for an image of
CARE-S0 on a core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from networks import fused, published_form

from pipeline.core import figures
from pipeline.core.network import Images, Logits, Network
from pipeline.graphs.compare import random_images
from pipeline.targets.coreai import package as saved
from pipeline.targets.coreai.build import RECIPES
from pipeline.targets.coreai.convert import canonical, convert
from pipeline.targets.coreai.executor import Executor
from pipeline.targets.coreai.network import export
from pipeline.targets.coreai.quiet import logged
from pipeline.targets.coreai.runtime import Runtime

if TYPE_CHECKING:
    from torch import nn

FORMS = (
    ("published", "fp32"),
    ("published", "fp16"),
    ("inference", "fp32"),
    ("inference", "fp16"),
    ("inference", "int8"),
)


def logits_of(module: nn.Module, images: Images) -> Logits:
    """Of PyTorch, in float32."""
    import torch

    with torch.inference_mode():
        found: Logits = module(torch.from_numpy(images)).numpy()
    return found


def save(module: nn.Module, network: Network, precision: str, package: Path) -> None:
    """Build an asset without judging it."""
    recipe = RECIPES[precision]
    with logged():
        program = convert(export(module, network, half=recipe.half), network)
        program = recipe.compress(program, 2048)
        saved.save(canonical(program), network, precision, package)


def error(run: Callable[[Images], Logits], images: Images, expected: Logits) -> str:
    """Relative error, or that it is not finite."""
    found = figures.compare(run(images), expected)
    return f"{found.relative_error:.2g}" if found.finite else "NaN"


def row(module: nn.Module, form: str, precision: str, images: Images, expected: Logits) -> str:
    """One line of the table."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    network = Network(form, tuple(map(str, range(expected.shape[1]))), shape, {})
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, saved.MODEL)
        save(module, network, precision, package)
        program = saved.check(package, network)
        runtime = Runtime(package)
        apple = error(runtime, images, expected)
        runtime.close()
        emulated = error(Executor(program), images, expected)
        cells = [form, precision, f"{saved.size(package) / 1e6:.2f}", program.counts().total()]
        return " | ".join(map(str, [*cells, apple, emulated]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", help="its name in timm, such as care_s0")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    published = published_form(arguments.network, "formula")
    images = np.asarray(random_images(arguments.images, (3, arguments.size, arguments.size)))
    expected = logits_of(published, images)
    forms = {"published": published, "inference": fused(published)}
    print("form | precision | MB | operations | error by Apple's runtime | by the executor")
    for form, precision in FORMS:
        print(row(forms[form], form, precision, images, expected), flush=True)


if __name__ == "__main__":
    main()
