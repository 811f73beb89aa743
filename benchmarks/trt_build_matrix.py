"""Builds every network in every precision for every compute capability and writes the table.

    python benchmarks/trt_build_matrix.py [--networks care_s0 …] [--docs docs/targets.md]

Needs no GPU. Weights come from the networks' own initialization and calibration images are noise:
neither changes what is built. The table goes between the two marker lines of the document, and one
line of JSON to the screen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.artifact import write_atomically
from pipeline.errors import PipelineError
from pipeline.precisions import FORMS
from pipeline.precisions.base import CalibrationSet, FormJob
from pipeline.targets.base import Network
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt.build import EngineJob, build_engine
from pipeline.targets.tensorrt.limits import FORMS as PRECISIONS
from pipeline.targets.tensorrt.limits import ComputeCapability, check_capabilities

NETWORKS = ("care_s0", "care_s1", "care_s2", "mlla_t")
BEGIN, END = "<!-- build matrix -->", "<!-- end of build matrix -->"
TARGETS: tuple[tuple[str, ...], ...] = (
    *((capability,) for capability in get_args(ComputeCapability)),
    ("8.6", "8.9", "12.0"),
)


@dataclass(frozen=True)
class Cell:
    """One engine, or why there is none."""

    network: str
    precision: str
    capabilities: tuple[str, ...]
    size: int | None
    seconds: float | None
    why_not: str


def export(name: str, path: Path) -> None:
    """Write the fused network as a float32 ONNX graph with a dynamic batch."""
    import timm
    import torch

    import care  # noqa: F401  registers the networks
    from care.fuse import fuse

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    module = model if name == "mlla_t" else fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, 224, 224),),
            dynamo=True,
            opset_version=20,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.save(path)


def convert(source: Path, form: str, path: Path) -> None:
    """Write the graph in a form; 8-bit forms are calibrated on noise."""
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)

    def calibration() -> CalibrationSet:
        return CalibrationSet(images, np.zeros(len(images), np.int64), ("noise",) * len(images))

    network = Network(source.stem, (), (3, 224, 224), {})
    options = {"method": "min-max", "max_top1_drop": 1.0}
    FORMS[form].convert(FormJob(source, network, options, calibration, lambda line: None), path)


def build(network: str, precision: str, capabilities: tuple[str, ...], graph: Path) -> Cell:
    """Build one engine, past the target's own check: the library itself shall refuse."""
    library = api.load(api.RTX)
    job = EngineJob(graph, precision == "tf32", capabilities, (1, 8, 64), None, None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            facts = build_engine(library, job, Path(folder), lambda line: None)
        except PipelineError as error:
            return Cell(network, precision, capabilities, None, None, refusal(error, job))
    return Cell(network, precision, capabilities, facts["engine_bytes"], facts["build_seconds"], "")


def refusal(error: PipelineError, job: EngineJob) -> str:
    """The library's own words, short."""
    text = str(error)
    found = re.search(r"(FP32 GEMM is not supported|HW-specific datatypes: \w+)", text)
    return found.group(1) if found else text.replace(str(job.graph), job.graph.name)


def matrix(networks: list[str], folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """All engines."""
    for network in networks:
        source = folder / f"{network}.onnx"
        say(f"exporting {network}")
        export(network, source)
        graphs: dict[str, Path] = {}
        for precision, form in PRECISIONS.items():
            if form not in graphs:
                graphs[form] = folder / f"{network}.{form}.onnx"
                say(f"  making {form}")
                convert(source, form, graphs[form])
            for capabilities in TARGETS:
                cell = build(network, precision, capabilities, graphs[form])
                say(f"  {precision} {' '.join(capabilities)}: {describe(cell)}")
                yield cell


def describe(cell: Cell) -> str:
    """Size and time, or "no"."""
    if cell.size is None or cell.seconds is None:
        return "no"
    return f"{cell.size / 1e6:.1f} MB, {cell.seconds:.1f} s"


def table(cells: list[Cell]) -> str:
    """The cells as Markdown: a row for each network and precision."""
    heads = [" ".join(target) for target in TARGETS]
    lines = [
        f"| network | precision | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        rows.setdefault((cell.network, cell.precision), []).append(describe(cell))
    lines += [f"| {n} | {p} | {' | '.join(row)} |" for (n, p), row in rows.items()]
    reasons = {
        f"- {cell.precision} for {', '.join(cell.capabilities)}: {cell.why_not}"
        for cell in cells
        if cell.why_not
    }
    return "\n".join([*lines, "", "What the library says where it has none:", ""]) + (
        "\n".join(["", *sorted(reasons)])
    )


def unexpected(cells: list[Cell]) -> list[str]:
    """Combinations where the library and the target's own check disagree."""
    found = []
    for cell in cells:
        try:
            check_capabilities(cell.precision, cell.capabilities)
            allowed = True
        except PipelineError:
            allowed = False
        if allowed != (cell.size is not None):
            found.append(f"{cell.network} {cell.precision} {' '.join(cell.capabilities)}")
    return found


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


def write(document: Path, text: str) -> None:
    """Put the table between the document's marker lines, or at its end."""
    old = document.read_text() if document.exists() else "# Targets\n"
    part = f"{BEGIN}\n{text}\n{END}"
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    new = pattern.sub(lambda _: part, old) if BEGIN in old else f"{old.rstrip()}\n\n{part}\n"
    write_atomically(document, new)


def main() -> None:
    """Build, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--docs", type=Path, help="document that gets the table")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        cells = list(matrix(arguments.networks, Path(folder), lambda s: print(s, flush=True)))
    text = table(cells)
    head = (
        f"TensorRT-RTX {before['tensorrt_rtx']} on {before['cpus']} CPUs without a GPU (load "
        f"average {before['load']:g} to {machine()['load']:g} from other work). Size of the engine "
        "and seconds from graph to engine, by compute capability; batches 1 to 64.\n\n"
    )
    print(text)
    if arguments.docs:
        write(arguments.docs, head + text)
    print(
        json.dumps(
            {"machine": before, "surprises": unexpected(cells), "cells": [asdict(c) for c in cells]}
        )
    )


if __name__ == "__main__":
    main()
