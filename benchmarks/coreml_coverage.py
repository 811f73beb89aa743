"""Which operations of Core ML programs networks need, and that the executor evaluates all of them.

    python benchmarks/coreml_coverage.py [--networks care_s0 …] [--docs docs/targets.md]

Converts every network for every deployment target and compares the executor, without rounding, with
PyTorch; stores the weights in every way that coremltools has off a Mac, and compares the executor
with itself on what coremltools' own `decompress_weights` makes of the package. Images are small:
sizes change no operation. Weights come from a formula. The tables go between the two marker lines
of the document.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from documents import fill
from networks import fused, with_formula
from torch import nn

import care.networks  # noqa: F401  registers the networks
from pipeline.core.network import Network
from pipeline.core.preprocess import Preprocess
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.targets.coreml.compress import INT8, PALETTE4, PALETTE6, Scheme, apply
from pipeline.targets.coreml.convert import convert, finish
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.options import DEPLOYMENT_TARGETS
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.coreml.verify import probes

NETWORKS = ("care_s0", "mlla_t", "mobilenetv4_conv_small", "fastvit_t8")
SIZE, CLASSES, IMAGES = 64, 10, 4
PREPROCESS = Preprocess(SIZE, 1.0, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

HALF = Scheme("pruned", sparsity=0.5)
STORED: dict[str, tuple[str, tuple[Scheme, ...]]] = {
    "8 bits": ("iOS16", (INT8,)),
    "8 bits, iOS 18": ("iOS18", (INT8,)),
    "palette of 6 bits": ("iOS16", (PALETTE6,)),
    "palette of 4 bits, iOS 18": ("iOS18", (PALETTE4,)),
    "half pruned": ("iOS16", (HALF,)),
    "half pruned, iOS 18": ("iOS18", (HALF,)),
    "half pruned and 8 bits": ("iOS18", (HALF, INT8)),
    "half pruned and a palette": ("iOS18", (HALF, PALETTE6)),
}
"""Ways to store weights: the deployment target, and what is applied."""


@dataclass
class Found:
    """What there is to say of one network.

    Attributes:
        operations: How often each occurs, constants aside, by deployment target.
        errors: Relative error of the logits against PyTorch by deployment target; a refusal's
            words where there is no package.
        stored: Largest difference to the decompressed package, relative, by way of storing.
        decompressions: Operations that hold stored weights.
    """

    operations: dict[str, Counter[str]] = field(default_factory=dict)
    errors: dict[str, float | str] = field(default_factory=dict)
    stored: dict[str, float] = field(default_factory=dict)
    decompressions: Counter[str] = field(default_factory=Counter)


def network(name: str) -> nn.Module:
    """The network, in its inference form where there is one, with weights from the formula."""
    extra = {"img_size": SIZE} if name == "mlla_t" else {}
    return fused(with_formula(timm.create_model(name, num_classes=CLASSES, **extra).eval()))


def look(name: str, folder: Path) -> Found:
    """Convert, store and compare one network."""
    of = Network(
        name,
        tuple(map(str, range(CLASSES))),
        (3, SIZE, SIZE),
        PREPROCESS.to_dict(),
    )
    module, found = network(name), Found()
    deployed, pictures = deploy(module, of), probes(of, IMAGES)
    with torch.inference_mode():
        expected = module(torch.from_numpy(pictures.images)).numpy()
    with logged(lambda line: None):
        models = {target: convert(deployed, of, target, ()) for target in DEPLOYMENT_TARGETS}
    for target, model in models.items():
        package = folder / f"{target}.mlpackage"
        finish(model, of, package, "fp16")
        executor = MilExecutor(package, precision="float32")
        found.operations[target] = executor.operations()
        found.errors[target] = _relative(executor.predict(pictures.pixels)["logits"], expected)
    for way, (target, schemes) in STORED.items():
        _store(way, models[target], schemes, of, folder, pictures.pixels, found)
    return found


def _store(
    way: str,
    model: Any,
    schemes: tuple[Scheme, ...],
    of: Network,
    folder: Path,
    pixels: Any,
    found: Found,
) -> None:
    import coremltools.optimize.coreml as cto

    with logged(lambda line: None):
        for position, scheme in enumerate(schemes):
            model = apply(model, scheme, 512, joint=position > 0)
        dense = cto.decompress_weights(model)
        logits = []
        for each, kind in ((model, "stored"), (dense, "dense")):
            package = folder / f"{kind}.mlpackage"
            finish(each, of, package, kind)
            executor = MilExecutor(package, precision="float32")
            logits.append(executor.predict(pixels)["logits"])
            if each is model:
                kinds = executor.operations()
                found.decompressions.update(
                    {k: n for k, n in kinds.items() if k.startswith("constexpr")}
                )
    found.stored[way] = _relative(*logits)


def _relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def tables(all_found: dict[str, Found]) -> Iterator[str]:
    """The tables as lines of Markdown."""
    names = list(all_found)
    yield "Operations of each network, classifier included; every one is evaluated.\n"
    yield "| operation | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    kinds = sorted({k for f in all_found.values() for c in f.operations.values() for k in c})
    for kind in kinds:
        cells = [_counts([c[kind] for c in f.operations.values()]) for f in all_found.values()]
        yield f"| `{kind}` | " + " | ".join(cells) + " |"
    totals = [_counts([c.total() for c in f.operations.values()]) for f in all_found.values()]
    yield "| all | " + " | ".join(totals) + " |"
    yield "\nRelative error of the logits to PyTorch's, weights in float16, results not rounded:\n"
    yield "| deployment target | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for target in DEPLOYMENT_TARGETS:
        cells = [_written(f.errors[target]) for f in all_found.values()]
        yield f"| {target} | " + " | ".join(cells) + " |"
    yield "\nStored weights: relative difference to what coremltools' `decompress_weights` gives:\n"
    yield "| stored | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for way in STORED:
        cells = [_written(f.stored[way]) for f in all_found.values()]
        yield f"| {way} | " + " | ".join(cells) + " |"
    used = sorted({k for f in all_found.values() for k in f.decompressions})
    yield "\nThey are stored by " + ", ".join(f"`{kind}`" for kind in used) + "."


def _counts(numbers: list[int]) -> str:
    """One number, or those of iOS 16, 17 and 18 where they differ."""
    return str(numbers[0] or "") if len(set(numbers)) == 1 else " / ".join(map(str, numbers))


def _written(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.1e}" if error else "0"


def main() -> None:
    """Convert, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--docs", type=Path, help="document that gets the tables")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = look(name, Path(folder))
        print(f"{name}: done", flush=True)
    text = "\n".join(tables(found))
    print(text)
    if arguments.docs:
        fill(arguments.docs, "coreml coverage", text)


if __name__ == "__main__":
    main()
