from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    DataError,
    UnavailableError,
    UnsupportedOperatorError,
)
from pipeline.graphs.parts import Part, Recording
from pipeline.graphs.reduce import reduce, refused_alike
from pipeline.steps.artifact import Artifact
from pipeline.targets.tensorrt import api, limits
from pipeline.targets.tensorrt.build import EngineJob
from pipeline.targets.tensorrt.device import Gpu, find_gpu
from pipeline.targets.tensorrt.emulation import EmulatedRunner
from pipeline.targets.tensorrt.options import TrtOptions
from pipeline.targets.tensorrt.process import INTERNAL_FAULT
from pipeline.targets.tensorrt.target import TORCH, TrtTarget, cache_path

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

Build = Callable[..., Artifact]
Small = Callable[..., onnx.ModelProto]
TRT = TrtTarget()


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", "FLOAT"), ("tf32", "FLOAT"), ("fp16", "HALF")]
)
def test_engines_and_their_facts(
    build: Build, small: Small, no_gpu: None, precision: str, kind: str
) -> None:
    lines: list[str] = []
    built = build(small(), precision, log=lines.append, compute_capabilities=("8.6",))
    facts = built.facts
    engine = built.path("model.engine").read_bytes()
    assert facts["engine_sha256"] == hashlib.sha256(engine).hexdigest()
    assert facts["engine_bytes"] == len(engine)
    assert facts["compute_capabilities"] == ["8.6"]
    assert facts["tf32"] == (precision == "tf32")
    assert facts["batches"] == {"min": 1, "opt": 8, "max": 64}
    assert facts["input"] == {"name": "image", "dtype": "FLOAT", "shape": [-1, 3, 16, 16]}
    assert facts["output"]["dtype"] == "FLOAT"
    assert facts["layers"]["by_precision"][kind] >= 3
    assert facts["layers"]["by_kind"]["CONVOLUTION"] == 1
    weights = 8 * 27 + 4 * 8
    name, size = ("float16", 2) if precision == "fp16" else ("float32", 4)
    assert facts["weight_bytes"] == {name: weights * size, "int64": 16}
    assert set(facts["memory"]) == {"weights_bytes", "activations_bytes"}
    assert 0 < facts["memory"]["weights_bytes"] < 4 * weights * size
    assert facts["memory"]["activations_bytes"] > 0
    assert facts["cuda_major"] == api.cuda_major(api.RTX)
    assert facts["log"] == lines
    assert facts["warnings"] == []
    layers = json.loads(built.path("layers.json").read_text())
    assert {"name", "kind", "precision", "shape"} == set(layers[0])
    assert lines
    assert not [line for line in lines if line.startswith("error")]


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [
        ("fp16", ("7.5",)),
        ("bf16", ("8.0",)),
        ("fp16", ("12.0",)),
        ("fp32", ("8.6", "8.9", "12.0")),
    ],
)
def test_compute_capabilities(
    build: Build, small: Small, no_gpu: None, precision: str, capabilities: tuple[str, ...]
) -> None:
    built = build(small(), precision, compute_capabilities=capabilities)
    assert built.facts["compute_capabilities"] == list(capabilities)


def test_the_same_graph_gives_the_same_bytes(build: Build, small: Small, no_gpu: None) -> None:
    first = build(small(8), "fp16", compute_capabilities=("8.6", "8.9"))
    if not first.facts["fixed_addresses"]:
        pytest.skip("this machine does not let a process fix its addresses")
    # Of dozens one may differ, see docs/targets.md.
    again = [
        build(small(8), "fp16", compute_capabilities=("8.6", "8.9"), name=f"again-{number}").files
        for number in range(2)
    ]
    assert first.files in again or again[0] == again[1]


def test_tf32_is_another_engine(build: Build, small: Small, no_gpu: None) -> None:
    exact = build(small(8), "fp32", compute_capabilities=("8.6",), name="fp32")
    rounded = build(small(8), "tf32", compute_capabilities=("8.6",), name="tf32")
    assert exact.files["model.engine"].sha256 != rounded.files["model.engine"].sha256


