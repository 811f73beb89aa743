"""Assets that are damaged, foreign, or of another network."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.targets.coreai.package import MODEL, check, digest, metadata

from .conftest import Build, needs_coreai, network

pytestmark = needs_coreai


@pytest.fixture
def asset(build: Build, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(build().folder / MODEL, tmp_path / MODEL)
    return tmp_path / MODEL


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rehash(asset: Path) -> None:
    content = (asset / "main.mlirb").read_bytes()
    (asset / "main.hash").write_bytes(hashlib.sha256(content).digest())


def said(asset: Path, **changes: str | None) -> None:
    values = json.loads((asset / "metadata.json").read_text())
    for key, value in changes.items():
        values["creatorDefinedMetadata"][f"care-deploy.{key}"] = value
    (asset / "metadata.json").write_text(json.dumps(values))


def shorten(asset: Path) -> None:
    content = (asset / "main.mlirb").read_bytes()
    (asset / "main.mlirb").write_bytes(content[: len(content) // 2])


def foreign(asset: Path) -> None:
    """As Apple's own tools write one: whole, but with nothing of ours in it."""
    (asset / "metadata.json").write_text('{"assetVersion": "2.0", "producer": "another"}')


def garbage(asset: Path) -> None:
    (asset / "main.mlirb").write_bytes(b"no program")
    rehash(asset)
    said(asset, digest=digest(asset))


def replaced(asset: Path) -> None:
    shutil.rmtree(asset)
    asset.write_text("a file")


DAMAGES: tuple[tuple[Callable[[Path], object], str], ...] = (
    (lambda asset: flip(asset / "main.mlirb"), "is damaged, or of another asset"),
    (lambda asset: flip(asset / "main.hash"), "is damaged, or of another asset"),
    (shorten, "is damaged, or of another asset"),
    (lambda asset: (asset / "main.mlirb").unlink(), "holds no main.mlirb"),
    (lambda asset: (asset / "main.hash").unlink(), "holds no main.hash"),
    (lambda asset: (asset / "metadata.json").write_text("{"), r"metadata\.json is damaged"),
    (lambda asset: (asset / "metadata.json").write_text("[]"), r"metadata\.json is damaged"),
    (foreign, "was not built by this program"),
    (lambda asset: said(asset, digest="0" * 64), "is of another program"),
    (lambda asset: said(asset, labels='["a"]'), "has other labels than tiny"),
    (garbage, "is no Core AI program"),
    (replaced, "it is no folder"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_refused(asset: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(asset)
    with pytest.raises(ArtifactError, match=message):
        check(asset, network())


def test_another_size_is_refused(asset: Path) -> None:
    with pytest.raises(ArtifactError, match=r"takes .*16, 16.* where an image of shape .*32, 32"):
        check(asset, network(size=32))


def test_what_is_whole_is_read(asset: Path) -> None:
    assert check(asset, network()).counts()["conv2d"] >= 3
    assert metadata(asset)["digest"] == digest(asset)


def test_no_date_decides_its_bytes(asset: Path) -> None:
    values = json.loads((asset / "metadata.json").read_text())
    assert values["creationDate"] == "19700101T000000Z"
    assert list(values) == sorted(values)
