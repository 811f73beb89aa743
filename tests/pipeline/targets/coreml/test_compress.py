from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibration.kept import Kept
from pipeline.core import figures
from pipeline.core.errors import BuildError
from pipeline.core.network import Network
from pipeline.core.preprocess import Pictures
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.onnx.module import GraphModule
from pipeline.stages.export import trace
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob
from pipeline.targets.coreml.compress import INT8, PALETTE4, PALETTE6, Scheme, palette, simulate
from pipeline.targets.coreml.quantize import with_quantized_inputs
from pipeline.targets.coreml.search import SCHEMES, Search, WeightFile
from pipeline.targets.coreml.target import CoreMLTarget

Build = Callable[..., Artifact]
PRUNED = Scheme("pruned", sparsity=0.75)


@pytest.fixture
def weight() -> Any:
    return np.random.default_rng(0).normal(size=(24, 16, 3, 3)).astype(np.float16)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_palette_is_better_than_a_uniform_one(weight: Any, bits: int) -> None:
    table, indices = palette(weight, bits)
    assert table.dtype == np.float16
    assert len(table) == 2**bits
    assert (np.diff(table) >= 0).all()
    values = weight.astype(np.float64).ravel()
    uniform = np.linspace(values.min(), values.max(), 2**bits)
    best = np.abs(values[:, None] - uniform).min(1)
    ours = values - table[indices].astype(np.float64)
    assert (ours**2).mean() < (best**2).mean()
    # Each value has the index of its nearest entry.
    nearest = np.abs(values[:, None] - table.astype(np.float64)).min(1)
    np.testing.assert_allclose(np.abs(ours), nearest, atol=1e-12)


def test_palette_of_few_values_is_exact() -> None:
    weight = np.array([[0.5, -1.0], [0.5, 3.0]], np.float16)
    table, indices = palette(weight, 4)
    np.testing.assert_array_equal(table[indices].reshape(2, 2), weight)


@pytest.mark.parametrize("scheme", [INT8, PALETTE6, PALETTE4, PRUNED])
def test_simulation_is_idempotent_and_smaller(weight: Any, scheme: Scheme) -> None:
    once = simulate(weight, scheme)
    assert once.dtype == weight.dtype
    assert once.shape == weight.shape
    np.testing.assert_allclose(simulate(once, scheme), once, rtol=0.02, atol=1e-6)
    assert scheme.bytes(weight) < weight.nbytes


def test_channels_of_zeros_stay_zero() -> None:
    np.testing.assert_array_equal(simulate(np.zeros((2, 3), np.float16), INT8), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("precision", "system", "kind", "agreement"),
    [
        ("int8", "iOS16", "constexpr_affine_dequantize", 0.98),
        ("int8", "iOS18", "constexpr_blockwise_shift_scale", 0.98),
        ("palette6", "iOS16", "constexpr_lut_to_dense", 0.9),
        ("palette4", "iOS18", "constexpr_lut_to_dense", 0.5),
        ("pruned50", "iOS16", "constexpr_sparse_to_dense", 0.0),
        ("pruned75", "iOS18", "constexpr_sparse_to_dense", 0.0),
        ("pruned50_int8", "iOS18", "constexpr_sparse_blockwise_shift_scale", 0.0),
        ("pruned50_palette6", "iOS18", "constexpr_lut_to_sparse", 0.0),
        ("w8a8", "iOS17", "constexpr_affine_dequantize", 0.9),
    ],
)
def test_compressed_packages(
    build: Build,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    precision: str,
    system: str,
    kind: str,
    agreement: float,
) -> None:
    built = build(precision, deployment_target=system)
    assert built.facts["operations"][kind] >= 3
    pictures = make_photos(64, make_network())
    runner = CoreMLTarget().emulate(built, None)
    assert runner is not None
    with torch.inference_mode():
        expected = tiny()(torch.from_numpy(pictures.images)).numpy()
    assert figures.compare(runner(pictures.pixels), expected).agreement >= agreement


@pytest.mark.parametrize(
    ("precision", "system", "schemes"),
    [
        ("int8", "iOS16", [INT8]),
        ("palette6", "iOS16", [PALETTE6]),
        ("pruned75", "iOS18", [PRUNED]),
        ("pruned50_int8", "iOS18", [Scheme("pruned", sparsity=0.5), INT8]),
    ],
)
def test_simulation_gives_the_logits_of_the_real_package(
    build: Build,
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    tmp_path: Path,
    precision: str,
    system: str,
    schemes: list[Scheme],
) -> None:
    of = make_network()
    pixels = make_photos(16, of).pixels
    weights = WeightFile(build().folder / "model.mlpackage", 32)
    values = {
        name: functools.reduce(simulate, schemes, weight)
        for name, weight in weights.tensors.items()
    }
    simulated = MilExecutor(weights.replaced(values, tmp_path / "simulated.mlpackage"))
    real = MilExecutor(build(precision, deployment_target=system).folder / "model.mlpackage")
    found = figures.compare(simulated.predict(pixels)["logits"], real.predict(pixels)["logits"])
    assert found.relative_error < 2e-3


