"""An archive that travels alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.network import Network
from pipeline.exports import bundle
from pipeline.exports.bundle import write_bundle
from pipeline.exports.golden import Kit
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import Target
from pipeline.targets.ort.target import OrtTarget
from pipeline.targets.registry import TARGETS
from tests.pipeline.report.making import Maker, configured

NETWORK = Network("net", ("cat", "dog"), (3, 8, 8), {"size": 8, "crop": 0.9})


@pytest.fixture
def artifacts(tmp_path: Path) -> list[Artifact]:
    make = Maker(configured(tmp_path))
    return [make.make(name, {"images": 1}) for name in ("ort/fp32", "trt/fp16")]


def unpacked(path: Path, folder: Path) -> Path:
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / "net"


def test_all_that_is_needed_is_in_it_and_its_sums_hold(
    artifacts: list[Artifact], tmp_path: Path
) -> None:
    path = write_bundle(artifacts, NETWORK, "net", tmp_path / "net.tar.gz")
    there = unpacked(path, tmp_path / "there")
    assert (there / "labels.txt").read_text() == "cat\ndog\n"
    assert json.loads((there / "preprocess.json").read_text()) == {"size": 8, "crop": 0.9}
    assert "Apache" in (there / "LICENSE").read_text()
    assert "`ort/fp32`, 0.02 MB" in (there / "README.md").read_text()
    sums = dict(line.split("  ")[::-1] for line in (there / "SHA256SUMS").read_text().splitlines())
    files = {f.relative_to(there).as_posix() for f in there.rglob("*") if f.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((there / name).read_bytes()).hexdigest() == digest
    # Each artifact is whole where it arrives.
    for artifact in artifacts:
        arrived = Artifact.read(there / artifact.name)
        arrived.verify()
        assert arrived.seal == artifact.seal
    stated = json.loads((there / "manifest.json").read_text())["artifacts"]
    assert [each["seal"] for each in stated] == [artifact.seal for artifact in artifacts]


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({}, "The weights have the licence of whoever trained them; LICENSE is"),
        (
            {"license": "cc-by-nc-4.0", "license_remark": "forbids commercial use"},
            "The weights have the licence cc-by-nc-4.0 (forbids commercial use); LICENSE is",
        ),
    ],
)
def test_the_licence_of_the_weights_is_said(
    artifacts: list[Artifact], tmp_path: Path, description: dict[str, str], words: str
) -> None:
    network = dataclasses.replace(NETWORK, description=description)
    path = write_bundle(artifacts, network, "net", tmp_path / "net.tar.gz")
    assert words in (unpacked(path, tmp_path / "there") / "README.md").read_text()


def test_equal_artifacts_give_equal_bytes(artifacts: list[Artifact], tmp_path: Path) -> None:
    first, second = (
        write_bundle(artifacts, NETWORK, "net", tmp_path / name).read_bytes() for name in "ab"
    )
    assert first == second


def test_a_file_that_is_there_stays(artifacts: list[Artifact], tmp_path: Path) -> None:
    (tmp_path / "net.tar.gz").write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        write_bundle(artifacts, NETWORK, "net", tmp_path / "net.tar.gz")
    assert (tmp_path / "net.tar.gz").read_text() == "precious"


def test_what_changed_meanwhile_does_not_leave(artifacts: list[Artifact], tmp_path: Path) -> None:
    (artifacts[0].folder / "model.bin").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="has changed"):
        write_bundle(artifacts, NETWORK, "net", tmp_path / "net.tar.gz")
    assert not (tmp_path / "net.tar.gz").exists()
    with pytest.raises(InputError, match="nothing of net is chosen"):
        write_bundle([], NETWORK, "net", tmp_path / "net.tar.gz")


def test_the_readme_has_twenty_lines_and_names_what_is_there(
    artifacts: list[Artifact], tmp_path: Path
) -> None:
    said: list[str] = []
    path = write_bundle(artifacts, NETWORK, "net", tmp_path / "net.tar.gz", say=said.append)
    text = (unpacked(path, tmp_path / "there") / "README.md").read_text()
    assert len([line for line in text.splitlines() if line]) <= 20
    assert 'InferenceSession("ort/fp32/model.onnx")' in text
    assert 'logits = session.run(None, {"image": image})[0]   # float32, 1 x 3 x 8 x 8' in text
    assert "`trt/fp16/model.engine` needs the version of TensorRT that `manifest.json`" in text
    assert "predict photo.jpg --artifact ort/fp32" in text
    # What is not there is not spoken of: no package, and no golden images.
    assert "Xcode" not in text
    assert "check.py" not in text
    # These were not validated, and so have no golden images.
    assert [line.partition(":")[0] for line in said] == [
        "ort/fp32 without golden images",
        "trt/fp16 without golden images",
    ]


def test_the_readme_names_the_golden_kit_that_is_there(
    artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kit = object.__new__(Kit)
    monkeypatch.setattr(bundle, "kit_of", lambda a: kit if a.name == "ort/fp32" else "none")
    monkeypatch.setattr(bundle, "write_kit", lambda kit, folder: folder.mkdir())
    path = write_bundle(artifacts, NETWORK, "net", tmp_path / "net.tar.gz")
    text = (unpacked(path, tmp_path / "there") / "README.md").read_text()
    assert "    python golden/ort-fp32/check.py ort/fp32/model.onnx   # does it" in text


class Elsewhere(OrtTarget):
    """A target that this project does not know."""

    name = "elsewhere"
    title = "Elsewhere"
    usage = Target.usage


@pytest.mark.parametrize("anywhere", [False, True])
def test_the_readme_is_written_by_the_targets(
    artifacts: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anywhere: bool
) -> None:
    other = Maker(configured(tmp_path)).make("elsewhere/fp32", {"images": 1})
    monkeypatch.setattr(Elsewhere, "anywhere", anywhere)
    TARGETS.register(Elsewhere())
    try:
        path = write_bundle([artifacts[1], other], NETWORK, "net", tmp_path / "net.tar.gz")
    finally:
        TARGETS.remove("elsewhere")
    text = (unpacked(path, tmp_path / "there") / "README.md").read_text()
    assert "`elsewhere/fp32` is opened by Elsewhere." in text
    assert "onnxruntime" not in text
    first = "elsewhere/fp32" if anywhere else "trt/fp16"
    assert f"predict photo.jpg --artifact {first}" in text


def test_the_checksums_are_signed_with_the_users_key(
    artifacts: list[Artifact], tmp_path: Path
) -> None:
    class Stamp:
        """Signs nothing; `pipeline.core.signing` is tested by itself."""

        def sign(self, data: bytes) -> bytes:
            return hashlib.sha512(data).digest()

    path = write_bundle(
        artifacts, NETWORK, "net", tmp_path / "net.tar.gz", signer=cast(Any, Stamp())
    )
    there = unpacked(path, tmp_path / "there")
    sums = (there / "SHA256SUMS").read_bytes()
    assert (there / "SHA256SUMS.sig").read_bytes() == hashlib.sha512(sums).digest()
    assert b"SHA256SUMS" not in sums
