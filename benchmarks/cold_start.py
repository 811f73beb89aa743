"""From the start of a process to the first logits, with nothing but onnxruntime and numpy.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --model care_s2 --rounds 30 --json cold.json

Every round starts one process for each file, in turn: our float32 artifact's file for this CPU, its
portable file, and the published path's graph. A process imports numpy and onnxruntime, opens the
model from disk (which the operating system has cached) with default settings, runs one image and
ends. The clock runs outside, from before the process is started until it says that the logits are
there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from cpu_latency import build_ours, export_graphs
from networks import NETWORKS, SHAPE

from pipeline.core import machine
from pipeline.core.figures import Latency, ratio

CHILD = f"""
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = numpy.zeros((1, *{SHAPE}), numpy.float32)
logits = session.run(None, {{session.get_inputs()[0].name: image}})[0]
print(logits.shape[1], flush=True)
"""
BASELINE = "published path"


def start(path: Path) -> float:
    """Milliseconds from the start of a process until its first logits."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = 1e3 * (time.perf_counter() - begin)
    if process.returncode or not line.strip():
        raise click.ClickException(f"a process with {path.name} ended with {process.returncode}")
    return taken


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--model", default="care_s0", show_default=True, type=click.Choice(NETWORKS))
@click.option("--rounds", default=30, show_default=True, type=click.IntRange(4))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
def main(model: str, rounds: int, json_path: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="cold-start-") as name:
        folder = Path(name)
        graphs = export_graphs(model, folder)
        built = build_ours(model, graphs["exact"], folder, int8=False)["fp32"]
        files = {BASELINE: graphs["published"], "ours, portable": built / "model.onnx"}
        blocked = built / "model.blocked.onnx"
        if blocked.exists():
            files["ours, for this CPU"] = blocked
        times: dict[str, list[float]] = {label: [] for label in files}
        for round_ in range(rounds + 2):
            for label, path in files.items():
                taken = start(path)
                # The first rounds read files and libraries into the cache.
                times[label] += [taken] if round_ >= 2 else []
    here = {**machine.describe(), "load": machine.load(), "date": time.strftime("%Y-%m-%d")}
    rows = []
    for label, samples in times.items():
        latency, compared = Latency(tuple(samples)), ratio(samples, times[BASELINE])
        low, high = compared.interval
        click.echo(
            f"{label:24}{latency.p50:8.0f} ms {compared.value:7.3f}  ({low:.3f} to {high:.3f})"
        )
        rows.append({"contender": label, "latency": latency.to_dict(), "ratio": compared.value})
    result = json.dumps({"model": model, "here": here, "rows": rows})
    if json_path is not None:
        json_path.write_text(result + "\n")
    click.echo(result)


if __name__ == "__main__":
    sys.exit(main())