def test_w8a8_quantizes_what_enters_every_layer_but_the_first(
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
) -> None:
    module = tiny()
    images = make_photos(16, make_network()).images
    quantized, scales = with_quantized_inputs(module, images)
    assert set(scales) == {"mixer", "wide", "head"}
    with torch.inference_mode():
        inputs = torch.from_numpy(images)
        largest = nn.functional.gelu(module.stem(inputs)).abs().max().item()  # type: ignore[operator]
        assert scales["mixer"] <= largest / 127 * 1.001
        found = figures.compare(quantized(inputs).numpy(), module(inputs).numpy())
    assert 0 < found.relative_error < 0.1
    assert (
        type(module.get_submodule("mixer").forward).__name__ == "method"
    )  # the original is untouched


def test_w8a8_of_a_graph_is_that_of_its_network(
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    make_job: Callable[..., BuildJob],
    tmp_path: Path,
) -> None:
    images = make_photos(16, make_network()).images
    model = trace(tiny(), images[:2], dynamic=True)
    given = GraphModule(model, (3, 16, 16))
    of_network = with_quantized_inputs(tiny(), images)[1]
    quantized, of_graph = with_quantized_inputs(given, images)
    assert sorted(of_graph.values()) == pytest.approx(sorted(of_network.values()), rel=1e-5)
    with torch.inference_mode():
        inputs = torch.from_numpy(images[:4])
        found = figures.compare(quantized(inputs).numpy(), given(inputs).numpy())
    assert 0 < found.relative_error < 0.1
    job = make_job("w8a8", lambda: GraphModule(model, (3, 16, 16)), deployment_target="iOS17")
    facts = CoreMLTarget().build(job, tmp_path)
    assert len(facts["activation_scales"]) == 3
    operations = MilExecutor(tmp_path / "model.mlpackage").operations()
    assert operations["quantize"] == 3


def test_w8a8_needs_layers(make_network: Callable[..., Network], make_photos: Any) -> None:
    with pytest.raises(BuildError, match="no convolution or linear layer after the first"):
        with_quantized_inputs(nn.Conv2d(3, 4, 1), make_photos(2, make_network()).images)


@pytest.fixture
def search(
    build: Build,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    tmp_path: Path,
) -> Search:
    of = make_network()
    pictures = make_photos(24, of)
    with torch.inference_mode():
        reference = tiny()(torch.from_numpy(pictures.images)).numpy()
    package = build().folder / "model.mlpackage"
    return Search(package, pictures.pixels, reference, 32, tmp_path)


def test_fewer_bits_are_more_sensitive(search: Search) -> None:
    errors = search.sensitivities()
    names = {name for name, _ in errors}
    assert len(names) == 4
    assert len(errors) == 4 * len(SCHEMES)
    for name in names:
        assert errors[name, PALETTE4] > errors[name, PALETTE6]
        assert errors[name, PALETTE4] > errors[name, INT8]


def test_search_finds_the_smallest_within_the_limit(search: Search) -> None:
    best, mixes = search.run(max_changed=0.05, max_size=None)
    assert best.changed <= 0.05
    assert best.size < mixes[0].size
    assert not mixes[0].schemes
    assert all(mix.size >= best.size for mix in mixes if mix.changed <= 0.05)
    loose, _ = search.run(max_changed=1.0, max_size=None)
    assert set(loose.schemes.values()) == {PALETTE4}


def test_search_says_what_is_out_of_reach(search: Search) -> None:
    with pytest.raises(BuildError, match="max_size_mb"):
        search.run(max_changed=0.05, max_size=10)
    with pytest.raises(BuildError, match="max_top1_drop"):
        search.run(max_changed=-1.0, max_size=None)


def test_a_search_that_was_killed_goes_on(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    logits = search._logits

    def counted(values: Any, pixels: Any) -> Any:
        asked.append(len(values))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return logits(values, pixels)

    place = tmp_path / "kept.jsonl"
    monkeypatch.setattr(search, "_logits", counted)
    monkeypatch.setattr(search, "_kept", Kept(place))
    with pytest.raises(KeyboardInterrupt):
        search.run(max_changed=0.05, max_size=None)
    done = len(asked)
    monkeypatch.setattr(search, "_kept", Kept(place))
    found = search.run(max_changed=0.05, max_size=None)
    evaluated = len(asked) - done
    monkeypatch.setattr(search, "_kept", Kept())
    assert search.run(max_changed=0.05, max_size=None) == found
    # Four were made before it was killed, one of them that of the package as it is.
    assert len(asked) - done - evaluated == evaluated + 3
    monkeypatch.setattr(search, "_kept", Kept(place))
    before = len(asked)
    assert search.run(max_changed=0.05, max_size=None) == found
    assert len(asked) == before


def test_auto_builds_what_the_search_chose(build: Build) -> None:
    built = build("auto", max_top1_drop=0.05)
    chosen = built.facts["chosen"]
    assert chosen["changed"] <= 0.05
    weights = built.facts["weights"]
    kinds = [row["chosen"] for row in weights if row["chosen"] != "float16"]
    assert chosen["tensors"] == {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    assert all(0 < row["int8"] < row["palette4"] for row in weights)
    errors = [row["int8"] for row in weights]
    assert errors == sorted(errors, reverse=True)
    assert built.facts["size"] == pytest.approx(chosen["size"], rel=0.1)
    assert built.facts["curve"][0]["tensors"] == {}


def test_nothing_to_compress(make_job: Callable[..., BuildJob], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="lower weight_threshold"):
        CoreMLTarget().build(make_job("auto", weight_threshold=10**6), tmp_path)
