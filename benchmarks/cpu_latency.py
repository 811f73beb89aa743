"""Latency on this CPU: our ONNX Runtime builds beside what one would pick otherwise.

    python benchmarks/cpu_latency.py --quick
    python benchmarks/cpu_latency.py --json cpu.json --plot cpu.png
    python benchmarks/cpu_latency.py --model care_s0 --batch 1 --threads 2 --seconds 20
    python benchmarks/cpu_latency.py --docs docs/benchmarks.md
    python benchmarks/cpu_latency.py --as-cpu avx2-vnni --docs docs/benchmarks.md
    python benchmarks/cpu_latency.py --as-cpu avx2-vnni-alike --docs docs/benchmarks.md
    python benchmarks/cpu_latency.py --contended --docs docs/benchmarks.md

Every contender runs in a process of its own, with the settings that it has by default apart from
the number of threads, so that no thread pool disturbs another. They take turns (A B A B …): in a
turn a process runs once untimed and then a few times timed, while the others sleep. Ratios are
those of medians, to the published path, with 95 % bootstrap intervals. Weights are those of a
formula, with the spread of trained ones: a block that computes something else shows in the logits.
With an initialization it does not, since that all but switches the blocks off. ONNX Runtime takes
the same time for both; MNN takes longer for the formula, and for noise longer than for zeros.

Who computes in float32, without approximation, has to give the published path's logits: what
answers otherwise is not timed. With --contended there are turns of both kinds, alone and beside one
busy process for every two CPUs that are granted, and each contender is also compared with itself.

Contenders: ours (fp32, fp32 with GELU by tanh, int8), as they are opened by default, so that their
memory is moved to huge pages; the published path (the unfused module traced to opset 17, onnxsim, a
default session), and the same with its memory moved, to tell what that alone brings; PyTorch eager
and torch.compile; and if they are installed OpenVINO (fp32 on the published graph and on ours, bf16
on ours, int8 on our quantized graph), ncnn, ExecuTorch with XNNPACK and MNN (fp32 on what each
converts itself). "limit" is no contender: the time that the network's matrix products and depthwise
convolutions alone would take in float32 at the highest rate that a single large operator of that
kind reaches in ONNX Runtime here. "of limit" says how much of that rate a contender reaches; 8-bit
and 16-bit contenders can pass 100 %.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
from documents import fill
from networks import NETWORKS, SHAPE, fused, published_form, write_graph
from other_engines import ENGINES, Call, Images, convert, said, silence, why_not

from pipeline.core import cpu_classes, machine
from pipeline.core.contention import contended, rivals
from pipeline.core.cpu_classes import Purpose
from pipeline.core.errors import BuildError, PipelineError, UnavailableError
from pipeline.core.figures import Latency, measured_here, ratio
from pipeline.core.huge_pages import HugePages
from pipeline.core.machine import granted
from pipeline.graphs.compare import TOLERANCE, relative_difference
from pipeline.targets.ort.as_cpu import enter, reaches_every_library

BASELINE = "published path"
BY_TANH = "ours fp32, gelu tanh"
CALIBRATION_IMAGES = 8
CALLS = 3
PAUSE = 0.03
"""Seconds between turns: threads that still wait actively for work have gone to sleep by then."""

PLAYED = {
    **cpu_classes.CLASSES,
    "avx2-vnni-alike": replace(
        cpu_classes.named("avx2-vnni"), title="AVX2 + VNNI, cores alike", hybrid=False
    ),
}
"""Classes of CPUs to play: the product's, and an i9 whose efficient cores are switched off, for
which ONNX Runtime divides work between threads as on any other CPU."""

as_cpu_option = click.option(
    "--as-cpu", type=click.Choice(list(PLAYED)), help="As on a CPU of this class."
)

SPELLS = 2
"""How often both kinds of turns follow each other: alone, contended, alone, contended."""


@dataclass(frozen=True)
class Contender:
    """One way to run a network.

    Attributes:
        name: For people.
        kind: Which of the functions in `OPENERS` opens it.
        source: What it opens: a file, a folder or a network's name.
        options: Further arguments of that function.
        same: Whether it has to give the published path's logits.
        missing: Why it cannot take part, where that is known before it is opened.
    """

    name: str
    kind: str
    source: str
    options: Mapping[str, str]
    same: bool = True
    missing: str = ""


# Making the graphs.


def export_graphs(model: str, folder: Path) -> dict[str, Path]:
    """Export a network on the published path and on ours."""
    import torch

    paths = {"published": folder / "published.onnx", "exact": folder / "exact.onnx"}
    with quiet():
        torch.onnx.export(
            published_form(model, "formula"),
            (torch.randn(2, *SHAPE),),
            str(paths["published"]),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
        simplify(paths["published"])
        write_graph(fused(published_form(model, "formula")), paths["exact"])
    return paths


def simplify(path: Path) -> None:
    import onnx
    import onnxsim

    simplified, same = onnxsim.simplify(onnx.load(path))
    if not same:
        raise click.ClickException(f"onnxsim changed what {path.name} computes")
    onnx.save(simplified, path)


def build_ours(model: str, exact: Path, folder: Path, *, int8: bool) -> dict[str, Path]:
    """Our artifacts, in each precision, as they are built by default."""
    from calibration.sample import CalibrationSet
    from pipeline.core.network import Network
    from pipeline.targets.forms import FormJob
    from pipeline.targets.ort.quantize import Int8Ort

    network = Network(model, (), SHAPE, {})
    built = {"fp32": build_artifact(network, "fp32", exact, folder)}
    if int8:
        rng = np.random.default_rng(0)
        shape = (CALIBRATION_IMAGES, *SHAPE)
        images = rng.standard_normal(shape).astype(np.float32)
        labels = np.zeros(CALIBRATION_IMAGES, np.int64)
        quantized = folder / "quantized.onnx"
        # Only time counts here: no block is left in float32, and no GELU, as chance decides with so
        # few images.
        options = {"method": "min-max", "max_top1_drop": 1.0, "gelu": "sigmoid"}
        sample = CalibrationSet(images, labels, ("",) * len(images))
        job = FormJob(exact, network, options, lambda: sample, lambda line: None)
        Int8Ort().convert(job, quantized)
        built["int8"] = build_artifact(network, "int8", quantized, folder)
        built["quantized"] = quantized
    return built


def build_by_tanh(model: str, exact: Path, folder: Path) -> Contender:
    """Our float32 with the option `gelu: tanh`, which a network without GELU cannot have."""
    from pipeline.core.network import Network

    contender = Contender(BY_TANH, "ours", "", {}, same=False)
    try:
        made = build_artifact(Network(model, (), SHAPE, {}), "fp32", exact, folder, gelu="tanh")
    except BuildError as error:
        return replace(contender, missing=str(error))
    return replace(contender, source=str(made))


def build_artifact(network: Any, precision: str, graph: Path, folder: Path, **options: Any) -> Path:
    from pipeline.steps import artifact
    from pipeline.targets.base import BuildJob
    from pipeline.targets.ort.options import OrtOptions
    from pipeline.targets.ort.target import OrtTarget

    target = OrtTarget()

    def no_module() -> Any:
        raise RuntimeError("this target builds from the graph")

    def no_images(count: int) -> NoReturn:
        raise RuntimeError(f"this target needs no images, {count} were asked for")

    job = BuildJob(
        network=network,
        precision=precision,
        options=OrtOptions(**options),
        graph=graph,
        module=no_module,
        calibration=no_images,
        batch=None,
        log=lambda line: None,
    )
    into = folder / "-".join((precision, *options.values()))
    artifact.make(
        into,
        kind="build",
        name=f"ort/{precision}",
        key="benchmark",
        made_from={},
        tools={},
        build=lambda temporary: target.build(job, temporary),
    )
    return into


# Opening contenders, each in its own process.


def open_ours(source: str, threads: int) -> Call:
    from pipeline.steps.artifact import Artifact
    from pipeline.targets.ort.target import OrtTarget

    return OrtTarget().open(Artifact.read(Path(source)), threads=threads)


def open_onnxruntime(source: str, threads: int, pages: str = "") -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    huge = HugePages(wanted=bool(pages))
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def call(images: Images) -> Any:
        huge.before_call()
        logits = session.run(None, {"image": images})[0]
        huge.after_call(len(images))
        return logits

    return call


def open_openvino(source: str, threads: int, precision: str) -> Call:
    import openvino

    # Without such instructions it obeys all the same, and takes twice the time of float32.
    if precision == "bf16" and (why := machine.why_no_bfloat16()):
        raise UnavailableError(why)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(source, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda images: request.infer([images])[0]


def open_torch(source: str, threads: int, compiled: str = "") -> Call:
    import torch

    torch.set_num_threads(threads)
    network = published_form(source, "formula")
    run = torch.compile(network) if compiled else network

    def call(images: Images) -> Any:
        with torch.inference_mode():
            return run(torch.from_numpy(images)).numpy()

    return call


OPENERS: dict[str, Callable[..., Call]] = {
    "ours": open_ours,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "torch": open_torch,
    **{name: engine.open for name, engine in ENGINES.items()},
}


def why_not_played() -> str:
    """Why other engines do not see the class that this process is restricted to; "" if they do."""
    cls = cpu_classes.restriction()
    if cls is None or not cls.hidden & set(machine.instructions()) or reaches_every_library():
        return ""
    # Their libraries ask the CPU themselves, and are not copied as ONNX Runtime's are.
    return f"it sees this CPU, not one of the class {cls.name}"


def convert_all(model: str, graph: Path, batch: int, folder: Path) -> list[Contender]:
    """A network in the formats of other engines; they sit out where they are not installed."""
    made, why = [], why_not_played()
    for name, engine in ENGINES.items():
        into = folder / f"{name}-{batch}"
        missing = why or convert(name, model, graph, batch, into)
        made.append(Contender(engine.title, name, str(into), {}, missing=missing))
    return made


def contenders(
    model: str,
    graphs: Mapping[str, Path],
    ours: Mapping[str, Path],
    by_tanh: Contender,
    others: list[Contender],
    *,
    torch: bool,
) -> list[Contender]:
    """All ways to run a network; the baseline first.

    Args:
        model: The network's name.
        graphs: What `export_graphs` gives.
        ours: What `build_ours` gives.
        by_tanh: What `build_by_tanh` gives.
        others: What `convert_all` gives.
        torch: Whether PyTorch takes part.
    """
    published = str(graphs["published"])
    found = [
        Contender(BASELINE, "onnxruntime", published, {}),
        Contender(f"{BASELINE}, huge pages", "onnxruntime", published, {"pages": "huge"}),
    ]
    found += [
        Contender(f"ours {precision}", "ours", str(ours[precision]), {}, precision != "int8")
        for precision in ("fp32", "int8")
        if precision in ours
    ]
    found.append(by_tanh)
    found.append(Contender("exact form, default session", "onnxruntime", str(graphs["exact"]), {}))
    ways = [
        ("OpenVINO fp32, published graph", graphs["published"], "f32", True),
        ("OpenVINO fp32, exact form", graphs["exact"], "f32", True),
        ("OpenVINO bf16, exact form", graphs["exact"], "bf16", False),
    ]
    if "quantized" in ours:
        ways.append(("OpenVINO int8, our Q/DQ graph", ours["quantized"], "f32", False))
    missing = why_not(("openvino",), "openvino")
    found += [
        Contender(name, "openvino", str(path), {"precision": hint}, same, missing)
        for name, path, hint, same in ways
    ]
    found += others
    if torch:
        found.append(Contender("PyTorch eager", "torch", model, {}))
        found.append(Contender("torch.compile", "torch", model, {"compiled": "yes"}))
    return found


# Taking turns.


def serve_alone(*arguments: Any) -> None:
    """`serve`, with nothing printed by libraries that are not Python either."""
    silence()
    serve(*arguments)


def serve(
    pipe: Connection, contender: Contender, threads: int, batch: int, as_cpu: str | None
) -> None:
    """Run in a process of its own: open, answer, then time some calls whenever the parent asks."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with quiet():
        try:
            restrict(as_cpu)
            rng = np.random.default_rng(1)
            images = rng.standard_normal((batch, *SHAPE)).astype(np.float32)
            call = OPENERS[contender.kind](contender.source, threads, **contender.options)
            pipe.send(np.array(call(images)))
        except Exception as error:  # told to the parent, which reports it as not measured
            pipe.send(said(error))
            return
        while pipe.recv():
            call(images)
            times = []
            for _ in range(CALLS):
                begin = time.perf_counter()
                call(images)
                times.append(1e3 * (time.perf_counter() - begin))
            pipe.send(times)


