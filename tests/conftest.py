"""Shared by all tests: weights and images from a formula, and networks made of them."""

from __future__ import annotations

import gc
import os
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

from pipeline.core import garbage
from tests.exporting import remember_composites, remembering

if TYPE_CHECKING:
    from torch import nn

# One thread for each test process: the suite runs in as many processes as there are cores, or more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What takes all threads nevertheless (baselines are measured so) shall not spin while it waits: it
# would take the core from the tests beside it, and four times the processor time with that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests start hundreds of processes: each would compile what an earlier one was not to keep.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# And each would look through all installed packages for plugins of pydantic: 0.15 s of 0.6.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")

DATA = Path(__file__).parent / "data"
SEED = 7

gc.set_threshold(*garbage.GARBAGE)  # as the command line does

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]


LONG = (
    "pipeline/test_cli.py",
    "care/test_train.py",
    "pipeline/scheduler/test_fleet.py",
    "pipeline/targets/tensorrt/test_commands.py",
    "pipeline/targets/coreml/test_diff.py",
    "scripts/test_attack.py",
    "care/test_quantization.py",
    "pipeline/targets/coreml/test_repair.py",
    "pipeline/report/test_html.py",
    "pipeline/stages/test_keys.py",
    "pipeline/targets/coreml/test_target.py",
    "pipeline/emulate/mil/test_grids.py",
    "care/test_checkpoint.py",
    "pipeline/targets/coreml/test_compress.py",
    "pipeline/commands/test_rebuild.py",
    "pipeline/targets/coreai/test_target.py",
    "pipeline/test_nothing_lost.py",
    "pipeline/targets/coreai/test_commands.py",
    "care/test_fuse.py",
    "pipeline/report/test_history.py",
    "test_readme.py",
    "test_architecture.py",
    "pipeline/emulate/onnx/test_layers.py",
    "pipeline/emulate/mil/test_networks.py",
    "pipeline/emulate/onnx/test_networks.py",
    "pipeline/targets/tensorrt/test_target.py",
    "care/test_model.py",
    "pipeline/targets/ort/test_quantize.py",
    "pipeline/test_timm.py",
    "pipeline/graphs/test_overflow.py",
    "pipeline/emulate/onnx/test_node_cases.py",
    "care/test_stopping.py",
    "pipeline/commands/test_environment.py",
    "pipeline/targets/coreml/test_siblings.py",
    "pipeline/targets/coreml/test_axes.py",
    "pipeline/targets/coreml/test_rewrites.py",
    "pipeline/targets/coreml/test_refusals.py",
    "pipeline/targets/coreai/test_networks.py",
    "pipeline/targets/coreai/test_executor.py",
    "pipeline/scheduler/test_side_by_side.py",
    "pipeline/scheduler/test_cuts.py",
    "pipeline/targets/coreml/test_damages.py",
    "pipeline/stages/test_photo.py",
    "pipeline/targets/ort/test_as_cpu.py",
    "pipeline/targets/ort/test_avx_vnni.py",
    "pipeline/api/test_model.py",
    "pipeline/api/test_results.py",
    "pipeline/targets/coreai/test_device.py",
    "pipeline/stages/test_samples.py",
    "care/test_finetune.py",
    "test_windows.py",
    "pipeline/exports/test_golden.py",
    "pipeline/emulate/mil/test_operators.py",
    "calibration/test_prefixes.py",
    "pipeline/api/test_own_network.py",
    "pipeline/test_graph_source.py",
)
"""Files that take long, the longest first as far as that can be said for all machines.

Of the first three one makes what a run of the embedded network makes first, and no other needs it.
"""


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """`-n auto` is a process more than there are cores, for what waits: for disks, ends, clocks."""
    cores = yield
    return cores if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first.

    Processes get whole files, as they are put here (by number of tests, pytest-xdist would keep
    files of few and long ones for the end, where one process would wait for the other).
    """
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Set aside what a test process begins with: packages and tests, a million of objects.

    PyTorch's exporter and coremltools ask for whole collections, which would go through them each
    time: a third of the processor time of test_grids.py.
    """
    if torch := sys.modules.get("torch"):
        torch.onnx.export = remembering(torch.onnx.export)
    if "torch.export" in sys.modules:
        remember_composites()
    _set_aside()
    # Known, and not counted each time: a million of objects take 0.04 s.
    vars(garbage)["set_aside"] = lambda: True
    gc.callbacks.append(_COLLECTIONS.watch)


def _set_aside() -> None:
    gc.collect()
    gc.freeze()


class Collections:
    """Notices that whole collections go through many objects again.

    The first export, or conversion, imports hundreds of modules more, and what libraries keep from
    then on is with the objects of all that follow.
    """

    LONG_S = 0.05

    def __init__(self) -> None:
        self.long = False
        self._began = 0.0

    def watch(self, phase: str, about: dict[str, int]) -> None:
        """Called by Python before and after each collection."""
        if about["generation"] < 2:
            return
        if phase == "start":
            self._began = time.process_time()
        elif time.process_time() - self._began > self.LONG_S:
            self.long = True


_COLLECTIONS = Collections()


