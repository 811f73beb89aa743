"""Where a graph departs from its float32 graph: twenty faults, and what is no fault."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from calibration.observe import magnitudes, observe
from calibration.ranges import ACTIVATIONS_UINT8, Method
from calibration.sample import CalibrationSet
from calibration.table import make_table
from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.network import Network
from pipeline.emulate.layers import LayerError, by_module, jump, rows
from pipeline.emulate.onnx.layers import Comparison, compare
from pipeline.graphs import equalize, float16, qdq_ort
from pipeline.graphs.passes import finish_portable, for_ort, optimize
from pipeline.stages.export import trace
from pipeline.targets.forms import FormJob
from pipeline.targets.tensorrt.quantize import Int8Trt
from tests.pipeline.emulate.faults import KINDS, NETWORKS, SIDE, Block, Fault, Kind, fault

TWENTY = [(kind, network) for network in range(NETWORKS) for kind in KINDS]
IMAGES = np.random.default_rng(0).standard_normal((16, 3, SIDE, SIDE)).astype(np.float32)

Convert = Callable[[onnx.ModelProto, Path], onnx.ModelProto]


@functools.cache
def exported(network: int) -> onnx.ModelProto:
    return trace(fault("wrong scale", network).right, IMAGES[:2])


def graph_of(module: nn.Module, network: int) -> onnx.ModelProto:
    """The exported graph with the module's weights and orders of axes: as tracing it would give."""
    model = onnx.ModelProto()
    model.CopyFrom(exported(network))
    weights = module.state_dict()
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            value = weights[tensor.name].numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    turns = [node for node in model.graph.node if node.op_type == "Transpose"]
    blocks = module.get_submodule("blocks")
    assert len(turns) == len(list(blocks.children()))
    for turn, block in zip(turns, blocks.children(), strict=True):
        assert isinstance(block, Block)
        del turn.attribute[:]
        turn.attribute.append(helper.make_attribute("perm", block.turn.order))
    return model


