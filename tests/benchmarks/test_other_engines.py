"""Other engines: what is said where one is not installed, and a small network through each."""

from __future__ import annotations

import math
import sys
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import other_engines
import pytest
import torch
from other_engines import ENGINES, convert, open_executorch, said, why_not
from torch import nn

from pipeline.core.errors import BuildError, UnavailableError
from pipeline.graphs.compare import TOLERANCE, relative_difference

SHAPE = (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ncnn", "ncnn is not installed: pip install ncnn pnnx"),
        (
            "executorch",
            "executorch is not installed: pip install --no-deps executorch ruamel.yaml tabulate",
        ),
        ("mnn", "MNN is not installed: pip install MNN"),
    ],
)
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, words: str
) -> None:
    monkeypatch.setattr(other_engines, "find_spec", lambda module: None)
    assert convert(name, "care_s0", tmp_path / "x.onnx", 1, tmp_path / name) == words
    assert not (tmp_path / name).exists()


def test_a_module_of_a_package_that_is_not_there_is_not_installed() -> None:
    told = why_not(("click", "no_such_package.yaml"), "it")
    assert told == "no_such_package.yaml is not installed: pip install it"
    assert why_not(("click",), "it") == ""


def test_a_converter_that_fails_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Something that a new process can import, and that does not take these arguments.
    fails: Any = math.hypot
    failing = replace(ENGINES["ncnn"], modules=(), convert=fails)
    monkeypatch.setattr(other_engines, "ENGINES", {"ncnn": failing})
    told = convert("ncnn", "care_s0", tmp_path / "x.onnx", 1, tmp_path / "ncnn")
    assert told == "TypeError: must be real number, not str"


def test_errors_of_ours_are_told_as_they_are() -> None:
    assert said(BuildError("pnnx wrote no x")) == "pnnx wrote no x"
    assert said(ValueError("a\n  b")) == "ValueError: a b"


def test_mnn_is_converted_without_what_installs_packages_and_asks_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[list[str]] = []
    tools = ModuleType("_tools")
    tools.mnnconvert = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "_tools", tools)
    # None in its place: whoever imports it gets an ImportError.
    for module in ("MNN.tools", "MNN.tools.mnnconvert"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BuildError, match=r"mnnconvert wrote no network\.mnn"):
        other_engines.convert_mnn("care_s0", tmp_path / "x.onnx", 1, tmp_path)
    assert given[0][:5] == ["mnnconvert", "-f", "ONNX", "--modelFile", str(tmp_path / "x.onnx")]
    (tmp_path / "network.mnn").write_bytes(b"")
    other_engines.convert_mnn("care_s0", tmp_path / "x.onnx", 1, tmp_path)


def test_executorch_with_other_threads_than_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = ModuleType("portable_lib")
    asked: list[int] = []
    library._unsafe_reset_threadpool = asked.append  # type: ignore[attr-defined]
    library._threadpool_get_thread_count = lambda: 2  # type: ignore[attr-defined]
    pybindings = ModuleType("pybindings")
    pybindings.portable_lib = library  # type: ignore[attr-defined]
    runtime = ModuleType("runtime")
    runtime.Runtime = None  # type: ignore[attr-defined]
    for name, module in {
        "executorch": ModuleType("executorch"),
        "executorch.extension": ModuleType("extension"),
        "executorch.extension.pybindings": pybindings,
        "executorch.runtime": runtime,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(UnavailableError, match="takes 2 threads where 1 are asked for"):
        open_executorch("x", 1)
    assert asked == [1]


def small() -> nn.Module:
    torch.manual_seed(0)
    # By name: pnnx writes Python with the names of layers, in which numbers are none.
    layers = {
        "stem": nn.Conv2d(3, 8, 3, stride=2, padding=1),
        "gelu": nn.GELU(),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(8, 5),
    }
    return nn.Sequential(OrderedDict(layers)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ENGINES)
def test_a_small_network_has_the_same_logits_in_each_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, batch: int
) -> None:
    engine = ENGINES[name]
    if absent := why_not(engine.modules, engine.install):
        pytest.skip(absent)
    network = small()
    monkeypatch.setattr(other_engines, "published_form", lambda model, weights: network)
    monkeypatch.setattr(other_engines, "SHAPE", SHAPE)
    images = np.random.default_rng(0).standard_normal((batch, *SHAPE)).astype(np.float32)
    before: Any = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what exporters and engines say of themselves
        graph = tmp_path / "published.onnx"
        torch.onnx.export(
            network,
            (torch.from_numpy(images),),
            str(graph),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
        )
        engine.convert("small", graph, batch, tmp_path)
        try:
            logits = engine.open(str(tmp_path), 1)(images)
        finally:
            torch.set_num_threads(before)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    assert logits.shape == expected.shape
    assert relative_difference(logits, expected) <= TOLERANCE
