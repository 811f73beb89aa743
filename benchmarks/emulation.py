"""CPU time of an emulated image, beside PyTorch in float32: the executors as `validate` runs them.

    OMP_NUM_THREADS=1 python benchmarks/emulation.py engines/care_tiny [--images 512] [--rounds 3]

Takes the graphs and the Core ML package of a run of `pipeline.yaml`, and random pixels: how long an
image takes does not depend on what it shows. CPU seconds, not wall time, so that other work on the
machine disturbs less; the candidates take turns and the least of each counts. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from care.factory import create_pretrained
from care.fuse import fuse
from pipeline.core import machine
from pipeline.core.memory import freed_memory_kept
from pipeline.core.network import Batch, in_batches
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.onnx.executor import OnnxExecutor

BATCH = 64
"""That of `validation.batch`."""

GRAPHS = {"fp16": "precision/float16", "int8": "precision/int8-trt", "fp32": "precision/float32"}
"""Where a run keeps the graphs of what is emulated."""

Run = Callable[[Batch], Any]


def cpu_seconds() -> float:
    """CPU seconds of this process so far, those of the system for it included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def by_torch(module: nn.Module) -> Run:
    """Runs a module in eager mode."""

    def run(images: Batch) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


def candidates(folder: Path, pixels: Batch) -> dict[str, tuple[Run, Batch]]:
    """What is timed, and what each takes."""
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 255 - 0.5
    network = create_pretrained("care_tiny").eval()
    found: dict[str, tuple[Run, Batch]] = {
        "PyTorch float32": (by_torch(network), images),
        "PyTorch float32, fused": (by_torch(fuse(network).eval()), images),
    }
    for name, place in GRAPHS.items():
        graph = folder / place / "model.onnx"
        found[f"{name}, ranges recorded"] = OnnxExecutor(graph, record=True).run_all, images
        found[name] = OnnxExecutor(graph).run_all, images
    package = MilExecutor(folder / "coreml/fp16/model.mlpackage")
    found["Core ML fp16"] = (lambda batch: package.predict(batch)["logits"]), pixels
    return found


def measure(found: Mapping[str, tuple[Run, Batch]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of an image by each candidate, the least of some rounds."""
    least = dict.fromkeys(found, float("inf"))
    with freed_memory_kept():
        for number in range(rounds + 1):
            for name, (run, batch) in found.items():
                start = cpu_seconds()
                in_batches(run, batch, BATCH)
                spent = 1e3 * (cpu_seconds() - start) / len(batch)
                if number:  # the first round warms up
                    least[name] = min(least[name], spent)
    return {name: round(spent, 3) for name, spent in least.items()}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", default=512, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(folder: Path, images: int, rounds: int) -> None:
    """Time the executors on the artifacts of a run."""
    shape = (images, 64, 64, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    figures = measure(candidates(folder, pixels), rounds)
    for name, spent in figures.items():
        click.echo(f"{name:24} {spent:6.3f} ms  {1e3 / spent:6.0f} images per CPU second")
    here = {**machine.describe(), "load": machine.load(), "threads": torch.get_num_threads()}
    click.echo(json.dumps({"cpu_ms": figures, "here": here}))


if __name__ == "__main__":
    main()
