"""On which CPUs an 8-bit graph gives the answers that were judged."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration import judge
from calibration.ranges import Range
from calibration.sample import CalibrationSet
from pipeline.core.cpu_classes import CLASSES
from pipeline.core.network import Network
from pipeline.graphs.qdq_ort import activations, candidates_of, insert_pairs
from pipeline.targets.base import BuildJob
from pipeline.targets.ort import certificate
from pipeline.targets.ort.certificate import certify, unsafe_layers
from pipeline.targets.ort.options import OrtOptions
from pipeline.targets.ort.target import OrtTarget

Graph = Callable[..., onnx.ModelProto]


def quantized(source: onnx.ModelProto, *, safe: bool) -> onnx.ModelProto:
    ranges = dict.fromkeys(activations(source), Range(-4.0, 4.0))
    outputs = [name for node in source.graph.node for name in node.output] if safe else []
    return insert_pairs(source, ranges, candidates_of(source), outputs)


def test_weights_that_cannot_saturate_certify_every_class(small_graph: Graph) -> None:
    found = certify(quantized(small_graph(), safe=True))
    assert found.certified_for == tuple(CLASSES)
    assert found.unsafe == ()
    assert found.state == ""


def test_depthwise_layers_are_never_unsafe(small_graph: Graph) -> None:
    names = [layer.layer for layer in unsafe_layers(quantized(small_graph(), safe=False))]
    assert "x0" in names
    assert "x2" not in names


def test_a_float_graph_has_nothing_unsafe(small_graph: Graph) -> None:
    assert unsafe_layers(small_graph()) == []


def test_other_weights_are_certified_for_vnni_and_emulated_elsewhere(
    small_graph: Graph,
) -> None:
    source = small_graph()
    x = np.random.default_rng(0).standard_normal((12, 3, 8, 8)).astype(np.float32)
    samples = CalibrationSet(x, np.zeros(12, np.int64), ("",) * 12)
    judging = judge.Judge(source, samples, 12)
    found = certify(quantized(source, safe=False), judging)
    assert found.certified_for == ("avx512-vnni", "avx2-vnni")
    assert found.state == "emulated: x86 without VNNI"
    assert found.agreement is not None
    assert 0 <= found.agreement <= 1
    by_layer = {layer.layer: layer for layer in found.unsafe}
    assert by_layer["x0"].pairs > 0
    assert by_layer["x0"].largest is not None
    assert by_layer["x0"].largest > 32767 or by_layer["x0"].saturated == 0
    for layer in found.unsafe:
        assert layer.error is not None
        assert (layer.error > 0) is bool(layer.saturated)
    assert found.measured_on == certificate.here()


def test_the_class_that_judged_is_stated_in_every_case(
    small_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "visible_instructions", lambda: ("avx2", "fma", "avx_vnni"))
    for safe in (True, False):
        assert certify(quantized(small_graph(), safe=safe)).measured_on == "avx2-vnni"


@pytest.mark.parametrize("safe", [True, False])
def test_the_artifact_states_where_it_was_judged_and_what_it_is_certified_for(
    small_graph: Graph, tmp_path: Path, *, safe: bool
) -> None:
    graph, folder = tmp_path / "int8.onnx", tmp_path / "built"
    onnx.save(quantized(small_graph(), safe=safe), graph)
    folder.mkdir()
    job = BuildJob(
        network=Network("small", ("a", "b", "c", "d"), (3, 8, 8), {"size": 8}),
        precision="int8",
        options=OrtOptions(tune=False),
        graph=graph,
        module=lambda: pytest.fail("this target builds from the graph"),
        calibration=lambda n: pytest.fail("the graph is quantized already"),
        batch=None,
        log=lambda line: None,
    )
    stated = OrtTarget().build(job, folder)["certificate"]
    assert stated["measured_on"] == certificate.here()
    assert stated["certified_for"] == [name for name, cls in CLASSES.items() if safe or cls.vnni]
    assert ("x0" in stated["unsafe_layers"]) is not safe


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (("avx2", "fma"), True),
        (("avx2", "fma", "avx_vnni"), False),
        (("avx2", "fma", "avx512f", "avx512bw", "avx512vl"), True),
    ],
)
def test_opening_elsewhere_warns(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], warned: bool
) -> None:
    monkeypatch.setattr(certificate, "visible_instructions", lambda: flags)
    said = certificate.warning(("avx512-vnni", "avx2-vnni"), "ort/int8")
    assert (said is not None) is warned
    if said:
        assert said.startswith("ort/int8 is certified for AVX-512 + VNNI, AVX2 + VNNI, not for")
        assert "calibration.cpus: any" in said
    assert certificate.warning(tuple(CLASSES), "ort/int8") is None


@pytest.mark.parametrize("flags", [("avx",), ()], ids=["without AVX2", "nobody tells"])
def test_an_x86_cpu_of_no_known_class_is_none_that_it_is_certified_for(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(certificate, "visible_instructions", lambda: flags)
    for machine, warned in (("x86_64", True), ("AMD64", True), ("aarch64", False)):
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        said = certificate.warning(("avx512-vnni", "avx2-vnni"), "ort/int8")
        assert (said is not None) is warned
        assert not said or "whose class is not known): 8-bit products may saturate here" in said
        assert certificate.warning(tuple(CLASSES), "ort/int8") is None