def half(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    return float16.to_half(model, float16.FLOAT16)[0]


def int8(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    source, made = folder / "source.onnx", folder / "int8.onnx"
    onnx.save(model, source)
    images = CalibrationSet(IMAGES, np.arange(len(IMAGES)) % 5, ("",) * len(IMAGES))
    network = Network("small", tuple("abcde"), (3, SIDE, SIDE), {})
    Int8Trt().convert(FormJob(source, network, {}, lambda: images, lambda line: None), made)
    return onnx.load(made)


def rewritten(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """As the float32 build of ONNX Runtime has it."""
    import onnx_ir as ir

    graph = ir.from_proto(model)
    optimize(graph, [*for_ort(16), *finish_portable()])
    return ir.to_proto(graph)


def int8_ort(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """As the 8-bit form of ONNX Runtime has it, with all that can be in 8 bits."""
    prepared = rewritten(model, folder)
    statistics = observe(prepared, IMAGES, qdq_ort.activations(prepared))
    table = make_table(statistics, Method.MSE, ACTIVATIONS_UINT8, images=len(IMAGES))
    return qdq_ort.insert_pairs(prepared, table.ranges, qdq_ort.candidates_of(prepared))


def found(case: Fault, convert: Convert, folder: Path) -> LayerError | None:
    built = convert(graph_of(case.wrong, case.network), folder)
    return jump(compare(built, graph_of(case.right, case.network), IMAGES[:4]))


@pytest.mark.parametrize(("kind", "network"), TWENTY)
def test_half_precision_names_the_layer_at_fault(kind: Kind, network: int, tmp_path: Path) -> None:
    case = fault(kind, network)
    error = found(case, half, tmp_path)
    assert error is not None
    assert error.module == case.module
    assert np.isnan(error.relative) == (kind == "overflow")


# float32 has room for the values that overflow float16.
HELD = [(kind, network) for kind, network in TWENTY if kind != "overflow"]


@pytest.mark.parametrize(("kind", "network"), HELD)
def test_a_rewritten_graph_names_the_layer_at_fault(
    kind: Kind, network: int, tmp_path: Path
) -> None:
    case = fault(kind, network)
    error = found(case, rewritten, tmp_path)
    assert error is not None
    assert error.module == case.module


@pytest.mark.parametrize(("kind", "network"), TWENTY)
def test_eight_bits_name_the_layer_at_fault(kind: Kind, network: int, tmp_path: Path) -> None:
    case = fault(kind, network)
    error = found(case, int8, tmp_path)
    assert error is not None
    assert error.module == case.module


@pytest.mark.parametrize(("kind", "network"), HELD)
def test_eight_bits_of_onnx_runtime_name_the_layer_at_fault(
    kind: Kind, network: int, tmp_path: Path
) -> None:
    case = fault(kind, network)
    error = found(case, int8_ort, tmp_path)
    assert error is not None
    assert error.module == case.module


@pytest.mark.parametrize("convert", [half, int8, int8_ort, rewritten])
@pytest.mark.parametrize("network", range(NETWORKS))
def test_what_is_sound_jumps_nowhere(network: int, convert: Convert, tmp_path: Path) -> None:
    right = fault("wrong scale", network).right
    model = graph_of(right, network)
    assert jump(compare(convert(model, tmp_path), model, IMAGES[:4])) is None


def test_layers_are_those_of_the_network() -> None:
    right = fault("wrong scale", 0).right
    model = graph_of(right, 0)
    errors = compare(float16.to_half(model, float16.FLOAT16)[0], model, IMAGES[:4])
    modules = [error.module for error in by_module(errors)]
    block = ["expand", "act", "turn", "shrink"]
    parts = [f"blocks.{i}.{name}" for i in range(2) for name in block]
    assert [name for name in modules if name not in ("blocks.0", "blocks.1")] == [
        "stem",
        *parts,
        "head",
    ]
    assert {error.dtype for error in errors} == {"float16"}
    assert [error.line for error in errors] == sorted(error.line for error in errors)
    assert all(0 <= (error.own or 0) <= error.relative + 1e-3 < 5e-3 for error in errors)


def test_a_layer_errs_no_more_than_itself() -> None:
    """What comes behind the fault inherits its error, and none of it is its own."""
    case = fault("lost bias", 0)
    built, reference = graph_of(case.wrong, 0), graph_of(case.right, 0)
    own = {error.tensor: error.own for error in compare(built, reference, IMAGES[:4])}
    assert [name for name, error in own.items() if error] == ["conv2d_2"]


def test_a_row_of_a_module_at_fault_shows_the_fault() -> None:
    case = fault("swapped axis", 1)
    built, reference = graph_of(case.wrong, 1), graph_of(case.right, 1)
    table = rows(compare(built, reference, IMAGES[:4]))
    assert [row["module"] for row in table if row["jump"]] == [case.module]
    assert {"module", "operation", "line", "relative", "largest", "own", "jump"} <= set(table[0])


def test_a_wrong_shape_is_a_fault_and_what_follows_is_unknown() -> None:
    reference = graph_of(fault("wrong scale", 0).right, 0)
    built = onnx.ModelProto()
    built.CopyFrom(reference)
    turn = next(node for node in built.graph.node if node.op_type == "Transpose")
    del turn.attribute[:]
    turn.attribute.append(helper.make_attribute("perm", [1, 0, 3, 2]))
    del built.graph.value_info[:]
    errors = compare(built, reference, IMAGES[:1])
    first = jump(errors)
    assert first is not None
    assert first.module == "blocks.0.turn"
    after = [error for error in errors if error.line > first.line]
    assert all(np.isnan(error.relative) for error in after)
    assert all(error.own == 0 for error in after)


def equalized(spread: float) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A graph whose channels differ, and the same with even ones, in 8 bits."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()).eval()
    with torch.no_grad():
        net.get_parameter("0.weight").mul_(torch.exp2(spread * torch.randn(16, 1, 1, 1)))
    model = trace(net, IMAGES[:2])
    seen = magnitudes(model, IMAGES, equalize.tensors(model))
    return model, equalize.equalize(model, seen).model


def quantized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    source, made = folder / "even.onnx", folder / "even8.onnx"
    onnx.save(model, source)
    images = CalibrationSet(IMAGES, np.arange(len(IMAGES)) % 5, ("",) * len(IMAGES))
    network = Network("even", tuple("abcde"), (3, SIDE, SIDE), {})
    Int8Trt().convert(FormJob(source, network, {}, lambda: images, lambda line: None), made)
    return onnx.load(made)


def test_equalized_channels_are_the_same_in_other_units(tmp_path: Path) -> None:
    model, even = equalized(3.0)
    errors = compare(quantized(even, tmp_path), model, IMAGES[:4])
    assert jump(errors) is None
    assert max(error.relative for error in errors) < 0.1


def test_one_factor_for_all_channels_is_no_equalization(tmp_path: Path) -> None:
    model, _ = equalized(0.0)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    for tensor in wrong.graph.initializer:
        if tensor.name in ("0.weight", "0.bias"):
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
    first = jump(compare(quantized(wrong, tmp_path), model, IMAGES[:4]))
    assert first is not None
    assert first.module == "0"


def test_a_fixed_batch_gets_whole_ones() -> None:
    model = graph_of(fault("wrong scale", 0).right, 0)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert max(error.relative for error in compare(fixed, model, IMAGES[:3])) < 1e-6


def test_a_reference_of_another_network() -> None:
    def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
        for node in model.graph.node:
            node.input[:] = [name if "." in name else f"other_{name}" for name in node.input]
            node.output[:] = [f"other_{name}" for name in node.output]
        for value in (*model.graph.input, *model.graph.output):
            value.name = f"other_{value.name}"
        for tensor in model.graph.initializer:
            if "." not in tensor.name:
                tensor.name = f"other_{tensor.name}"
        return model

    model = graph_of(fault("wrong scale", 0).right, 0)
    with pytest.raises(ArtifactError, match="it is of another network"):
        compare(renamed(graph_of(fault("wrong scale", 0).right, 0)), model, IMAGES[:2])


def test_images_of_the_wrong_size() -> None:
    model = graph_of(fault("wrong scale", 0).right, 0)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    with pytest.raises(DataError, match=r"images of shape \(2, 3, 8, 8\) do not fit"):
        compare(fixed, model, IMAGES[:2, :, :8, :8])


def test_a_network_that_is_out_of_any_range() -> None:
    model = graph_of(fault("wrong scale", 0).right, 0)
    for tensor in model.graph.initializer:
        if tensor.name == "blocks.1.expand.weight":
            value = np.float32(3e38) * np.sign(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    with pytest.raises(ArtifactError, match=r"conv2d_3 \(Conv\) is not finite in float32"):
        compare(model, model, IMAGES[:2])


def test_a_constant_that_is_no_number() -> None:
    model = graph_of(fault("wrong scale", 0).right, 0)
    for tensor in model.graph.initializer:
        if tensor.name == "blocks.1.expand.weight":
            value = numpy_helper.to_array(tensor).copy()
            value[0, 0, 0, 0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    with pytest.raises(ArtifactError, match=r"blocks\.1\.expand\.weight holds NaN"):
        Comparison(model, model)


def erring(*own: float, dtype: str = "float16") -> list[LayerError]:
    return [
        LayerError("", f"t{i}", "Conv", i, 1.0, 1.0, error, dtype) for i, error in enumerate(own)
    ]


def place(errors: list[LayerError]) -> int | None:
    found = jump(errors)
    return None if found is None else found.line


def test_what_is_usual_comes_from_the_layers_of_the_same_type() -> None:
    assert place(erring(1e-4, 1e-4, 5e-3, 1e-4)) == 2
    assert place(erring(2e-3, 2e-3, 5e-3, 1e-4)) is None, "the median is 2e-3"
    assert place(erring(2e-3, 5e-2, 9e-2)) is None
    assert place(erring(2e-3, 9e-2)) == 1, "the lower one of two"
    assert place(erring(0.02, 0.03, 0.09, 0.04, dtype="int8")) is None
    assert place(erring(0.02, 0.03, 0.17, 0.04, dtype="int8")) == 2
    assert place(erring(0.02, 0.03, 0.15, 0.04, dtype="int8")) is None, "a sound network has 0.11"
    assert place(erring(0.2, 0.2, 0.2, 0.26, dtype="int8")) == 3, "beyond a quarter, always"
    assert place([*erring(*[0.03] * 5, dtype="int8"), *erring(1e-4, 6e-3)]) == 1
    assert place(erring(float("nan"), 0.0)) == 0
