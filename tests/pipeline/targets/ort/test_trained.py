"""What a checkpoint says of the precision that it was fine-tuned in, and when that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from calibration.ranges import WEIGHTS_INT7
from pipeline.core.described import QUANTIZED, Quantized, described_by
from pipeline.core.errors import BuildError, CheckpointError, ConfigError
from pipeline.graphs.qdq_ort import activations
from pipeline.targets.ort.trained import (
    insert_trained,
    ranges_of,
    stated_precision,
    weights_scheme,
)

Graph = Callable[..., onnx.ModelProto]


def quantized(model: onnx.ModelProto) -> Quantized:
    return Quantized("ort/int7", dict.fromkeys(activations(model), (-2.0, 3.0)))


def saved(model: onnx.ModelProto, path: Path, stated: str | None) -> Path:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if stated is not None:
        made.metadata_props.append(onnx.StringStringEntryProto(key=QUANTIZED, value=stated))
    onnx.save(made, path)
    return path


def test_a_graph_says_in_which_precision_its_network_learned(
    small_graph: Graph, tmp_path: Path
) -> None:
    model = small_graph()
    stated = quantized(model)
    assert stated_precision(saved(model, tmp_path / "a.onnx", None)) is None
    path = saved(model, tmp_path / "b.onnx", json.dumps(stated.to_dict()))
    assert stated_precision(path) == stated
    other = json.dumps(Quantized("coreml/palette4", {}).to_dict())
    assert stated_precision(saved(model, tmp_path / "c.onnx", other)) is None
    assert {(r.low, r.high) for r in ranges_of(stated, model).values()} == {(-2.0, 3.0)}


def test_every_layer_is_quantized_with_its_bits(small_graph: Graph) -> None:
    model = small_graph()
    made = insert_trained(model, quantized(model))
    assert made.scheme == WEIGHTS_INT7
    assert [layer.weight for layer in made.layers] == [
        node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm")
    ]
    assert [layer.bias for layer in made.layers] == [
        "".join(node.input[2:]) for node in model.graph.node if node.op_type in ("Conv", "Gemm")
    ]


def test_ranges_of_another_graph_are_refused(small_graph: Graph) -> None:
    with pytest.raises(BuildError, match=r"in ort/int7 in another graph: .* no range of image \("):
        ranges_of(Quantized("ort/int7", {}), small_graph())


def test_a_precision_of_another_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="'trt/int4': take ort/int8, ort/int7"):
        weights_scheme("trt/int4")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{", "quantized is no JSON"),
        ("[]", "no mapping"),
        ('{"precision": "ort/int7"}', "ranges"),
        ('{"precision": "ort/int7", "ranges": {"x": [2.0, 1.0]}}', r"range of x is \[2.0, 1.0\]"),
    ],
)
def test_what_makes_no_sense_is_refused(
    small_graph: Graph, tmp_path: Path, stated: str, message: str
) -> None:
    path = saved(small_graph(), tmp_path / "model.onnx", stated)
    with pytest.raises(BuildError, match=message) as caught:
        stated_precision(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_ranges_that_make_no_sense_is_refused() -> None:
    stated = {QUANTIZED: {"precision": "ort/int7", "ranges": {"x": [0.0, float("nan")]}}}
    with pytest.raises(CheckpointError, match=r"range of x is \[0.0, nan\]"):
        described_by(stated, Path("a.safetensors"))
