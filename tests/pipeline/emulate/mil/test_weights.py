"""Compressed weights: against coremltools' own decompression, and the format's worked examples."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import ArtifactError
from pipeline.emulate.mil.constants import Array, unpack_bits
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.weights import (
    constexpr_affine_dequantize,
    constexpr_blockwise_shift_scale,
    constexpr_cast,
    constexpr_lut_to_dense,
    constexpr_lut_to_sparse,
    constexpr_sparse_blockwise_shift_scale,
    constexpr_sparse_to_dense,
)

pytestmark = [
    # coremltools leaves its models' temporary folders to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    # Its quantization divides by the range of all-zero blocks.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:coremltools"),
]

Compress = Callable[[Any, Any], Any]


@pytest.fixture(scope="module")
def ct() -> Any:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def models(ct: Any) -> Callable[[str], Any]:
    """A network of a convolution and a linear layer, float16, for a deployment target."""
    made: dict[str, Any] = {}

    def make(target: str) -> Any:
        if target in made:
            return made[target]
        mb = ct.converters.mil.Builder
        version = getattr(ct.target, target)
        random = np.random.default_rng(0)
        kernel = random.standard_normal((32, 16, 3, 3)).astype(np.float32)
        weight = random.standard_normal((10, 512)).astype(np.float32)

        @mb.program(input_specs=[mb.TensorSpec((1, 16, 6, 6))], opset_version=version)  # type: ignore[untyped-decorator]
        def program(x: Any) -> Any:
            x = mb.conv(x=x, weight=kernel, bias=kernel[:, 0, 0, 0])
            return mb.linear(x=mb.reshape(x=x, shape=[1, 512]), weight=weight, bias=weight[:, 0])

        made[target] = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=version,
            skip_model_load=True,
        )
        return made[target]

    return make


def _quantize(cto: Any, **settings: Any) -> Any:
    config = cto.OpLinearQuantizerConfig(weight_threshold=0, **settings)
    return cto.OptimizationConfig(global_config=config)


def _palettize(cto: Any, **settings: Any) -> Any:
    config = cto.OpPalettizerConfig(mode="uniform", weight_threshold=0, **settings)
    return cto.OptimizationConfig(global_config=config)


def _prune(cto: Any, model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=config))


def linear(**settings: Any) -> Compress:
    return lambda cto, model: cto.linear_quantize_weights(model, _quantize(cto, **settings))


def palette(**settings: Any) -> Compress:
    return lambda cto, model: cto.palettize_weights(model, _palettize(cto, **settings))


def pruned_and_linear(cto: Any, model: Any) -> Any:
    config = _quantize(cto, mode="linear_symmetric")
    return cto.linear_quantize_weights(_prune(cto, model), config, joint_compression=True)


def pruned_and_palette(cto: Any, model: Any) -> Any:
    return cto.palettize_weights(
        _prune(cto, model), _palettize(cto, nbits=4), joint_compression=True
    )


def palette_and_linear(cto: Any, model: Any) -> Any:
    config = _quantize(cto, mode="linear_symmetric", granularity="per_tensor")
    coarse = cto.palettize_weights(model, _palettize(cto, nbits=4))
    return cto.linear_quantize_weights(coarse, config, joint_compression=True)


FORMS: list[tuple[str, str, Compress, set[str]]] = [
    ("int8", "iOS16", linear(mode="linear_symmetric"), {"constexpr_affine_dequantize"}),
    ("uint8", "iOS16", linear(mode="linear", dtype=np.uint8), {"constexpr_affine_dequantize"}),
    ("8-bit palette", "iOS16", palette(nbits=8), {"constexpr_lut_to_dense"}),
    ("6-bit palette", "iOS16", palette(nbits=6), {"constexpr_lut_to_dense"}),
    ("4-bit palette", "iOS17", palette(nbits=4), {"constexpr_lut_to_dense"}),
    ("1-bit palette", "iOS16", palette(nbits=1), {"constexpr_lut_to_dense"}),
    ("pruned", "iOS16", _prune, {"constexpr_sparse_to_dense"}),
    ("int8 of iOS 18", "iOS18", linear(), {"constexpr_blockwise_shift_scale"}),
    (
        "int4 blocks",
        "iOS18",
        linear(dtype="int4", granularity="per_block", block_size=8),
        {"constexpr_blockwise_shift_scale"},
    ),
    (
        "uint4 blocks",
        "iOS18",
        linear(mode="linear", dtype="uint4", granularity="per_block", block_size=8),
        {"constexpr_blockwise_shift_scale"},
    ),
    ("6-bit palette of iOS 18", "iOS18", palette(nbits=6), {"constexpr_lut_to_dense"}),
    ("3-bit palette of iOS 18", "iOS18", palette(nbits=3), {"constexpr_lut_to_dense"}),
    (
        "palettes by channel groups",
        "iOS18",
        palette(nbits=4, granularity="per_grouped_channel", group_size=2),
        {"constexpr_lut_to_dense"},
    ),
    ("pruned of iOS 18", "iOS18", _prune, {"constexpr_sparse_to_dense"}),
    (
        "pruned and int8",
        "iOS18",
        pruned_and_linear,
        {"constexpr_sparse_blockwise_shift_scale", "constexpr_sparse_to_dense"},
    ),
    (
        "pruned and palette",
        "iOS18",
        pruned_and_palette,
        {"constexpr_lut_to_sparse", "constexpr_sparse_to_dense"},
    ),
    (
        "palette of int8",
        "iOS18",
        palette_and_linear,
        {"constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"},
    ),
]


@pytest.mark.parametrize(
    ("target", "compress", "operations"),
    [form[1:] for form in FORMS],
    ids=[form[0] for form in FORMS],
)
def test_compressed_form_equals_decompress_weights(
    ct: Any,
    models: Callable[[str], Any],
    tmp_path: Path,
    target: str,
    compress: Compress,
    operations: set[str],
) -> None:
    cto = ct.optimize.coreml
    compressed = compress(cto, models(target))
    dense = cto.decompress_weights(compressed)
    compressed.save(str(tmp_path / "compressed.mlpackage"))
    dense.save(str(tmp_path / "dense.mlpackage"))

    executor = MilExecutor(tmp_path / "compressed.mlpackage")
    assert operations <= set(executor.operations())
    expected = MilExecutor(tmp_path / "dense.mlpackage")
    assert not any(name.startswith("constexpr") for name in expected.operations())

    images = np.random.default_rng(1).standard_normal((2, 16, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(executor.logits(images), expected.logits(images))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_numbers_start_at_the_least_significant_bit(bits: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << bits, 37)
    stream = sum(int(number) << bits * place for place, number in enumerate(numbers))
    packed = stream.to_bytes(-(-37 * bits // 8), "little")
    np.testing.assert_array_equal(unpack_bits(packed, bits, 37), numbers)


def test_affine_dequantization_along_an_axis() -> None:
    data = np.array([[10, 20], [30, 40]], np.uint8)
    found = constexpr_affine_dequantize(
        quantized_data=data,
        zero_point=np.array([10, 20], np.uint8),
        scale=np.array([0.5, 2.0], np.float32),
        axis=np.int32(-1),
    )
    np.testing.assert_array_equal(found, [[0, 0], [10, 40]])


def test_blocks_have_their_own_scale_and_offset() -> None:
    found = constexpr_blockwise_shift_scale(
        data=np.array([[1, 2, 3, 4]], np.int8),
        scale=np.array([[2, 10]], np.float16),
        offset=np.array([[1, 3]], np.int8),
    )
    np.testing.assert_array_equal(found, [[0, 2, 0, 10]])


def test_palettes_by_group_as_documented() -> None:
    """Case 1 in the documentation of iOS 18's `constexpr_lut_to_dense`."""
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    lut = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float16).reshape(2, 1, 4, 1)
    found = constexpr_lut_to_dense(indices=indices, lut=lut)
    expected = [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (
            1,
            [
                [[1, 1], [2, 2], [3, 3], [4, 1], [5, 2], [6, 3]],
                [[4, 4], [5, 5], [6, 6], [1, 1], [2, 2], [3, 3]],
            ],
        ),
        (
            -1,
            [
                [[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]],
                [[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3]],
            ],
        ),
    ],
)
def test_vector_palettes_as_documented(axis: int, expected: list[Any]) -> None:
    """Case 2 in the documentation of iOS 18's `constexpr_lut_to_dense`."""
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    lut = np.array([1, 2, 3, 4, 5, 6], np.int8).reshape(1, 1, 1, 2, 3)
    found = constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=np.int32(axis))
    np.testing.assert_array_equal(found, expected)