def restrict(as_cpu: str | None) -> None:
    """Let the runtimes of this process see a CPU of a class only, if one is named.

    Only their time counts: where the CPU lacks instructions of the class, others that take as long
    may run in their place, and times are estimates.
    """
    if as_cpu is not None:
        enter(PLAYED[as_cpu], Purpose.TIMES)


def play(as_cpu: str | None) -> None:
    """Restrict this process, or end it with a word where that cannot be done."""
    try:
        restrict(as_cpu)
    except PipelineError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


def kernels() -> str:
    """The class whose kernels runtimes take here, and whether their times are estimates."""
    imitated = ", ".join(sorted(cpu_classes.emulated(Purpose.TIMES)))
    return machine.kernels() + (f" ({measured_here()}: {imitated} is imitated)" if imitated else "")


@contextlib.contextmanager
def running(
    found: list[Contender], threads: int, batch: int
) -> Iterator[tuple[dict[str, Connection], dict[str, str], dict[str, float]]]:
    """Start all contenders, and compare their answers.

    Yields the pipes of those that take part, why others do not, and how far each one's logits are
    from the baseline's, relative to the largest.

    Args:
        found: What to start, the baseline first.
        threads: For each of them.
        batch: How many images they are given at once.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    why: dict[str, str] = {}
    off: dict[str, float] = {}
    processes = []
    restriction = cpu_classes.restriction()
    as_cpu = next((name for name, cls in PLAYED.items() if cls == restriction), None)
    expected: Images | None = None
    for contender in found:
        if contender.missing:
            why[contender.name] = contender.missing
            continue
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve_alone, args=(theirs, contender, threads, batch, as_cpu), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        try:
            answer = ours.recv()
        except EOFError:
            process.join(5)
            answer = f"the process ended with {process.exitcode}"
        if isinstance(answer, str):
            why[contender.name] = answer
            continue
        expected = answer if contender.name == BASELINE else expected
        if expected is not None and answer.shape == expected.shape:
            off[contender.name] = relative_difference(answer, expected)
        if contender.same and expected is not None and (wrong := differs(answer, expected)):
            why[contender.name] = wrong
            ours.send(False)
        else:
            pipes[contender.name] = ours
    try:
        yield pipes, why, off
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(False)
        for process in processes:
            process.join(5)
            process.kill()


def differs(logits: Images, expected: Images) -> str:
    """Says how logits are not those of the published path; nothing if they are."""
    if logits.shape != expected.shape:
        return f"its logits are {logits.shape}, those of the {BASELINE} {expected.shape}"
    difference = relative_difference(logits, expected)
    if difference <= TOLERANCE:  # not so if it is NaN
        return ""
    return (
        f"its logits differ from those of the {BASELINE} by {difference:.1e} of the largest, "
        f"more than {TOLERANCE:.0e}"
    )


def take_both(
    pipes: Mapping[str, Connection], seconds: float, busy: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of every contender's calls alone, and beside busy processes."""
    alone: dict[str, list[float]] = {name: [] for name in pipes}
    beside: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(SPELLS):
        for times, count in ((alone, 0), (beside, busy)):
            with contended(count):
                for name, measured in take_turns(pipes, seconds / (2 * SPELLS)).items():
                    times[name] += measured
    return alone, beside


