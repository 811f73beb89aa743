"""Artifacts that were copied to a machine that has nothing else of the run."""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import pipeline
from care.data import open_dataset
from pipeline.cli import main
from pipeline.commands.alone import bench_alone
from pipeline.core import machine, timing
from pipeline.core.answers import Audit
from pipeline.core.errors import InputError
from pipeline.core.figures import Ratio
from pipeline.exports.golden import Golden, golden_of
from pipeline.steps.artifact import Artifact
from pipeline.targets.registry import TARGETS
from pipeline.targets.tensorrt.device import NO_DRIVER

FAST = ("--samples", "3", "--warmup", "1", "--max-seconds", "1")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("built")
    begin(folder / "trial")
    settings = {
        "name": "trial",
        "output": folder,
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {
            "ort": {"precisions": ("fp32",)},
            "trt": {"precisions": ("fp16",), "compute_capabilities": ("8.9",)},
        },
        "validation": {"images": 40},
    }
    pipeline.run(settings, only=("export", "simplify", "precision", "build", "validate"))
    return folder / "trial"


@pytest.fixture(scope="module")
def archive(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "trial.tar.gz"
    result = invoke("bundle", "trial", "--output", results.parent, "--file", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def there(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what a bundle holds, and nothing else."""
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "trial")
    return tmp_path / "trial"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def photos(folder: Path, count: int = 6) -> Path:
    dataset = open_dataset("fashion-mnist", "validation")
    for index in range(count):
        name = dataset.classes[dataset.label(index)].replace("/", "-")
        (folder / name).mkdir(parents=True, exist_ok=True)
        dataset.image(index).save(folder / name / f"{index}.png")
    return folder


def test_a_bundle_is_checked_packed_and_unpacked(archive: Path, there: Path) -> None:
    for path in (archive, "."):
        result = invoke("check", path)
        assert result.exit_code == 0, result.output
        assert "checksums; not signed" in result.output
        assert "opened by ONNX Runtime" in " ".join(result.output.split())
    (there / "labels.txt").write_text("cat\n")
    result = invoke("check", there)
    assert result.exit_code == 1
    assert "labels.txt has changed since it was packed" in result.output.replace("\n", "")


def test_an_artifacts_folder_is_checked_alone(there: Path) -> None:
    result = invoke("check", "ort/fp32")
    assert (result.exit_code, "damaged" in result.output) == (0, False), result.output
    with (there / "ort/fp32/model.onnx").open("ab") as stream:
        stream.write(b"x")
    result = invoke("check", "ort/fp32")
    assert (result.exit_code, "fetch it again" in result.output) == (1, True)


def test_a_key_is_for_bundles_alone(there: Path) -> None:
    assert invoke("check", "--key", "key.pub").exit_code == 2
    pytest.importorskip("cryptography")
    from tests.pipeline.core.test_signing import PUBLIC

    (there.parent / "key.pub").write_text(PUBLIC)
    result = invoke("check", "ort/fp32", "--key", "../key.pub")
    assert (result.exit_code, "signatures are of bundles" in result.output) == (2, True)
    result = invoke("check", ".", "--key", "../key.pub")
    assert (result.exit_code, "is not signed" in result.output.replace("\n", "")) == (1, True)


def test_latency_needs_nothing_but_the_folder(there: Path) -> None:
    result = invoke("bench", "--artifact", "ort/fp32", "--batch", "2", *FAST)
    assert result.exit_code == 0, result.output
    plain = json.loads(result.output.splitlines()[-1])
    assert set(plain["batches"]) == {"2"}
    assert plain["batches"]["2"]["ort/fp32"]["engine"]["p50"] > 0
    assert plain["images"] == "golden images"
    # The same conscience as in a run.
    assert "only 3 calls were timed" in plain["doubt"]
    assert "(!) latency is not to be trusted: only 3 calls were timed" in result.output


def test_a_folder_alone_is_called_without_a_rest_where_that_is_asked_for(there: Path) -> None:
    result = invoke("bench", "--artifact", "ort/fp32", "--sustained", "0.2", *FAST)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])["sustained"]["ort/fp32"]
    assert found["seconds"] >= 0.2
    assert "ort/fp32: 0 s without a rest:" in " ".join(result.output.split())
    plain = json.loads(invoke("bench", "--artifact", "ort/fp32", *FAST).output.splitlines()[-1])
    assert plain["sustained"] == {}


def test_percentiles_of_a_folder_alone_say_whether_they_stand(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    monkeypatch.setattr(machine, "granted", lambda: 2)
    monkeypatch.setattr(machine.Watch, "others", lambda self: 1.5)
    report = bench_alone([Path("ort/fp32")], samples=64, warmup=1)
    busy = "other processes kept 1.5 of 2 CPUs busy"
    assert report.plain["doubt"] == busy
    assert report.plain["validity"][1]["ort/fp32"] == {
        "p90": f"invalid: {busy}",
        "p99": f"invalid: 64 calls, and 662 are needed; {busy}",
    }
    assert "one image again and again takes" in " ".join(report.text.split())
    monkeypatch.setattr(machine.Watch, "others", lambda self: 0.0)
    monkeypatch.setattr(timing, "repeated", lambda runner, batches, protocol: None)
    report = bench_alone([Path("ort/fp32")], samples=64, warmup=1)
    assert report.plain["validity"][1]["ort/fp32"]["p90"] == "valid"
    forgetful = Audit(60, Ratio(0.5, (0.4, 0.6)))
    monkeypatch.setattr(timing, "repeated", lambda runner, batches, protocol: forgetful)
    report = bench_alone([Path("ort/fp32")], samples=64, warmup=1)
    assert "answers are remembered" in report.plain["validity"][1]["ort/fp32"]["p90"]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--samples", "100000000", "bench.samples: Input should be less than or equal to 1000000"),
        ("--warmup", "100000000", "bench.warmup: Input should be less than or equal to 1000000"),
        ("--max-seconds", "1e9", "bench.max_seconds: Input should be less than or equal to 604800"),
        ("--threads", "9999", "bench.threads: Input should be less than or equal to 4096"),
        ("--batch", "9999999", "bench.batches: Input should be less than or equal to 65536"),
    ],
)
def test_numbers_that_are_slips_of_the_pen_are_refused(
    there: Path, option: str, value: str, told: str
) -> None:
    result = invoke("bench", "--artifact", "ort/fp32", option, value)
    assert (result.exit_code, told in " ".join(result.output.split())) == (2, True), result.output


def test_a_folder_alone_is_measured_until_its_median_is_settled(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[timing.Protocol] = []
    measure = timing.interleaved

    def watched(runners: Any, batches: Any, protocol: timing.Protocol, **more: Any) -> Any:
        asked.append(protocol)
        return measure(runners, batches, protocol, **more)

    monkeypatch.setattr(timing, "interleaved", watched)
    bench_alone([Path("ort/fp32")], samples=3, warmup=1, settled=0.5)
    assert [each.settled for each in asked] == [0.5, 0.5]  # and the audit


def test_without_golden_images_latency_is_measured_on_noise(there: Path) -> None:
    shutil.rmtree(there / "golden")
    result = invoke("bench", "--artifact", "ort/fp32", "--json", *FAST)
    assert json.loads(result.output)["images"] == "seeded noise"
    folder = photos(there.parent / "photos", 1)
    result = invoke(
        "bench", "--artifact", "ort/fp32", "--json", "--data", f"folder:{folder}", *FAST
    )
    assert json.loads(result.output)["images"] == f"images of folder:{folder}"


def test_what_cannot_run_here_is_exit_code_4(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.targets.tensorrt.target.find_gpu", lambda: NO_DRIVER)
    result = invoke("bench", "--artifact", "ort/fp32", "--artifact", "trt/fp16", *FAST)
    assert result.exit_code == 4
    assert "error: not measured: trt/fp16: no NVIDIA" in result.output


def test_golden_images_are_those_of_the_bundle_and_of_the_results(
    there: Path, results: Path
) -> None:
    packed = golden_of(Artifact.read(there / "ort/fp32"))
    built = golden_of(Artifact.read(results / "ort/fp32"))
    assert isinstance(packed, Golden)
    assert isinstance(built, Golden)
    np.testing.assert_array_equal(packed.pixels, built.pixels)
    np.testing.assert_array_equal(packed.logits, built.logits)
    assert (packed.labels, packed.tolerance) == (built.labels, built.tolerance)
    assert packed.pixels.shape == (16, 64, 64, 3)


def test_accuracy_is_judged_by_golden_images(
    there: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(there / "ort")
    for path in ("fp32", results / "ort/fp32"):
        result = invoke("validate", "--artifact", path)
        assert result.exit_code == 0, result.output
        assert "holds: the same class for 16 of 16 golden images" in result.output
        (found,) = json.loads(result.output.splitlines()[-1])["artifacts"].values()
        assert (found["holds"], found["state"]) == (True, "measured")


def test_other_answers_than_where_it_was_built_are_exit_code_1(there: Path) -> None:
    path = there / "golden/ort-fp32/logits.f32"
    (np.fromfile(path, "<f4") * 1.01).astype("<f4").tofile(path)
    result = invoke("validate", "--artifact", "ort/fp32")
    assert result.exit_code == 1
    assert "DOES NOT HOLD: the same class for 16 of 16 golden images" in result.output


@pytest.mark.parametrize("name", ["kit.json", "pixels.u8"])
def test_golden_images_that_are_damaged_are_refused(there: Path, name: str) -> None:
    path = there / "golden/ort-fp32" / name
    path.write_bytes(path.read_bytes()[:-9])
    result = invoke("validate", "--artifact", "ort/fp32")
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit), result.output


def test_golden_images_of_another_artifact_are_refused(there: Path) -> None:
    shutil.rmtree(there / "golden/ort-fp32")
    shutil.copytree(there / "golden/trt-fp16", there / "golden/ort-fp32")
    result = invoke("validate", "--artifact", "ort/fp32")
    assert (result.exit_code, "is of another ort/fp32 than" in result.output) == (2, True)


def test_accuracy_is_judged_on_the_users_images(there: Path) -> None:
    folder = photos(there.parent / "photos")
    result = invoke("validate", "--artifact", "ort/fp32", "--data", f"folder:{folder}")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.output.splitlines()[-1])["artifacts"].values()
    assert found["images"] == 6
    assert found["top1"]["value"] >= 5 / 6
    next(folder.iterdir()).rename(folder / "Zebra")
    result = invoke("validate", "--artifact", "ort/fp32", "--data", f"folder:{folder}")
    assert result.exit_code == 2
    assert "--data: the class 'Zebra' is none of the network's, which are" in result.output


def test_a_folder_alone_says_where_images_come_from(there: Path) -> None:
    shutil.move(there / "ort/fp32", there.parent / "alone")
    result = invoke("validate", "--artifact", there.parent / "alone")
    assert result.exit_code == 2
    assert "--data folder:PATH, or take a bundle" in result.output
    assert invoke("bench", "--artifact", there.parent / "alone", *FAST).exit_code == 0


@pytest.mark.parametrize("command", ["bench", "validate"])
def test_what_belongs_to_a_run_is_refused(there: Path, command: str) -> None:
    for options, why in (
        ((), "name --target"),
        (("--target", "ort", "--artifact", "ort/fp32"), "name --target"),
        (("--target", "ort", "--data", "folder:x"), "--data is for --artifact"),
        (("--artifact", "ort/fp32", "--as-cpu", "avx2"), "for --target"),
        (("--artifact", "ort/fp32", "--precision", "fp32"), "for --target"),
        (("--artifact", "golden"), "holds no artifact.json"),
        (("--artifact", "ort/fp32", "--data", "fldr:x"), "did you mean folder?"),
    ):
        result = invoke(command, *options)
        assert (result.exit_code, why in result.output) == (2, True), result.output


def test_the_same_artifact_twice_is_refused(there: Path) -> None:
    from pipeline.commands.alone import bench_alone

    with pytest.raises(InputError, match="named twice"):
        bench_alone([Path("ort/fp32"), Path("ort/fp32/")])


def test_batches_that_an_artifact_does_not_take_are_refused(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class One(contextlib.nullcontext[None]):
        """A runner that takes single images."""

        smallest = largest = 1
        device = "toy"

        def __enter__(self) -> Any:
            return self

    monkeypatch.setattr(type(TARGETS["ort"]), "open", lambda self, artifact, threads: One())
    result = invoke("bench", "--artifact", "ort/fp32", "--batch", 2, *FAST)
    assert result.exit_code == 2
    assert "ort/fp32 takes batches of 1 to 1, not 2" in result.output
