"""Artifacts are held against what is stated of them, to the root of the chain."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.steps.artifact import MADE, MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.library import Library
from pipeline.steps.stated import Stated
from tests.pipeline.steps.making import CHAIN, fill, make, other_content, other_fact, sign_again


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "net")


def to_copy(place: Path, other: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(other, place)


def problems(folder: Path) -> dict[str, str]:
    """What is wrong, by artifact."""
    library = Library(folder)
    found = {}
    for name in library.places:
        try:
            library.check(name)
        except ArtifactError as error:
            found[name] = str(error)
    return found


def test_a_whole_chain_is_whole(folder: Path) -> None:
    assert problems(folder) == {}
    library = Library(folder)
    assert list(library.artifacts) == sorted(CHAIN)
    for name in CHAIN:
        assert library.require_whole(name) == Artifact.read(folder / name)


def test_artifacts_are_listed_by_name(folder: Path) -> None:
    """Also where the names of folders, one by one, sort otherwise."""
    make(folder, "ort-more")
    assert list(Library(folder).artifacts) == [
        *("bench/ort", "export", "onnx", "ort-more", "ort/fp32"),
    ]


def test_a_linked_artifact_is_not_read(folder: Path) -> None:
    (folder / "onnx").rename(folder / "x")
    (folder / "onnx").symlink_to("x")
    library = Library(folder)
    assert "onnx" not in library.artifacts
    with pytest.raises(ArtifactError, match="onnx is a link, where an artifact belongs"):
        library.artifact("onnx")


@pytest.mark.parametrize("name", CHAIN)
@pytest.mark.parametrize("change", [other_fact, other_content])
def test_what_was_signed_again_is_found_where_it_lies(
    folder: Path, name: str, change: Callable[[Path], None]
) -> None:
    change(folder / name)
    found = problems(folder)
    assert f"is not what {RESULTS_FILE}, or what was" in found[name]
    others = {each for each, sources in CHAIN.items() if name in sources}
    assert set(found) == {name, *others}
    for each in CHAIN:
        reaches = each == name or name in reached(each)
        if reaches:
            with pytest.raises(ArtifactError):
                Library(folder).require_whole(each)
        else:
            Library(folder).require_whole(each)


def reached(name: str) -> set[str]:
    """All that an artifact was made from, directly or not."""
    return {other for source in CHAIN[name] for other in {source, *reached(source)}}


def test_without_a_report_what_others_state_counts(folder: Path) -> None:
    (folder / RESULTS_FILE).unlink()
    assert problems(folder) == {}
    other_fact(folder / "onnx")
    found = problems(folder)
    assert set(found) == {"onnx", "ort/fp32"}
    assert "made from onnx, of which other facts" in found["ort/fp32"]
    other_fact(folder / "bench/ort")  # the last of the chain, of which nothing tells
    assert set(problems(folder)) == {"onnx", "ort/fp32"}
    with pytest.raises(ArtifactError, match=r"nothing states the seal of .*ort"):
        Library(folder).require_whole("bench/ort")


def test_what_was_made_since_counts(folder: Path) -> None:
    again = make(folder, "onnx", "export", content=b"onnx", top1=0.8)
    assert set(problems(folder)) == {"onnx", "ort/fp32"}
    Stated(folder).announce("onnx", again.seal)
    assert problems(folder) == {}


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda f: shutil.rmtree(f / "export"), "onnx", "export, from which onnx was made, is mis"),
        (
            lambda f: make(f, "export", content=b"other"),
            "onnx",
            "onnx was made from another export than lies here",
        ),
        (
            lambda f: sign_again(f / "onnx", lambda v: v.update(seals={})),
            "onnx",
            "does not state the seals",
        ),
        (
            lambda f: sign_again(f / "onnx", lambda v: v["seals"].update(more="0")),
            "onnx",
            "does not state the seals",
        ),
        (
            lambda f: to_copy(f / "onnx", f / "export"),
            "onnx",
            "holds export, which does not belong there",
        ),
        (
            lambda f: (f / "onnx").rename(f / "x") and (f / "onnx").symlink_to("x"),
            "onnx",
            "is a link, where an artifact belongs",
        ),
        (
            lambda f: (f / "onnx" / MANIFEST).write_text("{"),
            "ort/fp32",
            "onnx/artifact.json is dam",
        ),
    ],
)
def test_a_broken_chain_is_found(
    folder: Path, change: Callable[[Path], object], name: str, message: str
) -> None:
    change(folder)
    assert message in problems(folder)[name]
    with pytest.raises(ArtifactError):
        Library(folder).require_whole("bench/ort")


def test_no_linked_folder_is_looked_into(folder: Path, tmp_path: Path) -> None:
    fill(tmp_path / "other")
    (folder / "trt").symlink_to(tmp_path / "other")
    (folder / "ort").rename(tmp_path / "moved")
    (folder / "ort").symlink_to(tmp_path / "moved")
    assert set(Library(folder).places) == {"export", "onnx", "bench/ort"}
    assert "ort/fp32, from which bench/ort was made, is missing" in problems(folder)["bench/ort"]


def test_a_checkpoint_that_became_another_is_found(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    made = folder / "export" / MADE
    made.write_text(f'{{"checkpoint": "{weights}"}}')
    assert problems(folder) == {}  # it may lie elsewhere by now
    weights.write_bytes(b"other")
    assert "is another checkpoint than export was made from" in problems(folder)["export"]
    for odd in ("a\\u0000b", "x" * 5000, "/dev/zero", str(tmp_path)):
        made.write_text(f'{{"checkpoint": "{odd}"}}')
        assert problems(folder) == {}


def test_circles_end(folder: Path) -> None:
    export, onnx = (Artifact.read(folder / name) for name in ("export", "onnx"))
    change = {"made_from": {"onnx": onnx.digest}, "seals": {"onnx": onnx.seal}}
    sign_again(folder / "export", lambda values: values.update(change))
    Stated(folder).announce("export", Artifact.read(folder / "export").seal)
    assert Library(folder).require_whole("onnx").name == "onnx"
    assert export.seal != Artifact.read(folder / "export").seal


def test_a_shard_that_became_another_is_found(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m-1.safetensors"}}')
    (folder / "export" / MADE).write_text(f'{{"checkpoint": "{index}"}}')
    assert problems(folder) == {}  # its files may lie elsewhere by now
    (tmp_path / "m-1.safetensors").write_bytes(b"other")
    assert "is another checkpoint than export was made from" in problems(folder)["export"]
