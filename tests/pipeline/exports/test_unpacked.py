"""A bundle that arrived is held against what was packed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Network
from pipeline.exports.bundle import write_bundle
from pipeline.exports.unpacked import SIGNATURE, SUMS, Bundle, is_bundle, opened
from tests.pipeline.report.making import Maker, configured

NETWORK = Network("net", ("cat", "dog"), (3, 8, 8), {"size": 8, "crop": 0.9})


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    make = Maker(configured(tmp_path))
    artifacts = [make.make(name, {"images": 1}) for name in ("ort/fp32", "trt/fp16")]
    return write_bundle(artifacts, NETWORK, "net", tmp_path / "net.tar.gz")


@pytest.fixture
def folder(archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "there", filter="data")
    return tmp_path / "there" / "net"


def test_what_arrived_whole_is_accepted(archive: Path, folder: Path, tmp_path: Path) -> None:
    for path in (archive, folder):
        assert is_bundle(path)
        with opened(path) as bundle:
            bundle.verify()
            assert [each.name for each in bundle.artifacts()] == ["ort/fp32", "trt/fp16"]
            assert bundle.signature(None) == "not signed"
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "none")


def _append(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


def _link(folder: Path) -> None:
    (folder / "labels.txt").rename(folder.parent / "elsewhere")
    (folder / "labels.txt").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_append("ort/fp32/model.bin"), "model.bin has changed since it was packed"),
        (_append("labels.txt"), "labels.txt has changed"),
        (lambda folder: (folder / "labels.txt").unlink(), "labels.txt is missing"),
        (lambda folder: (folder / "more").write_text("x"), "more does not belong to this bundle"),
        (_link, "labels.txt is a link, where a regular file belongs"),
        (_append(SUMS), "SHA256SUMS is damaged"),
        (
            lambda folder: (folder / SUMS).write_text(f"{'0' * 64}  ../elsewhere\n"),
            "leads out of the bundle",
        ),
    ],
)
def test_what_was_changed_on_the_way_is_found(
    folder: Path, spoil: Callable[[Path], object], why: str
) -> None:
    spoil(folder)
    with pytest.raises(ArtifactError, match=why):
        Bundle(folder).verify()


def test_an_artifact_of_another_seal_is_found(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    seal = Bundle(folder).artifacts()[0].seal
    (folder / "manifest.json").write_text(text.replace(seal, "0" * 64))
    with pytest.raises(ArtifactError, match="is not the ort/fp32 that was packed"):
        Bundle(folder).artifacts()
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        Bundle(folder).artifacts()


def packed(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, 3 if kind == tarfile.REGTYPE else 0
    return member


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (_member("net/x", tarfile.SYMTYPE), "holds net/x, no regular file"),
        (_member("net/x", tarfile.FIFOTYPE), "holds net/x, no regular file"),
        (_member("../x"), "is damaged"),
        (_member("net/x"), "it holds no SHA256SUMS"),
    ],
)
def test_an_archive_that_is_no_bundle_is_refused(
    tmp_path: Path, member: tarfile.TarInfo, why: str
) -> None:
    path = packed(tmp_path / "net.tar", member)
    with pytest.raises(ArtifactError, match=why), opened(path):
        pass
    assert not (tmp_path.parent / "x").exists()


def test_an_archive_that_was_cut_off_is_refused(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match="is damaged"), opened(archive):
        pass


def test_an_archive_larger_than_the_disk_is_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    why = "larger unpacked than what the disk has left"
    with pytest.raises(ArtifactError, match=why), opened(archive):
        pass


def test_a_signature_is_asked_for_by_a_key(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from pipeline.core.signing import Signer, Verifier
    from tests.pipeline.core.test_signing import PRIVATE, PUBLIC

    (tmp_path / "key.pem").write_text(PRIVATE)
    (tmp_path / "key.pub").write_text(PUBLIC)
    verifier = Verifier(tmp_path / "key.pub")
    with pytest.raises(ArtifactError, match=r"is not signed: SHA256SUMS\.sig is missing"):
        Bundle(folder).signature(verifier)
    sums = (folder / SUMS).read_bytes()
    (folder / SIGNATURE).write_bytes(Signer(tmp_path / "key.pem").sign(sums))
    assert Bundle(folder).signature(None).startswith("signed, not verified: give")
    assert Bundle(folder).signature(verifier).startswith("signed by the owner of ")
    Bundle(folder).verify()
    (folder / SUMS).write_bytes(sums[:-1])
    with pytest.raises(ArtifactError, match="SHA256SUMS is not signed by the owner"):
        Bundle(folder).signature(verifier)
