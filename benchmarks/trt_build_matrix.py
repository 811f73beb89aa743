"""Builds every network in every precision for every compute capability and writes the table.

    python benchmarks/trt_build_matrix.py [--networks care_s0 …] [--docs docs/targets.md]

Needs no GPU. Engines are built as the pipeline builds them, each in a process of its own, and the
time is that of the whole. Weights are the networks' initialization and calibration images are
noise: neither changes what can be built. Where TensorRT-RTX refuses, its words stand beside ours.
The table goes between the two marker lines of the document, and one line of JSON to the screen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
from documents import fill
from networks import NETWORKS, SHAPE, inference_form, write_graph

from calibration.sample import CalibrationSet
from pipeline.core.errors import BuildError, PipelineError
from pipeline.core.network import Network
from pipeline.targets.forms import FormJob
from pipeline.targets.registry import TARGETS, form_of
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt.build import EngineJob
from pipeline.targets.tensorrt.limits import FORMS as PRECISIONS
from pipeline.targets.tensorrt.limits import ComputeCapability, why_not
from pipeline.targets.tensorrt.process import build_apart

CAPABILITIES: tuple[str, ...] = get_args(ComputeCapability)
BATCHES = (1, 8, 64)
TOGETHER = "all that can, in one"


@dataclass(frozen=True)
class Cell:
    """One engine, or why there is none.

    Attributes:
        network: Name of the network.
        precision: The precision.
        capabilities: What it is built for.
        size: Bytes of the engine; None if there is none.
        seconds: From the graph to the engine, or to the refusal.
        refusal: The library's own words.
    """

    network: str
    precision: str
    capabilities: tuple[str, ...]
    size: int | None
    seconds: float
    refusal: str


def convert(source: Path, precision: str, path: Path) -> None:
    """Write the graph as a precision needs it: 8 bits calibrated on noise, in all blocks."""
    images = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)

    def calibration() -> CalibrationSet:
        return CalibrationSet(images, np.zeros(len(images), np.int64), ("noise",) * len(images))

    network = Network(source.stem, (), SHAPE, {})
    options = {"method": "min-max", "max_top1_drop": 1.0}
    job = FormJob(source, network, options, calibration, lambda line: None)
    form = form_of(TARGETS["trt"], precision)
    assert form is not None
    facts = form.convert(job, path)
    if excluded := facts.get("sensitivity", {}).get("excluded"):
        raise BuildError(f"{source.stem} leaves {form.name}: {', '.join(excluded)} stay in float16")


def build(network: str, precision: str, capabilities: tuple[str, ...], graph: Path) -> Cell:
    """Build one engine, past the target's own check: the library itself shall refuse."""
    job = EngineJob(graph, precision == "tf32", capabilities, BATCHES, None, None)
    size, refusal = None, ""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            size = build_apart(job, Path(folder), lambda line: None)["engine_bytes"]
        except PipelineError as error:
            refusal = shortened(error, graph)
    return Cell(network, precision, capabilities, size, time.perf_counter() - start, refusal)


def shortened(error: PipelineError, graph: Path) -> str:
    """The library's own words, without what differs from build to build."""
    text = str(error)
    found = re.search(r"(FP32 GEMM is not supported|HW-specific datatypes: \w+)", text)
    return found.group(1) if found else text.replace(str(graph), graph.name)


def together(precision: str) -> tuple[str, ...]:
    """All compute capabilities that have the precision."""
    return tuple(c for c in CAPABILITIES if why_not(precision, c) is None)


def matrix(networks: list[str], folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """All engines."""
    for network in networks:
        graphs = {"": folder / f"{network}.onnx"}
        say(f"exporting {network}")
        write_graph(inference_form(network), graphs[""])
        for precision, form in PRECISIONS.items():
            if form not in graphs:
                graphs[form] = folder / f"{network}.{form}.onnx"
                say(f"  making {form}")
                convert(graphs[""], precision, graphs[form])
            for capabilities in (*((c,) for c in CAPABILITIES), together(precision)):
                cell = build(network, precision, capabilities, graphs[form])
                say(f"  {precision} {' '.join(capabilities)}: {describe(cell)}")
                yield cell


def describe(cell: Cell) -> str:
    """Size and time, or "no"."""
    if cell.size is None:
        return "no"
    return f"{cell.size / 1e6:.1f} MB, {cell.seconds:.1f} s"


def table(cells: Sequence[Cell]) -> str:
    """The cells as Markdown: a row for each network and precision, then what was refused."""
    heads = [*CAPABILITIES, TOGETHER]
    lines = [
        f"| network | precision | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        rows.setdefault((cell.network, cell.precision), []).append(describe(cell))
    lines += [f"| {n} | {p} | {' | '.join(row)} |" for (n, p), row in rows.items()]
    refused = [f"- {line}" for line in reasons(cells)]
    return "\n".join([*lines, "", "Where there is none, and what TensorRT-RTX says:", "", *refused])


def reasons(cells: Sequence[Cell]) -> list[str]:
    """Why there are no engines, each reason once: ours, and the library's words."""
    grouped: dict[tuple[str, str, str], dict[str, None]] = {}
    for cell in (c for c in cells if c.size is None):
        for capability in cell.capabilities:
            ours = why_not(cell.precision, capability) or "not known to this project"
            key = (cell.precision, ours, cell.refusal)
            grouped.setdefault(key, {})[capability] = None
    return [
        f'{precision} on {", ".join(capabilities)}: {ours} ("{theirs}")'
        for (precision, ours, theirs), capabilities in grouped.items()
    ]


def unexpected(cells: Sequence[Cell]) -> list[str]:
    """Combinations where the library and the target's own check disagree."""
    return [
        f"{cell.network} {cell.precision} {' '.join(cell.capabilities)}"
        for cell in cells
        if (cell.size is None) != any(why_not(cell.precision, c) for c in cell.capabilities)
    ]


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "tensorrt_rtx": api.installed(api.RTX),
        "torch": metadata.version("torch"),
        "onnx": metadata.version("onnx"),
    }


def main() -> int:
    """Build, print, write; 1 where the library refuses what the target does not, or the reverse."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--docs", type=Path, help="document that gets the table")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        cells = list(matrix(arguments.networks, Path(folder), lambda s: print(s, flush=True)))
    text = table(cells)
    slowest = max(cells, key=lambda cell: cell.seconds)
    head = (
        f"TensorRT-RTX {before['tensorrt_rtx']} on {before['cpus']} CPUs without a GPU (load "
        f"average {before['load']:g} at the beginning, {machine()['load']:g} at the end; a build "
        "by itself makes 1). Size of the engine and seconds from the graph to the engine, process "
        f"start included; batches {', '.join(map(str, BATCHES))}. The slowest took "
        f"{slowest.seconds:.1f} s.\n\n"
    )
    print(text)
    if arguments.docs:
        fill(arguments.docs, "build matrix", head + text)
    surprises = unexpected(cells)
    print(
        json.dumps({"machine": before, "surprises": surprises, "cells": [asdict(c) for c in cells]})
    )
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