def test_sparse_palette_with_vectors_as_documented() -> None:
    mask = np.array([[1, 0], [1, 1]], np.uint8)
    lut = np.array([[2, 2], [3, 4]], np.float16).reshape(1, 1, 2, 2)
    spread, values = constexpr_lut_to_sparse(
        indices_mask=mask,
        indices_nonzero_data=np.array([1, 0, 1], np.uint8),
        lut=lut,
        vector_axis=np.int32(0),
    )
    np.testing.assert_array_equal(spread, [[1, 0], [1, 0], [1, 1], [1, 1]])
    dense = constexpr_sparse_to_dense(nonzero_data=values, mask=spread)
    np.testing.assert_array_equal(dense, [[3, 0], [4, 0], [2, 3], [2, 4]])


def test_sparse_quantization_as_documented() -> None:
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], np.uint8)
    _, values = constexpr_sparse_blockwise_shift_scale(
        data_mask=mask,
        nonzero_data=np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8),
        scale=np.array([[0.1, 0.2, 0.3, 0.4]], np.float32),
        offset=np.array([[1, 2, 3, 4]], np.int8),
    )
    np.testing.assert_allclose(values, [0.9, 1.8, 0.2, 0.4, 0.6, 0.9, 1.2, 0.7, 1.4], rtol=1e-6)


def test_constant_cast() -> None:
    source: Array = np.array([1.5], np.float16)
    assert np.asarray(constexpr_cast(source_val=source, output_dtype="fp32")).dtype == np.float32


def test_weight_that_does_not_fit_its_mask_is_named(
    ct: Any, models: Callable[[str], Any], tmp_path: Path
) -> None:
    path = tmp_path / "pruned.mlpackage"
    _prune(ct.optimize.coreml, models("iOS18")).save(str(path))
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(weights.read_bytes())
    # Set all bits of the first mask; its record begins with the sentinel and the kind 9 (UINT1).
    record = content.index(struct.pack("<II", 0xDEADBEEF, 9))
    size, start = struct.unpack_from("<QQ", content, record + 8)
    content[start : start + size] = b"\xff" * size
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"'constexpr_sparse_to_dense'.*does not fit its data"):
        MilExecutor(path)
