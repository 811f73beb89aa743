"""What goes through a store by its digest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError, BuildError, DamagedError
from pipeline.core.files import file_hash
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.store import parcels
from pipeline.store.objects import Objects, object_name
from tests.pipeline.store.toys import Machine, Unsteady, context_of, entries, planned


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    machine = Machine(tmp_path / "here")
    machine.folder.mkdir()
    return planned(context_of(machine))[0].run()


@pytest.fixture
def content() -> dict[str, Any]:
    return {}


@pytest.fixture
def objects(content: dict[str, Any]) -> Objects:
    return entries(Unsteady(content)).objects


def test_an_artifact_arrives_as_it_was_made(
    made: Artifact, objects: Objects, tmp_path: Path
) -> None:
    parcel = parcels.send(objects, made)
    announced: list[str] = []
    there = parcels.receive(objects, parcel, tmp_path / "there", announce=announced.append)
    there.verify()
    assert (there.seal, there.facts) == (made.seal, made.facts)
    assert announced == [made.seal]
    assert file_hash(there.folder / MANIFEST) == parcel.sha256


def test_what_lies_there_already_is_not_fetched(
    made: Artifact, objects: Objects, content: dict[str, Any], tmp_path: Path
) -> None:
    sent = {made.name: parcels.send(objects, made)}
    parcels.receive_all(objects, sent, tmp_path / "there")
    content.clear()
    assert parcels.receive_all(objects, sent, tmp_path / "there")[made.name].seal == made.seal
    (tmp_path / "there" / made.name / "small").write_text("damaged")
    with pytest.raises(DamagedError, match="is missing"):
        parcels.receive_all(objects, sent, tmp_path / "there")


@pytest.mark.parametrize("which", ["manifest", "small"])
def test_other_bytes_than_the_digest_says_are_not_taken(
    made: Artifact, objects: Objects, content: dict[str, Any], tmp_path: Path, which: str
) -> None:
    parcel = parcels.send(objects, made)
    sha256 = parcel.sha256 if which == "manifest" else made.files["small"].sha256
    file = content[f"/store/{object_name(sha256)}"]
    file.seek(0)
    file.write(b"x")
    with pytest.raises(DamagedError, match="is damaged"):
        parcels.receive(objects, parcel, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert not list(tmp_path.glob(".making-*"))


def test_what_is_no_manifest_is_not_taken(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{}")
    parcel = parcels.send_file(objects, file, file_hash(file))
    with pytest.raises(DamagedError, match="is no manifest"):
        parcels.receive(objects, parcel, tmp_path / "there")


def test_what_a_check_refuses_leaves_what_was_there(
    made: Artifact, objects: Objects, tmp_path: Path
) -> None:
    parcel = parcels.send(objects, made)
    there = parcels.receive(objects, parcel, tmp_path / "there")

    def refuse(artifact: Artifact) -> None:
        raise BuildError("made from something else")

    with pytest.raises(BuildError, match="something else"):
        parcels.receive(objects, parcel, there.folder, refuse)
    there.verify()


def test_files_travel_once(objects: Objects, tmp_path: Path) -> None:
    file, there = tmp_path / "weights", tmp_path / "there" / "weights"
    file.write_text("weights")
    parcel = parcels.send_file(objects, file, file_hash(file))
    for _ in range(2):
        parcels.receive_file(objects, parcel, there)
        assert there.read_text() == "weights"
    there.write_text("another")
    parcels.receive_file(objects, parcel, there)
    assert there.read_text() == "weights"
    file.write_text("changed")
    with pytest.raises(ArtifactError, match="has changed"):
        parcels.send_file(objects, file, "0" * 64)
