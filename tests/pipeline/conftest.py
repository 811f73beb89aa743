"""A small network with what makes conversions hard: blocks, a one-sided clamp, a linear layer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import pipeline
from calibration.sample import CalibrationSet
from pipeline.core.network import Images, Network
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.floats import SHARED
from pipeline.targets.forms import Form, FormJob
from pipeline.targets.ort import tune
from pipeline.targets.registry import TARGETS
from pipeline.targets.repaired import REPAIRED


def form_named(name: str) -> Form:
    own = (form for target in TARGETS.values() for form in target.forms)
    return next(form for form in (*SHARED, *REPAIRED, *own) if form.name == name)


@pytest.fixture
def three_threads() -> Iterator[None]:
    import torch  # most tests here do without

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


Times = dict[str, list[float]]

NETWORK = Network("small", ("a", "b", "c", "d"), (3, 8, 8), {})


def small_model(opset: int = 20) -> onnx.ModelProto:
    rng = np.random.default_rng(3)

    def tensor(name: str, *shape: int) -> TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array(values.astype(np.float32), name)

    initializers = [
        tensor("stem.weight", 16, 3, 3, 3),
        tensor("stem.bias", 16),
        tensor("stages.0.blocks.0.conv.weight", 16, 1, 3, 3),
        tensor("stages.0.blocks.1.conv.weight", 16, 16, 1, 1),
        tensor("head.weight", 4, 16),
        tensor("head.bias", 4),
        numpy_helper.from_array(np.array(2.0**-14, np.float32), "low"),
        numpy_helper.from_array(np.array([-1, 16]), "shape"),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "stem.weight", "stem.bias"], ["x0"], "stem"),
        helper.make_node("Clip", ["x0", "low"], ["x1"], "clamp"),
        helper.make_node(
            "Conv",
            ["x1", "stages.0.blocks.0.conv.weight"],
            ["x2"],
            "depthwise",
            group=16,
            pads=[1, 1, 1, 1],
        ),
        helper.make_node("Elu", ["x2"], ["x3"], "elu"),
        helper.make_node("Conv", ["x3", "stages.0.blocks.1.conv.weight"], ["x4"], "pointwise"),
        helper.make_node("GlobalAveragePool", ["x4"], ["x5"], "pool"),
        helper.make_node("Reshape", ["x5", "shape"], ["x6"], "flatten"),
        helper.make_node("Gemm", ["x6", "head.weight", "head.bias"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.fixture
def small_graph() -> Callable[..., onnx.ModelProto]:
    """Makes the small_graph network, afresh: (opset)."""
    return small_model


def lay(folder: Path) -> Path:
    """Put model.onnx of four classes into a folder; photos/ and samples/: three images of each."""
    rng = np.random.default_rng(0)
    for split in ("photos", "samples"):
        for name in ("ant", "bee", "cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    onnx.save(small_model(), folder / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def lay_graph_project() -> Callable[[Path], Path]:
    """Puts into a folder what `graph_project` holds."""
    return lay


@pytest.fixture
def graph_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: model.onnx, photos/ and samples/, see `lay`."""
    monkeypatch.chdir(tmp_path)
    return lay(tmp_path)


@pytest.fixture
def graph_settings() -> dict[str, Any]:
    """A configuration of what `graph_project` holds, for ONNX Runtime alone."""
    return {
        "name": "mine",
        "model": {"onnx": "model.onnx"},
        "data": {"validation": "folder:photos"},
        "preprocess": {"size": 8, "crop": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3},
        "targets": {"ort": {"precisions": ["fp32"]}},
    }