def take_turns(pipes: Mapping[str, Connection], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every contender's calls."""
    times: dict[str, list[float]] = {name: [] for name in pipes}
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 5 or time.monotonic() < end:
        rounds += 1
        for name, pipe in pipes.items():
            pipe.send(True)
            measured: list[float] = pipe.recv()
            # The first rounds fill caches and wake frequencies.
            times[name] += measured if rounds > 2 else []
            time.sleep(PAUSE)
    return times


# The limit.


def work(graph: Path) -> tuple[float, float]:
    """GFLOP of one image in dense products and in depthwise convolutions."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(graph))
    shapes = {
        value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.output)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    dense = depthwise = 0.0
    for node in model.graph.node:
        if len(node.input) < 2 or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        positions = float(np.prod(shapes.get(node.output[0], [1, 1])[2:]))
        if node.op_type == "Conv":
            flops = 2e-9 * float(np.prod(weight)) * positions
            dense, depthwise = (
                (dense, depthwise + flops) if weight[1] == 1 else (dense + flops, depthwise)
            )
        elif node.op_type in ("Gemm", "MatMul"):
            rows = float(np.prod(shapes.get(node.output[0], [1, 1])[:-1]))
            dense += 2e-9 * float(np.prod(weight)) * rows
    return dense, depthwise


def peak(threads: int, kernel: int, *, depthwise: bool, seconds: float = 1.0) -> float:
    """GFLOP/s of one large convolution, which is what ONNX Runtime does fastest."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    best = 0.0
    for channels, side in ((256, 14), (512, 14), (512, 28)):
        weight = np.full((channels, 1 if depthwise else channels, kernel, kernel), 0.01, np.float32)
        depth = 8
        nodes = [
            helper.make_node(
                "Conv",
                ["image" if i == 0 else f"x{i}", "w"],
                [f"x{i + 1}"],
                group=channels if depthwise else 1,
                pads=[kernel // 2] * 4,
            )
            for i in range(depth)
        ]
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, side, side])
            for name in ("image", f"x{depth}")
        ]
        graph = helper.make_graph(
            nodes, "peak", values[:1], values[1:], [numpy_helper.from_array(weight, "w")]
        )
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peak.onnx"
            onnx.save(model, path)
            call = open_onnxruntime(str(path), threads)
        images = np.zeros((1, channels, side, side), np.float32)
        session_end = time.perf_counter() + seconds / 3
        fastest = np.inf
        while time.perf_counter() < session_end:
            begin = time.perf_counter()
            call(images)
            fastest = min(fastest, time.perf_counter() - begin)
        best = max(best, depth * 2e-9 * weight.size * side * side / fastest)
    return best


