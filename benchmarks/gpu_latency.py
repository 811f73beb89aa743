"""Latency on a CUDA GPU: the published way of measuring beside every faster way that is installed.

    python benchmarks/gpu_latency.py [--networks care_s0 …] [--batches 1 64] [--seconds 5]

The baseline is how the networks' latency was published: PyTorch, eager, float32, as defined. Beside
it run the same network in half precision and channels-last, its inference form compiled with CUDA
graphs, and engines of TensorRT and TensorRT-RTX. All run in turn (A B C A B C …), timed by the
GPU's events with inputs that lie on the GPU; ratios come with 95 % intervals. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from networks import NETWORKS, SHAPE, inference_form, published_form, write_graph

from pipeline.core.errors import PipelineError, UnavailableError
from pipeline.core.figures import Latency, ratio
from pipeline.targets.tensorrt import api, cuda, nvml
from pipeline.targets.tensorrt.build import ENGINE, EngineJob, build_engine
from pipeline.targets.tensorrt.device import Gpu, find_gpu
from pipeline.targets.tensorrt.runner import GpuRunner

if TYPE_CHECKING:
    import torch

BASELINE = "eager fp32"
CALLS, WARMUP = 10, 30

Timer = Callable[[int], list[float]]
"""Times so many calls; milliseconds of each."""


@dataclass(frozen=True)
class Way:
    """One way to run a network with one batch size.

    Attributes:
        name: What it is.
        time: Times calls.
    """

    name: str
    time: Timer


def torch_timer(run: Callable[[], object]) -> Timer:
    """Times calls by CUDA events, without waiting between them."""
    import torch

    def time(calls: int) -> list[float]:
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(calls)
        ]
        for begin, end in marks:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in marks]

    return time


def torch_ways(name: str, batch: int) -> list[Way]:
    """PyTorch: eager in three types, and compiled."""
    import torch

    ways = []
    for precision in (torch.float32, torch.float16, torch.bfloat16):
        label = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[precision]
        layout = torch.contiguous_format if label == "fp32" else torch.channels_last
        model = published_form(name, "initial").cuda().to(precision).to(memory_format=layout)
        images = _images(batch, precision, layout)
        words = "" if label == "fp32" else " channels-last"
        ways.append(Way(f"eager {label}{words}", torch_timer(_caller(model, images))))
    float16 = inference_form(name).cuda().to(torch.float16).to(memory_format=torch.channels_last)
    compiled = torch.compile(float16, mode="reduce-overhead")
    images = _images(batch, torch.float16, torch.channels_last)
    ways.append(Way("compiled fp16 inference form", torch_timer(_caller(compiled, images))))
    return ways


def _images(batch: int, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    import torch

    images = torch.randn(batch, *SHAPE, device="cuda")
    return images.to(dtype=dtype, memory_format=layout)


def _caller(model: Callable[[Any], Any], images: torch.Tensor) -> Callable[[], object]:
    import torch

    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def engine_ways(
    graphs: dict[str, Path], batch: int, gpu: Gpu, folder: Path, stack: ExitStack
) -> tuple[list[Way], list[str]]:
    """Engines by every TensorRT library that is there; and why some are missing."""
    ways: list[Way] = []
    missing: list[str] = []
    for library_name in (api.RTX, api.FULL):
        if api.installed(library_name) is None:
            missing.append(f"{library_name}: not installed ({api.INSTALL[library_name]})")
            continue
        library = api.load(library_name)
        for precision, graph in graphs.items():
            own = folder / f"{graph.stem}-{library_name}-{batch}"
            own.mkdir()
            try:
                runner = _engine(library, graph, batch, gpu, own)
            except PipelineError as error:
                missing.append(f"{library.title} {precision}: {error}")
                continue
            stack.callback(runner.close)
            timer = _engine_timer(runner, batch)
            ways.append(Way(f"{library.title} {precision}", timer))
    return ways, missing


def _engine(library: api.Library, graph: Path, batch: int, gpu: Gpu, folder: Path) -> GpuRunner:
    job = EngineJob(graph, False, (gpu.capability,), (batch, batch, batch), None, gpu)
    build_engine(library, job, folder, lambda line: None)
    path = folder / ENGINE
    return GpuRunner(library, path.read_bytes(), path, gpu, cache=folder / "cache")


def _engine_timer(runner: GpuRunner, batch: int) -> Timer:
    return lambda calls: runner.engine_times(batch, calls)


def graphs_of(name: str, folder: Path) -> dict[str, Path]:
    """The network's ONNX graph in float32 and float16."""
    from pipeline.graphs import float16

    paths = {"fp32": folder / f"{name}.fp32.onnx", "fp16": folder / f"{name}.fp16.onnx"}
    write_graph(inference_form(name), paths["fp32"])
    model, _ = float16.to_half(float16.read_graph(paths["fp32"]), float16.FLOAT16)
    float16.write_graph(model, paths["fp16"])
    return paths


def interleaved(ways: Sequence[Way], seconds: float) -> dict[str, list[float]]:
    """Time all ways in turn until each has run for about so long."""
    for way in ways:
        way.time(WARMUP)
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    while any(sum(samples) < 1e3 * seconds for samples in times.values()):
        for way in ways:
            times[way.name] += way.time(CALLS)
    return times


def compare(name: str, batch: int, gpu: Gpu, seconds: float, folder: Path) -> dict[str, Any]:
    """All ways of one network at one batch size."""
    with ExitStack() as stack:
        engines, missing = engine_ways(graphs_of(name, folder), batch, gpu, folder, stack)
        ways = [*torch_ways(name, batch), *engines]
        bus = cuda.bus_id()
        before = nvml.read(bus)
        times = interleaved(ways, seconds)
        after = nvml.read(bus)
    print(f"\n{name}, batch {batch}")
    print(f"{'way':42} {'p50 ms':>9} {'p99 ms':>9} {'images/s':>10}  ratio to {BASELINE}")
    rows = {}
    for way, samples in times.items():
        latency, against = Latency(tuple(samples)), ratio(samples, times[BASELINE])
        low, high = against.interval
        p99 = f"{latency.p99:9.3f}" if latency.p99 is not None else f"{'few':>9}"
        print(
            f"{way:42} {latency.p50:9.3f} {p99} {1e3 * batch / latency.p50:10.0f}  "
            f"{against.value:.3f} [{low:.3f}, {high:.3f}]"
        )
        rows[way] = {**latency.to_dict(), "ratio": against.value, "ratio_interval": [low, high]}
    for line in missing:
        print(f"not measured: {line}")
    if isinstance(after, str):
        print(f"sensors not read: {after}")
    elif after.throttled:
        print(f"the GPU throttled: {', '.join(after.throttled)}")
    return {
        "network": name,
        "batch": batch,
        "ways": rows,
        "missing": missing,
        "gpu_before": before if isinstance(before, str) else before.to_dict(),
        "gpu_after": after if isinstance(after, str) else after.to_dict(),
    }


def main() -> int:
    """Measure, print; 4 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, for each way")
    arguments = parser.parse_args()
    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"error: {gpu}", file=sys.stderr)
        return UnavailableError.exit_code
    import torch

    print(f"{gpu.name}, compute capability {gpu.capability}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        results = [
            compare(name, batch, gpu, arguments.seconds, Path(folder))
            for name in arguments.networks
            for batch in arguments.batches
        ]
    versions = {name: api.installed(name) for name in (api.RTX, api.FULL)}
    head = {"gpu": vars(gpu), "torch": torch.__version__, "cuda": torch.version.cuda, **versions}
    print(json.dumps({**head, "results": results}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
