"""Whole networks: converted, saved, evaluated here and compared with PyTorch."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import care.networks  # noqa: F401 - registers its networks with timm
from care.fuse import fuse
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.record import module_owners

pytestmark = [
    # coremltools leaves its models' temporary folders to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    # An open upper limit of `clamp`, the largest float32, becomes infinity in float16.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    # Its torch frontend calls its own deprecated function.
    pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning"),
]

Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def ct() -> Any:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return pytest.importorskip("coremltools")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def convert(ct: Any, tmp_path: Path) -> Convert:
    def save(network: nn.Module, example: Tensor, target: str = "iOS16") -> Path:
        exported = torch.export.export(network, (example,)).run_decompositions({})
        model = ct.convert(
            exported,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            skip_model_load=True,
        )
        path = tmp_path / "model.mlpackage"
        model.save(str(path))
        return path

    return save


def steady_weights(network: nn.Module) -> nn.Module:
    """Give a network weights that depend on nothing but their names and keep activations sane."""
    state = network.state_dict()
    for name, value in state.items():
        if "num_batches" in name or "rotations" in name:
            continue
        random = np.random.default_rng([7, zlib.crc32(name.encode())])
        if name.endswith("running_var"):
            drawn = random.uniform(0.5, 1.5, value.shape)
        elif name.endswith(("bias", "running_mean")):
            drawn = 0.1 * random.standard_normal(value.shape)
        elif name.endswith("gamma"):
            drawn = random.uniform(0.1, 0.5, value.shape)
        elif value.ndim == 1:
            drawn = random.uniform(0.5, 1.5, value.shape)
        else:
            drawn = random.standard_normal(value.shape) / np.sqrt(np.prod(value.shape[1:]))
        value.copy_(torch.from_numpy(np.asarray(drawn, np.float32)))
    return network.eval()


def build(name: str) -> nn.Module:
    # MLLA has tables of positions for one image size.
    extra: dict[str, Any] = {"img_size": 64} if name == "mlla_t" else {}
    if name == "care_tiny":
        extra["depths"] = (1, 1, 1, 1)  # a block a stage: of both kinds, half as many
    return steady_weights(timm.create_model(name, pretrained=False, num_classes=10, **extra))


def random_images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def relative_error(found: np.ndarray[Any, Any], expected: Tensor) -> float:
    reference = expected.numpy()
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@torch.inference_mode()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    return torch.as_tensor(network(images))


def test_care_tiny_fused(convert: Convert) -> None:
    """The converted network, a batch larger than the saved one, both modes, and module names."""
    network = fuse(build("care_tiny"))
    images = random_images(6, 32)
    path = convert(network, images[:1])
    expected = logits_of(network, images)

    exact = MilExecutor(path, precision="float32", record=True)
    assert relative_error(exact.logits(images.numpy()), expected) < 1e-3
    half = MilExecutor(path).logits(images.numpy())
    assert relative_error(half, expected) < 5e-3
    narrow = MilExecutor(path, accumulate="float16").logits(images.numpy())
    assert relative_error(narrow, expected) < 2e-2

    exported = torch.export.export(network, (images[:1],)).run_decompositions({})
    owners = module_owners(exported)
    modules = dict(network.named_modules())
    # What the network's own `forward` computes belongs to "", the network itself.
    assert all(entry.module in modules for entry in exact.ranges(owners))
    convolutions = [entry for entry in exact.ranges(owners) if entry.operation == "conv"]
    assert all(entry.module for entry in convolutions)
    assert all(entry.overflows == 0 for entry in exact.ranges())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "fused"),
    [
        pytest.param("care_s0", "iOS17", True, marks=pytest.mark.soak),
        pytest.param("care_s0", "iOS16", False, marks=pytest.mark.soak),
        ("test_efficientnet", "iOS16", False),
        ("test_convnext", "iOS18", False),
        pytest.param("mobilenetv4_conv_small", "iOS16", False, marks=pytest.mark.soak),
        pytest.param("fastvit_t8", "iOS18", False, marks=pytest.mark.soak),
        pytest.param("mlla_t", "iOS17", False, marks=pytest.mark.soak),
    ],
)
def test_network_matches_torch(convert: Convert, name: str, target: str, fused: bool) -> None:
    network = build(name)
    if fused:
        network = fuse(network)
    images = random_images(2, 64)
    path = convert(network, images[:1], target)
    executor = MilExecutor(path, precision="float32")
    expected = logits_of(network, images)
    found = executor.logits(images.numpy())
    assert relative_error(found, expected) < 2e-3
    np.testing.assert_array_equal(found.argmax(1), expected.numpy().argmax(1))
    if name != "mlla_t" and (fused or not name.startswith("care")):
        assert relative_error(MilExecutor(path).logits(images.numpy()), expected) < 1e-2


@pytest.mark.slow
def test_quantized_activations(convert: Convert) -> None:
    """W8A8: quantize and dequantize operations as a network with calibrated scales exports them."""

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 10, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self._rounded(self.first(self._rounded(x, 0.02)).relu(), 0.03)
            return torch.mean(self.second(x), (2, 3))

        def _rounded(self, x: Tensor, scale: float) -> Tensor:
            kernels = torch.ops.quantized_decomposed
            q = kernels.quantize_per_tensor(x, scale, 0, -128, 127, torch.int8)
            return torch.as_tensor(
                kernels.dequantize_per_tensor(q, scale, 0, -128, 127, torch.int8)
            )

    # Importing it registers `quantized_decomposed`.
    import torch.ao.quantization.fx._decomposed

    network = steady_weights(Quantized())
    images = random_images(3, 12)
    path = convert(network, images[:1], "iOS17")
    executor = MilExecutor(path, precision="float32")
    assert executor.operations()["quantize"] == 2
    assert relative_error(executor.logits(images.numpy()), logits_of(network, images)) < 1e-2