# Reporting.


def highest_rates(threads: int) -> tuple[float, float]:
    """GFLOP/s of dense products and of depthwise convolutions, see `peak`."""
    return peak(threads, 1, depthwise=False), peak(threads, 3, depthwise=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what libraries print to nowhere; errors are raised, not printed."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), Path(os.devnull).open("w") as sink:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    logging.disable(logging.NOTSET)


def measure(
    model: str, found: list[Contender], threads: int, batch: int, seconds: float, busy: int = 0
) -> list[dict[str, Any]]:
    """One row for every contender.

    Args:
        model: The network's name.
        found: What to measure, the baseline first.
        threads: For each of them.
        batch: How many images they are given at once.
        seconds: Of all turns together.
        busy: Beside how many busy processes; half of the turns then have none, to compare with.
    """
    with running(found, threads, batch) as (pipes, why, off):
        if BASELINE in why:
            raise click.ClickException(f"the {BASELINE} does not run: {why[BASELINE]}")
        alone: dict[str, list[float]] = {}
        if busy:
            alone, times = take_both(pipes, seconds, busy)
        else:
            times = take_turns(pipes, seconds)
    rows: list[dict[str, Any]] = []
    for contender in found:
        row: dict[str, Any] = {
            "model": model,
            "batch": batch,
            "threads": threads,
            "contender": contender.name,
        }
        if contender.name in why:
            rows.append({**row, "not_measured": why[contender.name]})
            continue
        samples = times[contender.name]
        compared = ratio(samples, times[BASELINE])
        row |= {"latency": Latency(tuple(samples)).to_dict(), "ratio": compared.value}
        row["difference"] = off.get(contender.name)
        if busy:
            quiet_samples = alone[contender.name]
            slower = ratio(samples, quiet_samples)
            row |= {
                "busy": busy,
                "quiet": Latency(tuple(quiet_samples)).to_dict(),
                "times_quiet": slower.value,
                "times_quiet_interval": list(slower.interval),
            }
        rows.append({**row, "interval": list(compared.interval)})
    return rows


def show(rows: list[dict[str, Any]], limit: float) -> None:
    """Print the rows of one configuration."""
    first = rows[0]
    busy = next((row["busy"] for row in rows if "busy" in row), 0)
    click.echo(
        f"\n{first['model']}, batch {first['batch']}, {first['threads']} threads{_beside(busy)}"
    )
    click.echo(
        f"  {'':34}{'median ms':>10} {'min':>8} {'ratio':>7}  {'95 % interval':15} {'of limit':>9}"
        + (f" {'times quiet':>12}" if busy else "")
    )
    for row in rows:
        if "not_measured" in row:
            click.echo(f"  {row['contender']:34}not measured: {row['not_measured']}")
            continue
        latency, (low, high) = row["latency"], row["interval"]
        click.echo(
            f"  {row['contender']:34}{latency['p50']:10.2f} {latency['min']:8.2f} "
            f"{row['ratio']:7.3f}  {low:.3f} to {high:.3f} {limit / latency['p50']:9.0%}"
            + (f" {row['times_quiet']:12.2f}" if busy else "")
        )
    click.echo(f"  {'limit (see the description)':34}{limit:10.2f}")


def markdown(result: Mapping[str, Any]) -> str:
    """The rows as one table for every batch and number of threads, networks side by side."""
    here, rows = result["here"], result["rows"]
    about = ", ".join(f"{key} {here[key]}" for key in ("cpu", "date", "load"))
    if here["kernels"]:
        about += f", kernels of {here['kernels']}"
    busy = result["busy"]
    about += f"; contended: half of the turns{_beside(busy)}" if busy else ""
    lines = [f"{about}; versions: {', '.join(f'{k} {v}' for k, v in versions().items())}."]
    slower = "; times its own when quiet" if busy else ""
    heading = f"ms (ratio to the published path, 95 % interval{slower})"
    models = list(dict.fromkeys(row["model"] for row in rows))
    for threads, batch in sorted({(row["threads"], row["batch"]) for row in rows}):
        part = [row for row in rows if (row["threads"], row["batch"]) == (threads, batch)]
        cells = {(row["contender"], row["model"]): _cell(row) for row in part}
        limits = {row["model"]: f"{row['limit_ms']:.2f}" for row in part}
        counted = "1 thread" if threads == 1 else f"{threads} threads"
        lines += [
            "",
            f"**Batch {batch}, {counted}{_beside(busy)}.**",
            "",
            f"| {heading} | {' | '.join(models)} |",
            f"|---|{'---|' * len(models)}",
        ]
        for name in dict.fromkeys(row["contender"] for row in part):
            told = " | ".join(cells.get((name, model), "-") for model in models)
            lines.append(f"| {name} | {told} |")
        told = " | ".join(limits.get(model, "-") for model in models)
        lines.append(f"| attainable limit, float32{', quiet' if busy else ''} | {told} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    if "not_measured" in row:
        return f"not measured: {row['not_measured']}"
    low, high = row["interval"]
    slower = f"; {row['times_quiet']:.2f}" if "times_quiet" in row else ""
    return f"{row['latency']['p50']:.2f} ({row['ratio']:.3f}, {low:.3f} to {high:.3f}{slower})"


def _beside(busy: int) -> str:
    processes = "process" if busy == 1 else "processes"
    return f" beside {busy} busy {processes}" if busy else ""


def markers(as_cpu: str | None, busy: int) -> str:
    """The name of the table in the document: each way to measure has its own."""
    return "cpu latency" + (" contended" if busy else "") + (f" as {as_cpu}" if as_cpu else "")


def versions() -> dict[str, str]:
    """Versions of what is compared, as far as it is installed."""
    found = {}
    for package in ("onnxruntime", "openvino", "ncnn", "executorch", "mnn", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot ratios to the published path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "ratio" in row and row["contender"] != BASELINE]
    labels = [
        f"{r['model']}, batch {r['batch']}, {r['threads']} t: {r['contender']}" for r in measured
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.25 * len(measured) + 1.2))
    values = np.array([row["ratio"] for row in measured])
    ends = np.array([row["interval"] for row in measured])
    errors = np.abs(ends.T - values)
    axes.errorbar(values, range(len(values)), xerr=errors, fmt="o", markersize=4, capsize=2)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to the published path (95 % interval)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--model", "models", multiple=True, type=click.Choice(NETWORKS), help="Default: all.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Default: 1 and 8.")
@click.option("--threads", "counts", multiple=True, type=click.IntRange(1), help="Default: 1, 2.")
@click.option("--seconds", default=30.0, show_default=True, help="Of each configuration.")
@click.option("--quick", is_flag=True, help="8 seconds; by itself CARE-S0, batch 1, all threads.")
@click.option("--int8/--no-int8", default=True, help="Our int8 build too.")
@click.option("--torch/--no-torch", default=True, help="PyTorch, and torch.compile, too.")
@click.option("--engines/--no-engines", default=True, help="Those that convert: ncnn and others.")
@click.option("--contended", "busily", is_flag=True, help="Beside busy processes, and without.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write a picture.")
@click.option("--docs", type=click.Path(path_type=Path), help="Document that gets the tables.")
@as_cpu_option
def main(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    counts: tuple[int, ...],
    seconds: float,
    quick: bool,
    int8: bool,
    torch: bool,
    engines: bool,
    busily: bool,
    json_path: Path | None,
    plot_path: Path | None,
    docs: Path | None,
    as_cpu: str | None,
) -> None:
    play(as_cpu)
    available = granted()
    if quick:
        models, batches, seconds = models or ("care_s0",), batches or (1,), min(seconds, 8.0)
        counts = counts or (available,)
    counts = counts or tuple(range(1, min(available, 2) + 1))
    if max(counts) > available:
        raise click.UsageError(f"--threads: this process may use {available} CPUs")
    here = {**machine.describe(), "load": machine.load(), "date": time.strftime("%Y-%m-%d")}
    here["kernels"] = kernels()
    click.echo(", ".join(f"{key} {value}" for key, value in here.items()))
    if here["load"] > 0.5:
        click.echo("others use this here as well: compare ratios, not milliseconds", err=True)
    rows: list[dict[str, Any]] = []
    busy = rivals() if busily else 0
    batches = batches or (1, 8)
    for model in models or NETWORKS:
        with tempfile.TemporaryDirectory(prefix="cpu-latency-") as name:
            folder = Path(name)
            graphs = export_graphs(model, folder)
            ours = build_ours(model, graphs["exact"], folder, int8=int8)
            by_tanh = build_by_tanh(model, graphs["exact"], folder)
            others = {
                batch: convert_all(model, graphs["published"], batch, folder) if engines else []
                for batch in batches
            }
            for threads in counts:
                rates = highest_rates(threads)
                for batch in batches:
                    found = contenders(model, graphs, ours, by_tanh, others[batch], torch=torch)
                    flops = work(graphs["exact"])
                    limit = 1e3 * batch * sum(f / r for f, r in zip(flops, rates, strict=True))
                    part = measure(model, found, threads, batch, seconds, busy)
                    show(part, limit)
                    rows += [{**row, "limit_ms": limit} for row in part]
    result = {"here": here, "busy": busy, "rows": rows}
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if plot_path is not None:
        draw(rows, plot_path)
    if docs is not None:
        fill(docs, markers(as_cpu, busy), markdown(result))
    click.echo(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