@pytest.fixture
def pictures() -> np.ndarray:
    """Images for the small_graph network, (32, 3, 8, 8)."""
    return np.random.default_rng(1).standard_normal((32, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def convert(
    tmp_path: Path, pictures: np.ndarray
) -> Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]:
    """Converts a model: (model, name of the form, batch, kept, options) -> (model, facts)."""

    def run(
        model: onnx.ModelProto,
        form: str,
        batch: int | None = None,
        evaluations: Path | None = None,
        **options: Any,
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        source, result = tmp_path / "source.onnx", tmp_path / "result.onnx"
        onnx.save(model, source)

        def calibration() -> CalibrationSet:
            if not form_named(form).calibrated:
                raise AssertionError("this form needs no calibration set")
            labels = np.arange(len(pictures)) % 4
            return CalibrationSet(pictures, labels, ("",) * len(pictures))

        job = FormJob(source, NETWORK, options, calibration, lambda line: None, batch, evaluations)
        facts = form_named(form).convert(job, result)
        return onnx.load(result), facts

    return run


EMBEDDED = {
    "name": "trial",
    "model": {"name": "care_tiny", "checkpoint": "embedded"},
    "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
    "targets": {
        "trt": {"precisions": ["fp16"], "compute_capabilities": ["8.9"]},
        "ort": {"precisions": ["fp32"]},
    },
}


@pytest.fixture(autouse=True, scope="session")
def short_trials() -> Iterator[None]:
    """What builds try for seconds, they try for some rounds here: no test asks which one won."""
    whole = tune.interleave

    def short(
        sessions: Mapping[str, Any], images: Images, seconds: float
    ) -> dict[str, list[float]]:
        return whole(sessions, images, min(seconds, 0.05))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "interleave", short)
        yield


@pytest.fixture(scope="session")
def embedded_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the embedded network, up to its artifacts: made once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "embedded"
    with filelock.FileLock(base / "embedded.lock"):
        if not folder.exists():
            making = base / "making-embedded"
            stages = ("export", "simplify", "precision", "build")
            pipeline.run({**EMBEDDED, "output": making}, only=stages)
            making.rename(folder)
    return folder / "trial"


@pytest.fixture(scope="session")
def begin(embedded_results: Path) -> Callable[[Path], Path]:
    """Puts what any run of the embedded network makes first where a test's own run finds it.

    The run that follows makes what its configuration asks for beside it, and anything anew that
    it wants otherwise.
    """

    def copy(folder: Path) -> Path:
        shutil.copytree(embedded_results, folder, dirs_exist_ok=True)
        return folder

    return copy


@pytest.fixture(scope="session")
def foreign_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a Core ML package of the small network, as others make theirs: (image).

    With an image as its input it normalizes by the mean (0.5, 0.4, 0.3) and the spread (0.25, 0.5,
    1), and is a classifier; else it takes arrays and gives logits.
    """
    made: dict[bool, Path] = {}

    def make(*, image: bool) -> Path:
        if image not in made:
            made[image] = tmp_path_factory.mktemp("foreign") / "foreign.mlpackage"
            with logged(lambda line: None):
                model = _convert(image=image)
                model.save(str(made[image]))
                del model  # and with it a temporary folder
        return made[image]

    return make


def _convert(*, image: bool) -> Any:
    import coremltools as ct
    import torch

    from pipeline.emulate.onnx.module import GraphModule

    network = GraphModule(small_model(), (3, 8, 8))

    class Scaled(torch.nn.Module):
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("std", torch.tensor([0.25, 0.5, 1.0]).reshape(1, 3, 1, 1))

        def forward(self, picture: torch.Tensor) -> torch.Tensor:
            if not image:
                logits: torch.Tensor = self.network(picture)
                return logits
            scores: torch.Tensor = self.network(picture / self.std).softmax(-1)
            return scores

    example = (torch.zeros(1, 3, 8, 8),)
    program = torch.export.export(Scaled().eval(), example).run_decompositions({})
    bias = [-0.5, -0.4, -0.3]
    taken = (
        ct.ImageType("picture", (1, 3, 8, 8), scale=1 / 255, bias=bias)
        if image
        else ct.TensorType("picture", (1, 3, 8, 8))
    )
    labels = ct.ClassifierConfig(["ant", "bee", "cat", "dog"]) if image else None
    return ct.convert(
        program,
        inputs=[taken],
        classifier_config=labels,
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