def pytest_runtest_logfinish() -> None:
    """Set aside what a test left, where collections have become long: no test is running now."""
    if _COLLECTIONS.long:
        _set_aside()
        _COLLECTIONS.long = False


def pytest_sessionfinish() -> None:
    """Give back what was set aside: libraries complain of what is never collected."""
    if _COLLECTIONS.watch in gc.callbacks:
        gc.callbacks.remove(_COLLECTIONS.watch)
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def not_synced() -> Iterator[None]:
    """No test cuts the power: what is written does not wait until the disk has it.

    The processes that tests start do wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def parity_parameter(name: str, shape: tuple[int, ...]) -> Array:
    """Value of a parameter: depends on its name, its shape and the seed alone."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape)
    elif name.endswith("gamma"):
        value = rng.uniform(0.1, 0.5, shape)
    elif name.endswith("bias"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


def parity_images(batch: int, resolution: int) -> Array:
    """Images of seeded noise, (batch, 3, resolution, resolution)."""
    rng = np.random.default_rng([SEED, resolution])
    return rng.standard_normal((batch, 3, resolution, resolution)).astype(np.float32)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the tests' own data."""
    return DATA


@pytest.fixture(scope="session")
def images() -> Callable[[int, int], Array]:
    """Makes images: (batch, resolution) -> (batch, 3, resolution, resolution)."""
    return parity_images


@pytest.fixture(scope="session")
def parity_model() -> Callable[..., nn.Module]:
    """Makes a network in evaluation mode with weights from the formula: (name, **arguments)."""
    import timm
    import torch

    import care.networks  # noqa: F401  registers our networks with timm

    def make(name: str, **arguments: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, **arguments).eval()
        state = model.state_dict()
        for key, value in state.items():
            if not key.endswith(("num_batches_tracked", "rotations")):
                state[key] = torch.from_numpy(parity_parameter(key, tuple(value.shape)))
        model.load_state_dict(state)
        return model

    return make


def build_graph(
    nodes: Sequence[NodeProto],
    constants: Arrays,
    input_shape: Sequence[int | str],
    output_shape: Sequence[int | str] = ("batch", 3, 8, 8),
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(input_shape))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(output_shape))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    checker.check_model(model)
    return model


@pytest.fixture
def make_model() -> Callable[..., ModelProto]:
    return build_graph


@pytest.fixture
def small_model() -> ModelProto:
    """Depthwise and pointwise convolution, Gelu, pooling, LayerNormalization, two linear layers."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    spread = np.array([8, 1, 0.1], dtype=np.float32)
    constants = {
        "dw": normal(3, 1, 3, 3) * spread[:, None, None, None],
        "dwb": normal(3) * spread,
        "pw": normal(6, 3, 1, 1),
        "g": np.abs(normal(6)) * np.array([10, 1, 1, 1, 1, 0.1], dtype=np.float32),
        "gb": normal(6),
        "m": normal(6, 5),
        "mb": normal(5),
        "w": normal(4, 5),
        "wb": normal(4),
    }
    nodes = [
        helper.make_node(
            "Conv", ["image", "dw", "dwb"], ["c1"], "conv1", group=3, pads=[1, 1, 1, 1]
        ),
        helper.make_node("Conv", ["c1", "pw"], ["c2"], "conv2"),
        helper.make_node("Gelu", ["c2"], ["act"], "gelu"),
        helper.make_node("GlobalAveragePool", ["act"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flatten"),
        helper.make_node("LayerNormalization", ["flat", "g", "gb"], ["norm"], "norm"),
        helper.make_node("MatMul", ["norm", "m"], ["mm"], "matmul"),
        helper.make_node("Add", ["mm", "mb"], ["hidden"], "add"),
        helper.make_node("Relu", ["hidden"], ["relu"], "relu"),
        helper.make_node("Gemm", ["relu", "w", "wb"], ["logits"], "gemm", transB=1),
    ]
    return build_graph(nodes, constants, ["batch", 3, 8, 8], ["batch", 4])


@pytest.fixture
def pixels() -> npt.NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((10, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def run_model() -> Callable[[ModelProto, npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    def run(model: ModelProto, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        result: npt.NDArray[np.float32] = session.run(None, {"image": batch})[0]
        return result

    return run


NETS = """
from torch import nn

from my_layers import first

number = 3


def make(classes=4, width=2):
    return nn.Sequential(first(width), nn.Flatten(), nn.LazyLinear(classes))


def broken():
    raise RuntimeError("the file of weights is gone")


def text():
    return "a network"
"""
LAYERS = """
from torch import nn


def first(width):
    return nn.Conv2d(3, width, 3)
"""


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules of a user's own, which make networks."""
    (tmp_path / "my_nets.py").write_text(NETS)
    (tmp_path / "my_layers.py").write_text(LAYERS)
    (tmp_path / "other.py").write_text("")
    package = tmp_path / "my_package" / "inner"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.write_text("raise RuntimeError('imported')")
    (package / "deep.py").write_text(NETS.replace("my_layers", "my_package.layers"))
    (package.parent / "layers.py").write_text(LAYERS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