def test_batches(build: Build, small: Small, no_gpu: None) -> None:
    options: dict[str, Any] = {"compute_capabilities": ("8.6",)}
    assert build(small(4), **options).facts["batches"] == {"min": 4, "opt": 4, "max": 4}
    fixed = build(small(), batch=2, **options)
    assert fixed.facts["batches"] == {"min": 2, "opt": 2, "max": 2}
    assert fixed.facts["input"]["shape"][0] == 2, "the engine itself states the batch"
    own = build(small(), batches=(1, 4, 32), workspace_mib=256, **options)
    assert own.facts["batches"] == {"min": 1, "opt": 4, "max": 32}


def linear_attention() -> onnx.ModelProto:
    """A single head beside two convolutions: TensorRT-RTX 1.7.1 dies on it with a single image."""
    rng = np.random.default_rng(3)

    def weight(name: str) -> TensorProto:
        return numpy_helper.from_array(rng.random((16, 1, 3, 3)).astype(np.float32), name)

    def conv(source: str, weights: str, result: str) -> onnx.NodeProto:
        return helper.make_node(
            "Conv", [source, weights], [result], result, group=16, pads=[1, 1, 1, 1]
        )

    nodes = [
        helper.make_node("Split", ["image"], ["q4", "k4", "v4"], "split", axis=1, num_outputs=3),
        *(helper.make_node("Reshape", [f"{n}4", "flat"], [n], f"flat_{n}") for n in "qkv"),
        helper.make_node("Transpose", ["k"], ["kt"], "transpose", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["v", "kt"], ["kv"], "kv"),
        helper.make_node("MatMul", ["kv", "q"], ["kvq"], "kvq"),
        helper.make_node("ReduceSum", ["k", "last"], ["sum"], "sum"),
        helper.make_node("Transpose", ["sum"], ["row"], "row", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["row", "q"], ["normalizer"], "normalizer"),
        helper.make_node("Div", ["kvq", "normalizer"], ["attended"], "divide"),
        helper.make_node("Reshape", ["attended", "square"], ["joined"], "square"),
        conv("q4", "w1", "branch1"),
        conv("k4", "w2", "branch2"),
        helper.make_node("Concat", ["joined", "branch1", "branch2"], ["logits"], "join", axis=1),
    ]
    shape: list[str | int | None] = ["batch", 48, 4, 4]
    constants = {"flat": [-1, 1, 16, 16], "square": [-1, 16, 4, 4], "last": [-1]}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [weight("w1"), weight("w2")]
        + [numpy_helper.from_array(np.array(v), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_batch_of_one_that_the_library_dies_of_gets_a_profile(build: Build, no_gpu: None) -> None:
    lines: list[str] = []
    facts = build(
        linear_attention(), batch=1, log=lines.append, compute_capabilities=("8.9",)
    ).facts
    assert facts["batches"] == {"min": 1, "opt": 1, "max": 1}
    assert any("trying a profile of 1 to 2 images" in line for line in lines)
    assert facts["profile"] == {"min": 1, "opt": 1, "max": 2}
    assert "TensorRT-RTX" in facts["why_wider"]
    (told,) = facts["workarounds"]
    assert told.endswith("for batches of 1 alone, and did with a profile of 1 to 2")


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "part.onnx"
    onnx.save(model, path)
    return path


def test_a_part_of_a_network_has_any_inputs_and_outputs(tmp_path: Path, no_gpu: None) -> None:
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [2, 3]) for n in "abcd"]
    nodes = [
        helper.make_node("Add", ["a", "b"], ["c"], "sum"),
        helper.make_node("Mul", ["a", "b"], ["d"], "product"),
    ]
    graph = helper.make_graph(nodes, "part", ports[:2], ports[2:])
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    lines: list[str] = []
    assert TRT.refusal(saved(part, tmp_path), "fp16", lines.append) is None
    assert lines, "what the library says goes to the log"
    graph.node[1].op_type = "Nonsense"
    wrong = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    said = TRT.refusal(saved(wrong, tmp_path), "fp16", lines.append)
    assert said is not None
    assert "node 'product' (Nonsense)" in said


