"""Fine-tuning in the precision of a target: the network computes what will be deployed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from calibration.observe import open_session
from calibration.sample import CalibrationSet
from care import checkpoint, quantization
from care.data import open_dataset
from care.factory import create_model
from care.inference import deployed_weights, inference_form
from care.quantization import QuantizedNetwork, calibration_images
from pipeline.core.described import QUANTIZED, described_by
from pipeline.core.errors import ConfigError, ModelError
from pipeline.core.figures import Ratio
from pipeline.core.network import Network
from pipeline.core.preprocess import Preprocess
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.stages.export import _say_quantized, trace
from pipeline.stages.simplify import simplify_apart
from pipeline.targets.coreml.compress import PALETTE4
from pipeline.targets.coreml.trained import compressed
from pipeline.targets.forms import FormJob
from pipeline.targets.ort.quantize import Int8Ort, _Work
from pipeline.targets.ort.tune import Choice

SIZE = 32


def created() -> nn.Module:
    return create_model("care_tiny", depths=(1, 1, 1, 1))


def embedded() -> nn.Module:
    """The embedded network with one block a stage, as which exports in half the time."""
    model, path = created(), checkpoint.embedded("care_tiny")
    assert path is not None
    state = checkpoint.read(path)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    dataset = open_dataset("fashion-mnist", "validation")
    return calibration_images(dataset, Preprocess.from_model(embedded(), SIZE), 48, seed=1)


@pytest.fixture(scope="module")
def trained(images: np.ndarray) -> QuantizedNetwork:
    """Fine-tuned by a few steps, with a batch that has nothing to do with the ranges."""
    model = embedded()
    network = QuantizedNetwork(model, quantization.begin("ort/int7", model, images))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(2):
        batch = torch.randn(8, 3, SIZE, SIZE, generator=generator)
        nn.functional.cross_entropy(network(batch), torch.arange(8)).backward()
        assert [n for n, p in network.named_parameters() if p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
    return network


@pytest.fixture(scope="module")
def built(
    trained: QuantizedNetwork, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """What a run builds of the fine-tuned checkpoint for ONNX Runtime, and its facts."""
    folder = tmp_path_factory.mktemp("run")
    network = created()
    network.load_state_dict(trained.state_dict())
    form = inference_form(network.eval(), (3, SIZE, SIZE))
    stated = described_by({QUANTIZED: trained.form.quantized.to_dict()}, Path("best.safetensors"))
    assert stated.quantized is not None
    _say_quantized(trace(form.module, images[:2]), stated.quantized, folder / "exported.onnx")
    assert simplify_apart(folder / "exported.onnx", folder / "model.onnx", 600) is None
    chosen = CalibrationSet(images, np.arange(len(images)) % 10, ("",) * len(images))
    spec = Preprocess.from_model(network, SIZE).to_dict()
    labels = tuple(map(str, range(10)))
    job = FormJob(
        source=folder / "model.onnx",
        network=Network("care_tiny", labels, (3, SIZE, SIZE), spec),
        options={"max_top1_drop": 1.0, "cpus": "vnni"},
        calibration=lambda: chosen,
        log=lambda line: None,
    )
    faster = Choice("int8", {}, {"int8": Ratio(0.5, (0.4, 0.6))}, 9, "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Work, "compare_latency", lambda self, model: faster)
        facts = Int8Ort().convert(job, folder / "int8.onnx")
    return onnx.load(folder / "int8.onnx"), facts


def test_the_run_builds_the_graph_that_learned(
    trained: QuantizedNetwork, built: tuple[onnx.ModelProto, dict[str, Any]], images: np.ndarray
) -> None:
    model, facts = built
    assert facts["trained"] == "ort/int7"
    assert len(facts["kinds"]) == 5
    with torch.no_grad():
        learned = trained(torch.from_numpy(images)).numpy()
    # The same but for values that lie halfway between two steps, to the last digit of float32.
    differences = abs(learned - OnnxExecutor(model).run(images)).max(1) / abs(learned).max()
    assert np.median(differences) < 1e-5
    assert (differences < 1e-5).mean() > 0.7
    by_runtime = open_session(model, ["logits"])(images)["logits"]
    assert np.median(abs(learned - by_runtime)) < 0.02 * abs(learned).max()
    assert (learned.argmax(1) == by_runtime.argmax(1)).mean() > 0.95


def test_it_computes_its_graph_to_float_rounding(
    trained: QuantizedNetwork, images: np.ndarray
) -> None:
    """With the weights that the graph was made with, which is there as it is built."""
    own = QuantizedNetwork(embedded(), trained.form)
    with torch.no_grad():
        logits = own(torch.from_numpy(images)).numpy()
    form: Any = trained.form
    by_executor = OnnxExecutor(form.graph.model).run(images)
    np.testing.assert_allclose(logits, by_executor, atol=1e-6 * abs(logits).max())


def test_weights_have_seven_bits_everywhere(
    built: tuple[onnx.ModelProto, dict[str, Any]],
) -> None:
    model, facts = built
    stored = [
        numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name.endswith("_stored") and tensor.data_type == onnx.TensorProto.INT8
    ]
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(stored) == len(layers) == 43
    assert max(abs(values.astype(int)).max() for values in stored) == 63
    assert facts["certificate"]["unsafe"] == []


def test_it_computes_the_same_in_training_and_its_state_is_the_networks(
    trained: QuantizedNetwork, images: np.ndarray
) -> None:
    batch = torch.from_numpy(images[:4])
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(trained.train()(batch), trained.eval()(batch))
    assert before.keys() == embedded().state_dict().keys()
    statistics = {n: v for n, v in embedded().state_dict().items() if "running" in n}
    assert statistics
    assert all(torch.equal(before[name], value) for name, value in statistics.items())
    assert trained.no_weight_decay() <= {name for name, _ in trained.named_parameters()}
    average = copy.deepcopy(trained)
    average.load_state_dict(embedded().state_dict())
    assert not torch.equal(average(batch), trained(batch))


def test_weights_learn_as_a_core_ml_package_stores_them(images: np.ndarray) -> None:
    model = embedded()
    network = QuantizedNetwork(model, quantization.begin("coreml/palette4", model, images))
    batch = torch.from_numpy(images[:4])
    stored = compressed(deployed_weights(model), [PALETTE4])
    module = inference_form(model, (3, SIZE, SIZE)).module
    module.load_state_dict(stored)
    logits = network.train()(batch)
    assert torch.equal(logits.detach(), module(batch).detach())
    assert len(stored["stages.3.blocks.0.inter2_fc1.weight"].unique()) == 16
    logits.square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert network.form.quantized.precision == "coreml/palette4"


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_what_gradients_do_not_find_back_through_is_refused(images: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"--quantize ort/int8: .* norm is folded into it"):
        quantization.begin("ort/int8", Normed(), images)
    with pytest.raises(ModelError, match="RepVgg is rewritten when it is deployed"):
        quantization.begin("ort/int8", type("RepVgg", (Normed,), {"fuse": None})(), images)
    with pytest.raises(ConfigError, match=r"'ort/int9': .* did you mean ort/int"):
        quantization.begin("ort/int9", Normed(), images)
