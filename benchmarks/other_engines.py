"""Other engines for this CPU, each with a format of its own: how their makers say to use them.

A network is converted in float32, and opened with a number of threads. ncnn gets what its pnnx
makes of the traced module, MNN what its converter makes of the published graph, ExecuTorch the
exported module lowered to XNNPACK. Each is made for one number of images.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from networks import SHAPE, published_form

from pipeline.core.errors import BuildError, PipelineError, UnavailableError

Images = npt.NDArray[np.float32]
Call = Callable[[Images], Images]


@dataclass(frozen=True)
class Engine:
    """An engine that takes part where it is installed.

    Attributes:
        title: For people.
        modules: What must be there to import.
        install: What `pip install` is told.
        convert: Writes a network into a folder, given its name, its published graph and the number
            of images.
        open: Opens that folder, with a number of threads.
    """

    title: str
    modules: Sequence[str]
    install: str
    convert: Callable[[str, Path, int, Path], None]
    open: Callable[[str, int], Call]


def why_not(modules: Sequence[str], install: str) -> str:
    """Says which module is not installed, and how to mend it; nothing if all are."""
    absent = next((name for name in modules if not is_there(name)), None)
    return f"{absent} is not installed: pip install {install}" if absent else ""


def is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def said(error: BaseException) -> str:
    """An error in one line: our own as it is, others with their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text[:200]}"


def silence() -> None:
    """Send what this process prints to nowhere, also what is not Python in it."""
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)


def convert(name: str, model: str, graph: Path, batch: int, folder: Path) -> str:
    """Convert a network in a process of its own, which may print or end as it likes.

    Args:
        name: The engine, one of `ENGINES`.
        model: The network's name.
        graph: The published graph.
        batch: How many images it shall take.
        folder: A new folder for what the engine opens.

    Returns:
        Why it cannot be; nothing if it is done.
    """
    engine = ENGINES[name]
    if absent := why_not(engine.modules, engine.install):
        return absent
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=silence) as pool:
        try:
            pool.submit(engine.convert, model, graph, batch, folder).result()
        except Exception as error:  # told to the caller, which reports it as not measured
            return said(error)
    return ""


def require(path: Path, by: str) -> None:
    """Converters that fail may do so without a word.

    Raises:
        BuildError: There is no such file.
    """
    if not path.exists():
        raise BuildError(f"{by} wrote no {path.name}")


# ncnn


def convert_ncnn(model: str, graph: Path, batch: int, folder: Path) -> None:
    import pnnx
    import torch

    images = torch.zeros(batch, *SHAPE)
    # It takes weights to 16 bits unless told otherwise.
    pnnx.export(published_form(model, "formula"), str(folder / "network.pt"), images, fp16=False)
    for ending in ("param", "bin"):
        require(folder / f"network.ncnn.{ending}", "pnnx")


def open_ncnn(source: str, threads: int) -> Call:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    param, weights = (str(Path(source) / f"network.ncnn.{ending}") for ending in ("param", "bin"))
    if net.load_param(param) or net.load_model(weights):
        raise UnavailableError("ncnn cannot load what pnnx wrote")

    def call(images: Images) -> Images:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(images, batch_index=0).clone())
        failed, logits = extractor.extract("out0")
        if failed:
            raise UnavailableError(f"ncnn cannot run what pnnx wrote: {failed}")
        return np.asarray(logits.numpy(batch_index=0), np.float32)

    return call


# ExecuTorch


def convert_executorch(model: str, graph: Path, batch: int, folder: Path) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(published_form(model, "formula"), (torch.zeros(batch, *SHAPE),))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    (folder / "network.pte").write_bytes(lowered.to_executorch().buffer)


def open_executorch(source: str, threads: int) -> Call:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    torch.set_num_threads(threads)
    # There is no other way to say it: by itself it takes every core.
    portable_lib._unsafe_reset_threadpool(threads)
    if (got := portable_lib._threadpool_get_thread_count()) != threads:
        raise UnavailableError(f"ExecuTorch takes {got} threads where {threads} are asked for")
    program = Runtime.get().load_program(Path(source) / "network.pte")
    method = program.load_method("forward")
    if method is None:
        raise UnavailableError("ExecuTorch's program has no method forward")

    def call(images: Images) -> Images:
        # The program goes with the method: nothing else holds it.
        assert program is not None
        logits: Images = method.execute([torch.from_numpy(images)])[0].numpy()
        return logits

    return call


# MNN


def convert_mnn(model: str, graph: Path, batch: int, folder: Path) -> None:
    # Its compiled part, which `mnnconvert` calls: importing MNN.tools.mnnconvert installs a package
    # by whatever pip is found first, and then asks a server for leave to tell it what is converted.
    import _tools

    into = folder / "network.mnn"
    files = ["--modelFile", str(graph), "--MNNModel", str(into)]
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", "benchmark"])
    require(into, "mnnconvert")


def open_mnn(source: str, threads: int) -> Call:
    from MNN import expr, nn

    config = {"backend": "CPU", "precision": "high", "numThread": threads}
    manager = nn.create_runtime_manager((config,))
    file = str(Path(source) / "network.mnn")
    net = nn.load_module_from_file(file, ["image"], ["logits"], runtime_manager=manager)

    def call(images: Images) -> Images:
        given = expr.const(images, list(images.shape), expr.NCHW, expr.float)
        logits = net.forward([expr.convert(given, expr.NC4HW4)])[0]
        return np.array(expr.convert(logits, expr.NCHW).read(), np.float32)

    return call


ENGINES: Mapping[str, Engine] = {
    "ncnn": Engine("ncnn fp32", ("ncnn", "pnnx"), "ncnn pnnx", convert_ncnn, open_ncnn),
    "executorch": Engine(
        "ExecuTorch fp32, XNNPACK",
        # Of all that its package asks for, what exporting and running needs beside our own.
        ("executorch", "ruamel.yaml", "tabulate"),
        "--no-deps executorch ruamel.yaml tabulate",
        convert_executorch,
        open_executorch,
    ),
    "mnn": Engine("MNN fp32", ("MNN",), "MNN", convert_mnn, open_mnn),
}
