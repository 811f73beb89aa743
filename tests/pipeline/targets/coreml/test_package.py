from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Network
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.coreml.runner import check_probabilities
from pipeline.targets.coreml.verify import probes

Build = Callable[..., Artifact]


def test_our_classifier_is_the_one_that_coremltools_makes(
    package: Path, tiny: Callable[..., nn.Module], make_network: Callable[..., Network]
) -> None:
    import coremltools as ct

    of = make_network()
    with logged(lambda line: None):
        model = ct.convert(
            deploy(tiny(), of).program,
            convert_to="milinternal",
            inputs=[ct.ImageType(name="image", shape=(1, 3, 16, 16))],
            outputs=[ct.TensorType(name="logits"), ct.TensorType(name="probabilities")],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
        )
        model.functions["main"].output_types = None
        theirs = ct.convert(
            model,
            convert_to="mlprogram",
            classifier_config=ct.ClassifierConfig(
                list(of.labels), predicted_probabilities_output="probabilities"
            ),
            minimum_deployment_target=ct.target.iOS16,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).get_spec()
    ours = ct.proto.Model_pb2.Model()
    ours.ParseFromString((package / saved.SPECIFICATION).read_bytes())

    def classify(specification: object) -> object:
        operation = saved._block(specification).operations[-1]
        operation.attributes.clear()  # its name
        return operation

    assert classify(ours) == classify(theirs)
    assert saved._block(ours).outputs == saved._block(theirs).outputs
    for mine, their in zip(ours.description.output, theirs.description.output, strict=True):
        assert (mine.name, mine.type) == (their.name, their.type)
    assert ours.description.predictedFeatureName == theirs.description.predictedFeatureName
    assert (
        ours.description.predictedProbabilitiesName == theirs.description.predictedProbabilitiesName
    )


def test_twin_takes_and_gives_arrays(
    build: Build, package: Path, tmp_path: Path, make_network: Callable[..., Network]
) -> None:
    twin = tmp_path / "twin.mlpackage"
    saved.as_arrays(package, twin)
    pixels = probes(make_network()).pixels
    executor = MilExecutor(twin)
    assert executor.labels == ()
    assert [feature.name for feature in executor.program.outputs] == ["logits"]
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    expected = MilExecutor(package).predict(pixels)["logits"]
    np.testing.assert_array_equal(executor.logits(planes), expected)
    with pytest.raises(ArtifactError, match="no classifier"):
        saved.as_arrays(twin, tmp_path / "again.mlpackage")
    with pytest.raises(ArtifactError, match="holds no"):
        saved.as_arrays(tmp_path / "none.mlpackage", twin)


def test_package_holds_nothing_but_what_its_manifest_names(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    items = manifest["itemInfoEntries"]
    assert {item["path"] for item in items.values()} == {
        "com.apple.CoreML/model.mlmodel",
        "com.apple.CoreML/weights",
    }
    assert items[manifest["rootModelIdentifier"]]["name"] == "model.mlmodel"
    assert {path.name for path in package.iterdir()} == {"Data", "Manifest.json"}


def test_coremltools_opens_the_package(package: Path) -> None:
    import coremltools as ct

    model = ct.models.MLModel(str(package), skip_model_load=True)
    assert model.author == "Ada"
    assert model.get_spec().description.metadata.userDefined["name"] == "tiny"


def test_digest_changes_with_any_file(package: Path, tmp_path: Path) -> None:
    before = saved.digest(package)
    weights = package / saved.WEIGHTS / "weight.bin"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert saved.digest(package) != before
    with pytest.raises(ArtifactError, match="no Core ML package"):
        saved.digest(tmp_path / "none")


def test_probabilities_are_checked() -> None:
    logits = np.array([[1.0, 2.0, -50.0], [np.nan, 0, 0]], np.float32)
    softmax = torch.from_numpy(logits).softmax(-1).numpy()
    check_probabilities(logits, softmax, Path("p"))
    with pytest.raises(ArtifactError, match="no softmax"):
        check_probabilities(logits, logits, Path("p"))
    with pytest.raises(ArtifactError, match="no softmax"):
        check_probabilities(logits[:1], np.full((1, 3), np.nan, np.float32), Path("p"))


@pytest.mark.skipif(os.name == "nt", reason="needs a umask")
@pytest.mark.parametrize(
    ("umask", "for_files", "for_folders"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_the_umask_decides_who_may_read_a_package(
    package: Path, tmp_path: Path, umask: int, for_files: int, for_folders: int
) -> None:
    copy = tmp_path / "copy.mlpackage"
    shutil.copytree(package, copy)
    before = os.umask(umask)
    try:
        saved.edit(copy, lambda specification: None)
    finally:
        os.umask(before)
    assert not (copy / ".modes").exists()
    for path in copy.rglob("*"):
        expected = for_folders if path.is_dir() else for_files
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