def test_a_part_with_an_open_batch_is_built_for_many(tmp_path: Path, no_gpu: None) -> None:
    ports = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["4*batch", 3]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT16, ["4*batch", 1]),
        helper.make_tensor_value_info("c", TensorProto.FLOAT16, ["4*batch", 3]),
    ]
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])], "part", ports[:2], ports[2:]
    )
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    lines: list[str] = []
    assert TRT.refusal(saved(part, tmp_path), "fp16", lines.append) is None, lines
    # An axis of which nobody knows how long it may be has no profile.
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "any"
    unknown = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    said = TRT.refusal(saved(unknown, tmp_path), "fp16", lines.append)
    assert said is not None


def dying() -> onnx.ModelProto:
    """Two products with constants, their quotient, and what TensorRT-RTX 1.7.1 dies for."""
    rng = np.random.default_rng(0)
    shapes = {"k": (1, 1, 16, 16), "row": (1, 1, 1, 16), "filter": (1, 1, 3, 3)}
    nodes = [
        helper.make_node("Sigmoid", ["image"], ["before"], "before"),
        helper.make_node("Relu", ["before"], ["q"], "relu"),
        helper.make_node("MatMul", ["k", "q"], ["kq"], "kq"),
        helper.make_node("MatMul", ["row", "q"], ["sum"], "sum"),
        helper.make_node("Div", ["kq", "sum"], ["attended"], "divide"),
        helper.make_node("Conv", ["attended", "filter"], ["after"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["after"], ["logits"], "after"),
    ]
    graph = helper.make_graph(
        nodes,
        "dying",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT16, [1, 1, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, [1, 1, 16, 16])],
        [numpy_helper.from_array(rng.random(s).astype(np.float16), n) for n, s in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_the_library_dies_of_is_reduced(tmp_path: Path, no_gpu: None) -> None:
    def refusal(part: Part) -> str | None:
        return TRT.refusal(saved(part.model, tmp_path), "fp16", lambda line: None)

    image = np.random.default_rng(1).random((1, 1, 16, 16)).astype(np.float32)
    recorded = Recording(dying(), {"image": image})
    whole = recorded.part(range(len(recorded)))
    assert whole is not None
    first = refusal(whole)
    if first is None:
        pytest.skip("this TensorRT-RTX builds it")
    fails = refused_alike(refusal, partial(TRT.refused_alike, first))
    found = reduce(recorded, fails, seconds=600, say=lambda line: None)
    assert found is not None
    assert found.minimal
    assert fails(found.part), "of what is left it does"
    assert "MatMul" in [node.op_type for node in found.part.model.graph.node]


def test_a_part_that_crashes_is_smaller_than_a_whole_whose_fault_was_noticed() -> None:
    """Which of both the library does depends on the machine, so that no real run is sure of it."""
    image = np.random.default_rng(1).random((1, 1, 16, 16)).astype(np.float32)
    recorded = Recording(dying(), {"image": image})
    noticed = f"{INTERNAL_FAULT} 1.7: it cannot build /a.onnx: MyelinCheckException: value.h:258: x"
    crash = f"{INTERNAL_FAULT} TensorRT-RTX 1.7: SIGSEGV"

    def refusal(part: Part) -> str | None:
        kinds = [node.op_type for node in part.model.graph.node]
        if "Div" not in kinds:
            return None
        if "Sigmoid" in kinds:
            return noticed
        return crash if "Conv" in kinds else noticed.replace("value.h", "utils.cpp")

    fails = refused_alike(refusal, partial(TRT.refused_alike, noticed))
    found = reduce(recorded, fails, seconds=600, say=lambda line: None)
    assert found is not None
    assert [node.op_type for node in found.part.model.graph.node] == ["Div"]


def test_a_crash_may_be_any_fault_of_the_builder_itself() -> None:
    crash = "internal fault of TensorRT-RTX 1.7: SIGSEGV while it built from /a.onnx"
    noticed = (
        f"{INTERNAL_FAULT} 1.7: it cannot build /b.onnx: MyelinCheckException: utils.cpp:1326: x"
    )
    other = f"{INTERNAL_FAULT} 1.7: it cannot build /b.onnx: MyelinCheckException: kqv.cpp:19: x"
    refused = "node 'a' (Foo): the ONNX parser refuses it"
    assert TRT.refused_alike(crash, noticed)
    assert TRT.refused_alike(crash, crash.replace("/a", "/b"))
    assert not TRT.refused_alike(crash, refused)
    assert TRT.refused_alike(noticed, other)
    assert TRT.refused_alike(noticed, crash)
    assert not TRT.refused_alike(refused, crash)
    assert not TRT.refused_alike(noticed, refused)
    assert TRT.refused_alike(refused, refused.replace("'a'", "'b'"))
    assert not TRT.refused_alike(refused, "node 'a' (Foo): two inputs are missing")


def test_a_part_without_end_counts_as_a_fault(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.targets.tensorrt.process.PART_SECONDS", 0.01)
    said = TRT.refusal(saved(dying(), tmp_path), "fp16", lambda line: None)
    assert said is not None
    assert "no end after 0.01 s" in said


def test_parts_are_built_for_all_gpus_that_have_the_precision() -> None:
    assert limits.capabilities_with("fp16") == ("7.5", "8.6", "8.9", "12.0")
    assert limits.capabilities_with("fp8") == ("8.9", "12.0")
    assert limits.capabilities_with("fp32") == ("8.6", "8.9", "12.0")


def test_the_first_refusal_is_told_where_a_profile_does_not_help(
    build: Build, small: Small, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: EngineJob, *_: Any) -> Any:
        tried.append(job.batches)
        raise BuildError(f"refused {job.batches}")

    tried: list[tuple[int, int, int]] = []
    monkeypatch.setattr("pipeline.targets.tensorrt.target.build_apart", refuse)
    with pytest.raises(BuildError, match=r"refused \(2, 2, 2\)"):
        build(small(), batch=2, compute_capabilities=("8.9",))
    with pytest.raises(BuildError, match=r"refused \(1, 8, 64\)"):
        build(small(), compute_capabilities=("8.9",), name="dynamic")
    assert tried == [(2, 2, 2), (2, 2, 3), (1, 8, 64)]


@pytest.mark.parametrize(
    ("precision", "capability", "reason"),
    [
        ("fp32", "7.5", "no float32 matrix products"),
        ("tf32", "7.5", "no TF32"),
        ("bf16", "7.5", "no bfloat16"),
        ("fp8", "8.6", "came with compute capability 8.9"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    no_gpu: None, precision: str, capability: str, reason: str
) -> None:
    options = TrtOptions(compute_capabilities=(capability, "8.9"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{precision} .* {capability}: .*{reason}"):
        TRT.check(precision, options)


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown precision 'int2'; it has fp32, tf32, fp16"):
        TRT.check("int2", TrtOptions())


def test_full_tensorrt_is_held_to_the_gpu_at_hand(gpu: Callable[..., Gpu]) -> None:
    gpu(capability="7.5")
    TRT.check("fp32", TrtOptions(library="tensorrt"))
    with pytest.raises(ConfigError, match=r"bf16 cannot be built for compute capability 7\.5"):
        TRT.check("bf16", TrtOptions(library="tensorrt"))


def test_options_as_people_write_them() -> None:
    options = TrtOptions.model_validate_json('{"compute_capabilities": [12.0, 8.6]}')
    assert options.compute_capabilities == ("8.6", "12.0")


@pytest.mark.parametrize(
    "given",
    [
        {"compute_capabilities": ["9.0"]},
        {"compute_capabilities": []},
        {"compute_capabilities": ["8.6", 8.6]},
        {"batches": [8, 1, 64]},
        {"batches": [0, 1, 2]},
        {"workspace_mib": 0},
        {"library": "trt"},
        {"unknown": 1},
    ],
)
def test_bad_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        TrtOptions.model_validate_json(json.dumps(given))


def with_operator(model: onnx.ModelProto, operator: str) -> onnx.ModelProto:
    """The classifier with another operator in the place of its gelu."""
    node = next(n for n in model.graph.node if n.name == "gelu")
    node.op_type = operator
    return model


def test_an_unsupported_operator_is_named(build: Build, small: Small, no_gpu: None) -> None:
    model = with_operator(small(), "Det")
    with pytest.raises(
        UnsupportedOperatorError, match=r"node 'gelu' \(Det\): TensorRT does not support"
    ):
        build(model, "fp32")


def test_an_unknown_operator_is_named(build: Build, small: Small, no_gpu: None) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"node 'gelu' \(Nonsense\)"):
        build(with_operator(small(), "Nonsense"), "fp32")


def test_a_graph_that_does_not_hold_together(build: Build, small: Small, no_gpu: None) -> None:
    model = small()
    model.graph.node[1].input[0] = "nowhere"
    with pytest.raises(BuildError, match=r"node 'gelu' \(Gelu\): the ONNX parser refuses it"):
        build(model, "fp32")


def test_what_is_no_graph(build: Build, small: Small, no_gpu: None, tmp_path: Path) -> None:
    from pipeline.targets.tensorrt.build import EngineJob, build_engine

    path = tmp_path / "graph.onnx"
    path.write_bytes(b"garbage")
    job = EngineJob(path, False, ("8.6",), (1, 8, 64), None, None)
    with pytest.raises(BuildError, match=r"graph\.onnx: the ONNX parser refuses it"):
        build_engine(api.load(api.RTX), job, tmp_path, print)
    path.unlink()
    with pytest.raises(BuildError, match=r"cannot read .*graph\.onnx"):
        build_engine(api.load(api.RTX), job, tmp_path, print)


def test_the_builders_reason_is_given(tmp_path: Path, small: Small) -> None:
    from pipeline.targets.tensorrt.build import EngineJob, build_engine

    path = tmp_path / "graph.onnx"
    onnx.save(small(), path)
    job = EngineJob(path, False, ("7.5",), (1, 8, 64), None, None)  # past the target's own check
    with pytest.raises(BuildError, match=r"^TensorRT-RTX \S+ cannot build .*FP32 GEMM"):
        build_engine(api.load(api.RTX), job, tmp_path, print)


def test_full_tensorrt_needs_a_gpu(build: Build, small: Small, no_gpu: None) -> None:
    with pytest.raises(UnavailableError, match=r"builds on a GPU only: .*set library: rtx"):
        build(small(), "fp16", library="tensorrt")


@pytest.fixture
def engine(built: Path, tmp_path: Path, no_gpu: None) -> Artifact:
    """A copy of the engine, to be damaged."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return Artifact.read(tmp_path / "engine")


def test_inspection_without_a_gpu_says_what_it_saw(engine: Artifact) -> None:
    seen = TRT.inspect(engine)
    assert "header accepted; not deserialized: no NVIDIA driver" in seen


@pytest.mark.parametrize("damage", ["header", "empty", "foreign"])
def test_malformed_engines_are_refused(engine: Artifact, damage: str) -> None:
    path = engine.path("model.engine")
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[2] ^= 4
    path.write_bytes({"empty": b"", "foreign": b"GIF89a" * 999}.get(damage, bytes(content)))
    with pytest.raises(ArtifactError, match="is damaged or no engine of this library"):
        TRT.inspect(engine)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped"])
def test_what_the_header_does_not_tell_the_hash_does(
    engine: Artifact, gpu: Callable[..., Gpu], damage: str
) -> None:
    gpu()
    path = engine.path("model.engine")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content[: 1000 if damage == "truncated" else None])
    with pytest.raises(ArtifactError, match=r"model\.engine"):
        TRT.open(engine)


def test_an_engine_without_its_sidecar(engine: Artifact) -> None:
    (engine.folder / "artifact.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds no artifact\.json"):
        Artifact.read(engine.folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": "7.5"}, r"has 7\.5: add '7\.5' to compute_capabilities"),
        (
            {"name": "H100", "capability": "9.0"},
            r"H100 has 9\.0: TensorRT-RTX compiles for .* only",
        ),
        ({"driver_cuda": (12, 8)}, r"serves CUDA 12\.8, tensorrt_rtx needs 13\.0: install"),
    ],
)
def test_what_is_missing_on_a_gpu(
    engine: Artifact, gpu: Callable[..., Gpu], changes: dict[str, Any], reason: str
) -> None:
    gpu(**changes)
    with pytest.raises(UnavailableError, match=reason):
        TRT.open(engine)


def test_an_engine_of_another_version(
    engine: Artifact, gpu: Callable[..., Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    monkeypatch.setattr(api, "installed", lambda name: "1.9.0.1")
    missing = TRT.missing(engine)
    assert missing is not None
    assert "installed is 1.9.0.1: build it again" in missing


def test_a_library_that_is_not_installed(
    engine: Artifact, gpu: Callable[..., Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    monkeypatch.setattr(api, "installed", lambda name: None)
    assert TRT.missing(engine) == "tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13"
    assert TRT.inspect(engine).startswith("not opened: tensorrt_rtx is not installed")


def test_nothing_is_missing_on_the_right_machine(engine: Artifact, gpu: Callable[..., Gpu]) -> None:
    gpu()
    assert TRT.missing(engine) is None


def test_a_torch_without_cuda(
    engine: Artifact, gpu: Callable[..., Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    monkeypatch.setattr("pipeline.targets.tensorrt.target.torch_cuda", lambda: None)
    assert TRT.missing(engine) == f"the installed torch has no CUDA: {TORCH}"
    found = {r.name: r for r in TRT.requirements()}
    assert (found["torch with CUDA"].found, found["torch with CUDA"].remedy) == (None, TORCH)


def test_running_without_a_gpu_says_what_to_do(engine: Artifact) -> None:
    with pytest.raises(UnavailableError, match="no NVIDIA driver is installed on this machine"):
        TRT.open(engine)


def test_no_driver_is_found_where_there_is_none() -> None:
    found = find_gpu("libcuda-that-does-not-exist.so")
    assert isinstance(found, str)
    assert "no NVIDIA driver" in found


def test_the_cache_lies_beside_the_artifact(engine: Artifact, gpu: Callable[..., Gpu]) -> None:
    path = cache_path(engine, gpu())
    assert path.parent == engine.folder.parent
    assert path.name.startswith("engine-")
    path.write_bytes(b"compiled kernels")
    engine.verify()


def test_emulation(engine: Artifact, tmp_path: Path) -> None:
    runner = TRT.emulate(engine, tmp_path / "fp16.onnx")
    assert isinstance(runner, EmulatedRunner)
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    with runner:
        logits = runner(images)
        assert logits.shape == (5, 4)
        assert logits.dtype == np.float32
        report = runner.overflow_report()
    assert "emulated" in runner.device
    assert {entry.dtype for entry in report} >= {"float16"}
    assert all(entry.finite and entry.headroom > 4 for entry in report)
    with pytest.raises(DataError):
        runner(images[:, :1])


def test_emulation_takes_the_engines_own_graph_only(engine: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not the graph that"):
        TRT.emulate(engine, tmp_path / "source.onnx")
    assert TRT.emulate(engine, None) is None


def test_tf32_is_not_emulated_as_float32(
    build: Build, small: Small, no_gpu: None, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    logits = {}
    for precision in ("fp32", "tf32"):
        built = build(small(), precision, name=precision, compute_capabilities=("8.6",))
        runner = TRT.emulate(built, tmp_path / f"{precision}.onnx")
        assert runner is not None
        logits[precision] = runner(images)
    difference = np.abs(logits["tf32"] - logits["fp32"]).max() / np.abs(logits["fp32"]).max()
    assert 1e-6 < difference < 2e-3  # ten bits of significand


def test_requirements_say_how_to_get_what_is_missing(no_gpu: None) -> None:
    found = {r.name: r for r in TRT.requirements()}
    assert found["tensorrt_rtx"].found == api.installed(api.RTX)
    assert found["an NVIDIA GPU"].found is None
    assert all(r.remedy for r in found.values())
    assert TRT.versions() == {"tensorrt_rtx": api.installed(api.RTX)}
