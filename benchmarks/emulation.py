"""Time of an emulated image, beside PyTorch in float32: the executors as `validate` runs them.

    OMP_NUM_THREADS=1 python benchmarks/emulation.py engines/care_tiny
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python benchmarks/emulation.py engines/care_s0 \
        --network care_s0 --size 224 --images 64 --batch 8 --rounds 6

Takes the graphs and the Core ML package of a run, and random pixels, others each round: how long an
image takes does not depend on what it shows, but a batch that was seen before has no new largest
value. Before and after each candidate the fused module runs on the same images, in batches of
`--batch`; an executor is given all at once, as `validate` gives it 64, and takes parts of its own.
What is told is the time over the mean of these two, by wall clock and by CPU: median and quartiles
over the rounds. CPU milliseconds of an image are the least of all rounds. Preprocessing is not
timed. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from care.factory import create_model, create_pretrained
from care.fuse import fuse
from pipeline.core import machine
from pipeline.core.memory import freed_memory_kept
from pipeline.core.network import Batch
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.onnx.executor import OnnxExecutor

GRAPHS = {"fp16": "precision/float16", "int8": "precision/int8-trt", "fp32": "onnx"}
"""Where a run keeps the graphs of what is emulated."""

WARM_UP = 3
"""Rounds that are not counted: in the first ones nearly every tensor has a new largest value."""

Images = tuple[Batch, Batch]
"""The same as pixels, which the Core ML package takes, and preprocessed."""

Run = Callable[[Images], Any]
Spent = tuple[float, float]
"""Seconds by wall clock and of the CPU."""


def cpu_seconds() -> float:
    """CPU seconds of this process so far, those of the system for it included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(run: Run, images: Images) -> Spent:
    """What one call takes."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run(images)
    return time.perf_counter() - wall, cpu_seconds() - cpu


def by_torch(module: nn.Module, batch: int) -> Run:
    """Runs a module in eager mode, in batches."""

    def run(images: Images) -> Any:
        with torch.inference_mode():
            return [module(part).numpy() for part in torch.from_numpy(images[1]).split(batch)]

    return run


def prepared(pixels: Batch) -> Batch:
    """Pixels as the graphs take them."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 255 - 0.5


def by_graph(executor: OnnxExecutor) -> Run:
    """Runs a graph, as `validate` does."""
    return lambda images: executor.run_all(images[1])


def candidates(folder: Path, network: nn.Module, batch: int) -> dict[str, Run]:
    """What is timed beside the fused module."""
    found = {"PyTorch float32, published form": by_torch(network, batch)}
    for name, place in GRAPHS.items():
        graph = folder / place / "model.onnx"
        found[f"{name}, ranges recorded"] = by_graph(OnnxExecutor(graph, record=True))
        found[name] = by_graph(OnnxExecutor(graph))
    package = MilExecutor(folder / "coreml/fp16/model.mlpackage")
    found["Core ML fp16"] = lambda images: package.predict(images[0])["logits"]
    return found


def measure(
    found: Mapping[str, Run], fused: Run, shape: tuple[int, ...], rounds: int
) -> dict[str, dict[str, Any]]:
    """By candidate: time over the fused module's, and CPU milliseconds of an image."""
    draw = np.random.default_rng(0)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    least = dict.fromkeys(found, float("inf"))
    with freed_memory_kept():
        for number in range(WARM_UP + rounds):
            pixels = draw.integers(0, 256, shape, dtype=np.uint8)
            images = pixels, prepared(pixels)
            for name, run in found.items():
                before, spent, after = (timed(each, images) for each in (fused, run, fused))
                if number >= WARM_UP:
                    wall, cpu = (
                        2 * s / (b + a) for b, s, a in zip(before, spent, after, strict=True)
                    )
                    ratios[name].append((wall, cpu))
                    least[name] = min(least[name], 1e3 * spent[1] / shape[0])
    return {
        name: {
            "wall": quartiles([wall for wall, _ in seen]),
            "cpu": quartiles([cpu for _, cpu in seen]),
            "cpu_ms": round(least[name], 3),
        }
        for name, seen in ratios.items()
    }


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third."""
    return [round(float(value), 3) for value in np.quantile(values, (0.25, 0.5, 0.75))]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--network", default="care_tiny", show_default=True)
@click.option("--size", default=64, show_default=True, help="Height and width of the images.")
@click.option("--images", default=64, show_default=True, help="That are given at once.")
@click.option("--batch", default=64, show_default=True, help="Of the module.")
@click.option("--rounds", default=8, show_default=True)
@click.option(
    "--only", multiple=True, help="These candidates alone, such as 'fp16, ranges recorded'."
)
def main(
    folder: Path,
    network: str,
    size: int,
    images: int,
    batch: int,
    rounds: int,
    only: tuple[str, ...],
) -> None:
    """Time the executors on the artifacts of a run."""
    torch.manual_seed(0)
    make = create_pretrained if network == "care_tiny" else create_model
    module = make(network).eval()
    found = candidates(folder, module, batch)
    found = {name: run for name, run in found.items() if not only or name in only}
    fused = by_torch(fuse(module).eval(), batch)
    figures = measure(found, fused, (images, size, size, 3), rounds)
    for name, figure in figures.items():
        wall, cpu = (f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in (figure["wall"], figure["cpu"]))
        click.echo(f"{name:32} wall {wall}  cpu {cpu}  {figure['cpu_ms']:.3f} CPU ms an image")
    here = {**machine.describe(), "load": machine.load(), "threads": torch.get_num_threads()}
    click.echo(json.dumps({"to_fused": figures, "here": here}))


if __name__ == "__main__":
    main()
