"""Which artifact leaves the pipeline, and that only whole ones do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.machine import Machine
from pipeline.core.network import Network
from pipeline.core.seals import sealed
from pipeline.exports.built import built, exported_network
from pipeline.report.model import FORMAT, Choice, GateReport, Run
from pipeline.steps import artifact
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE, UNREPORTED
from pipeline.steps.library import Library
from pipeline.steps.stated import Stated
from tests.pipeline.steps.making import other_content, sign_again

NETWORK = Network("net", ("cat", "dog"), (3, 8, 8), {"size": 8})
CHAIN = {
    "export": (),
    "onnx": ("export",),
    "precision/float32": ("onnx",),
    "ort/fp32": ("precision/float32", "export"),
    "ort/int8": ("precision/float32", "export"),
    "coreml/fp16": (),
}


def make(folder: Path, name: str, content: bytes = b"model", **facts: Any) -> Artifact:
    """One link of the chain; each states the network."""

    def build(place: Path) -> Mapping[str, Any]:
        (place / "model.onnx").write_bytes(content)
        return {"network": NETWORK.to_dict(), **facts}

    sources = [Artifact.read(folder / source) for source in CHAIN[name]]
    return artifact.make(
        folder / name,
        kind="build",
        name=name,
        key="0" * 64,
        made_from={source.name: source.digest for source in sources},
        seals={source.name: source.seal for source in sources},
        tools={},
        build=build,
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    for name in CHAIN:
        make(tmp_path / "net", name)
    choose(tmp_path)
    return tmp_path


def choose(output: Path, **choice: Choice) -> Path:
    """Leave a results.json that says which precision to use, and states what lies there."""
    folder = output / "net"
    run = Run(
        format=FORMAT,
        name="net",
        config="pipeline.yaml",
        folder=str(folder),
        date="",
        exit_code=0,
        steps=(),
        not_selected=(),
        gates=GateReport(),
        problems=(),
        seals={name: each.seal for name, each in Library(folder).artifacts.items()},
        machine=Machine("CPU", 2),
        versions={},
        export=None,
        simplified=None,
        forms={},
        calibration=None,
        reference=None,
        artifacts=(),
        bench={},
        choice=choice,
        published=(),
    )
    path = folder / RESULTS_FILE
    path.write_text(sealed(run.to_dict()))
    return path


def name_of(output: Path, precision: str | None) -> str:
    return built(output, "net", "ort", precision).name


def test_the_one_that_the_report_says_to_use(output: Path) -> None:
    choose(output, ort=Choice("int8"))
    assert name_of(output, None) == "ort/int8"
    assert name_of(output, "fp32") == "ort/fp32"


def test_the_network_is_that_of_the_graph(output: Path) -> None:
    assert exported_network(output, "net") == NETWORK


@pytest.mark.parametrize("choice", [{}, {"ort": Choice(None)}, {"ort": Choice("fp8")}])
def test_the_first_where_nothing_useful_is_said(output: Path, choice: dict[str, Choice]) -> None:
    choose(output, **choice)
    assert name_of(output, None) == "ort/fp32"


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "choice": {"ort": {}}}'])
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_what_the_last_run_said_is_not_passed_over(
    output: Path, text: str, precision: str | None
) -> None:
    choose(output).write_text(text)
    with pytest.raises(ArtifactError, match="run python -m pipeline run again"):
        built(output, "net", "ort", precision)


def test_without_a_report_nothing_states_that_it_is_what_was_built(output: Path) -> None:
    (output / "net" / RESULTS_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"nothing states the seal of .*, which writes"):
        built(output, "net", "ort", None)


def test_what_a_killed_run_made_may_leave(output: Path) -> None:
    folder = output / "net"
    old = Artifact.read(folder / "ort/fp32")
    new = make(folder, "ort/fp32", other="fact")
    with pytest.raises(ArtifactError, match=r"ort/fp32 is not what results\.json"):
        built(output, "net", "ort", "fp32")
    Stated(folder).announce("ort/fp32", new.seal)
    assert built(output, "net", "ort", "fp32") == new
    assert new.seal != old.seal
    (folder / UNREPORTED).write_text("{")
    with pytest.raises(ArtifactError, match="is not what results"):
        built(output, "net", "ort", "fp32")


def other_model(folder: Path, content: bytes = b"ledom") -> None:
    """Another model, with the hashes and the seal that fit it."""
    other_content(folder, content, "model.onnx")


def other_labels(folder: Path) -> None:
    sign_again(folder, lambda v: v["facts"]["network"].update(labels=["dog", "cat"]))


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def without_a_seal(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    del values["seal"]
    (folder / MANIFEST).write_text(json.dumps({**values, "format": 1}))


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_copy(place: Path, other: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(other, place)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bytes of the model": lambda f: (f / "ort/fp32/model.onnx").write_bytes(b"mOdel"),
    "another model, signed": lambda f: other_model(f / "ort/fp32"),
    "garbage, signed": lambda f: other_model(f / "ort/fp32", b"\0" * 99),
    "another graph, signed": lambda f: other_model(f / "precision/float32"),
    "another root, signed": lambda f: other_model(f / "export"),
    "an edited fact": lambda f: (f / "ort/fp32" / MANIFEST).write_text(
        (f / "ort/fp32" / MANIFEST).read_text().replace("dog", "cow")
    ),
    "labels, signed": lambda f: other_labels(f / "ort/fp32"),
    "labels of the graph, signed": lambda f: other_labels(f / "onnx"),
    "made from nothing, signed": lambda f: sign_again(
        f / "ort/fp32", lambda v: v.update(made_from={}, seals={})
    ),
    "no seals of sources, signed": lambda f: sign_again(
        f / "ort/fp32", lambda v: v.update(seals={})
    ),
    "without a seal": lambda f: without_a_seal(f / "ort/fp32"),
    "a foreign file": lambda f: (f / "ort/fp32/notes.txt").write_text("x"),
    "an empty folder": lambda f: (f / "ort/fp32/more").mkdir(),
    "a folder that is a link": lambda f: (f / "ort/fp32/more").symlink_to("/etc"),
    "a file that is a link": lambda f: linked(f / "ort/fp32/model.onnx"),
    "an artifact that is a link": lambda f: linked(f / "ort/fp32"),
    "a graph that is a link": lambda f: linked(f / "precision/float32"),
    "a pipe": lambda f: os.mkfifo(f / "ort/fp32/pipe"),
    "a pipe in the place of a file": lambda f: to_pipe(f / "ort/fp32/model.onnx"),
    "no graph": lambda f: shutil.rmtree(f / "precision/float32"),
    "no root": lambda f: shutil.rmtree(f / "export"),
    "another precision in its place": lambda f: to_copy(f / "ort/fp32", f / "ort/int8"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_only_what_is_whole_leaves(output: Path, what: str) -> None:
    assert name_of(output, "fp32") == "ort/fp32"
    DAMAGE[what](output / "net")
    with pytest.raises(ArtifactError):
        built(output, "net", "ort", "fp32")


@pytest.mark.parametrize("name", ["onnx", "export"])
def test_labels_come_from_a_whole_graph(output: Path, name: str) -> None:
    other_labels(output / "net" / name)
    with pytest.raises(ArtifactError, match=r"is not what results|of which other facts"):
        exported_network(output, "net")
    shutil.rmtree(output / "net" / name)
    with pytest.raises(ArtifactError, match="is missing"):
        exported_network(output, "net")


def test_a_target_that_needs_no_graph_leaves_without_one(output: Path) -> None:
    shutil.rmtree(output / "net/onnx")
    assert built(output, "net", "coreml", None).name == "coreml/fp16"


def test_damage_elsewhere_is_no_matter(output: Path) -> None:
    other_model(output / "net/ort/int8")
    other_model(output / "net/coreml/fp16")
    assert name_of(output, "fp32") == "ort/fp32"
    with pytest.raises(ArtifactError, match="is not what results"):
        built(output, "net", "coreml", None)


def test_what_is_not_there_is_refused_with_what_is(output: Path) -> None:
    with pytest.raises(InputError, match="built are: fp32, int8"):
        built(output, "net", "ort", "fp64")
    with pytest.raises(InputError, match="built are: none"):
        built(output, "net", "trt", None)
