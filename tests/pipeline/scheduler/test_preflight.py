"""All that is wrong is told at once, before anything is written, and without a framework."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

import pipeline
from care import checkpoint
from pipeline.cli import main
from pipeline.core import machine
from pipeline.core.errors import ConfigError, ModelError
from pipeline.scheduler import preflight
from pipeline.source import Source
from pipeline.stages.export import ExportStep
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.graphs import ExportFacts

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

SOUND: dict[str, Any] = {
    "name": "trial",
    "model": {"name": "timm/test_resnet", "checkpoint": "random"},
    "data": {"validation": "folder:photos", "calibration": "folder:loose"},
    "preprocess": {"size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3},
    "targets": {"ort": {"precisions": ["fp32", "int8"]}},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labelled photographs to judge on, and loose ones for calibration."""
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    (tmp_path / "loose").mkdir()
    for i in range(10):
        image = Image.new("RGB", (40, 40), (20 * i, 100, 255 - 20 * i))
        image.save(tmp_path / "photos" / ("ant", "bee")[i % 2] / f"{i}.png")
        Image.new("RGB", (40, 40), (20 * i, 10, 7)).save(tmp_path / "loose" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **sections: Any) -> Path:
    plain = {k: {**v, **sections[k]} if k in sections else v for k, v in SOUND.items()}
    plain |= {name: values for name, values in sections.items() if name not in SOUND}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    return path


def in_a_process(path: Path, *options: str) -> str:
    """Exit code of a run in an interpreter of its own, and whether that has loaded PyTorch."""
    program = (
        "import sys; from pipeline.cli import main\n"
        f"try: main(['run', {str(path)!r}, *{options!r}])\n"
        "except SystemExit as end: print('CODE', end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=path.parent, env=ENVIRONMENT, check=True
    )
    return result.stdout.splitlines()[-1]


def refused(path: Path, *options: str) -> list[str]:
    """Lines of what a run says that refuses, and that it writes nothing."""
    before = sorted(path.parent.rglob("*"))
    result = CliRunner().invoke(main, ["run", str(path), *options])
    assert result.exit_code == 2, result.output
    assert sorted(path.parent.rglob("*")) == before
    return result.output.removeprefix("error: ").splitlines()


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_all_that_is_wrong_is_told_at_once_with_its_line(
    project: Path, option: tuple[str, ...]
) -> None:
    path = write(
        project,
        model={"name": "timm/tset_resnet", "checkpoint": "gone.pt"},
        data={"validation": "folder:fotos", "calibration": "folder:lose"},
        calibration={"images": 4},
    )
    lines = refused(path, *option)
    text = path.read_text().splitlines()
    for key, words in {
        "name: timm": "unknown model 'timm/tset_resnet'; did you mean test_resnet",
        "checkpoint: gone": "gone.pt is no file",
        "validation: folder:fotos": "no folder at fotos",
        "calibration: folder:lose": "no folder at lose",
        "images: 4": "at least 8 images, not 4",
    }.items():
        number = next(i for i, line in enumerate(text, 1) if key in line)
        assert any(line.startswith(f"{path}:{number}: ") and words in line for line in lines), words
    assert len(lines) == 5


def test_more_threads_than_granted_are_told_before_anything_is_made(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "granted", lambda: 2)
    path = write(
        project,
        targets={"ort": {"precisions": ["fp32"], "threads": 3}},
        bench={"threads": 4},
    )
    result = CliRunner().invoke(main, ["run", str(path)])
    assert result.exit_code == 2
    told = result.output.splitlines()
    number = {n for n, line in enumerate(path.read_text().splitlines(), 1) if "threads" in line}
    assert [int(line.split(":")[-3]) for line in told] == sorted(number)
    assert "3 threads are asked for, this process may use 1 to 2" in told[0]
    assert "4 threads are asked for, this process may use 1 to 2" in told[1]
    assert not (project / "engines").exists()
    # What is not measured needs no threads to measure with.
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run", "--only", "build"])
    assert (result.exit_code, "3 threads" in result.output) == (2, True)
    assert "4 threads" not in result.output
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run", "--only", "export"])
    assert result.exit_code == 0, result.output


def test_a_sound_configuration_is_planned_and_nothing_is_written(project: Path) -> None:
    path = write(project)
    before = sorted(project.rglob("*"))
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "ort/int8" in result.output
    # Nothing was measured yet, and the plan says so rather than nothing.
    assert "not built yet; time not known yet" in result.output
    assert "with 50,000 validation images all steps: time not known yet" in result.output
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"calibration": "folder:photos"}}, "holds the images of data.validation"),
        ({"data": {"calibration": None}}, "data.calibration is missing, and ort/int8 needs"),
        ({"data": {"labels": "labels.txt"}}, "labels.txt does not name the class 'bee'"),
        (
            {"model": {"checkpoint": "stated.safetensors"}},
            "the checkpoint does not name the class 'bee'",
        ),
        ({"model": {"checkpoint": "lost.json"}}, "the shard a.safetensors is missing (1 of 1)"),
        ({"model": {"checkpoint": "notes.txt"}}, "notes.txt is no checkpoint"),
        ({"model": {"checkpoint": "page.pt"}}, "page.pt is no checkpoint but a web page"),
        (
            {"model": {"checkpoint": "three.pt"}},
            "three.pt has a head of 3 classes, and data.validation 2",
        ),
        ({"data": {"calibration": "folder:few"}}, "few holds 2 images"),
        ({"data": {"validation": "folder:mixed"}}, "notes.txt is not an image"),
        ({"preprocess": {"mean": [0.5], "std": [0.5], "channels": "gray"}}, "does not take images"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(
    project: Path, sections: dict[str, Any], words: str
) -> None:
    (project / "labels.txt").write_text("ant\nwasp\n")
    (project / "notes.txt").write_text("nothing to load")
    (project / "page.pt").write_text("<html>")
    three = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save(three, project / "three.pt")
    (project / "lost.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    checkpoint.save(project / "stated.safetensors", three, {"labels": ["ant", "cat", "wasp"]})
    for folder, name in (("few", "a.png"), ("few", "b.png"), ("mixed/ant", "a.png")):
        (project / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (1, 2, 3)).save(project / folder / name)
    (project / "mixed/ant/notes.txt").write_text("x")
    path = write(project, **sections)
    lines = refused(path)
    assert any(words in line and line.startswith(f"{path}:") for line in lines), lines


def test_calibration_images_are_needed_only_where_something_is_calibrated(project: Path) -> None:
    path = write(project, data={"calibration": None}, targets={"ort": {"precisions": ["fp32"]}})
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output


def test_what_contradicts_itself_is_told_at_once(project: Path) -> None:
    path = write(
        project, export={"batch": 4}, validation={"batch": 9999}, preprocess={"size": 4096}
    )
    keys = [line.split(": ")[1].split()[0] for line in refused(path)]
    assert keys == ["export.batch", "validation.batch"]


def test_a_disk_that_is_too_small_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10, 9, 1000))
    lines = refused(write(project))
    assert any("the decoded images take" in line and "free disk space" in line for line in lines)


def test_a_program_is_told_the_same(project: Path) -> None:
    path = write(project, model={"checkpoint": "gone.pt"}, data={"validation": "folder:fotos"})
    with pytest.raises(ConfigError) as error:
        pipeline.run(path)
    assert str(error.value).count("\n") == 1
    assert not (project / "engines").exists()


def test_a_plan_runs_no_code_of_the_user(project: Path) -> None:
    (project / "mine.py").write_text("open('ran', 'w')\ndef make():\n    return None\n")
    path = write(project)
    plain = yaml.safe_load(path.read_text())
    plain["model"] = {"module": "mine:make", "checkpoint": "own"}
    path.write_text(yaml.safe_dump(plain))
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not (project / "ran").exists()


def test_the_first_look_loads_no_framework(project: Path) -> None:
    path = write(project, model={"checkpoint": "gone.pt"})
    assert in_a_process(path) == "CODE 2 False"


def test_names_of_networks_are_those_that_timm_knows() -> None:
    import care.networks  # noqa: F401  registers our networks

    assert preflight.known_names() == set(timm.list_models())


@pytest.mark.parametrize(("name", "read"), [("care_s0", ["care"]), ("resnet18", ["care", "timm"])])
def test_sources_are_read_until_one_knows_the_name(
    name: str, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    sources = preflight._sources

    def noted(package: str, *below: str) -> Iterator[Path]:
        asked.append(package)
        return sources(package, *below)

    monkeypatch.setattr(preflight, "_sources", noted)
    monkeypatch.delitem(sys.modules, "timm")
    assert list(preflight._unknown_name(name)) == []
    assert asked == read


@pytest.fixture
def lent(project: Path) -> Iterator[str]:
    """Address of tar files with the photographs, and with the loose ones as if of a class."""
    from fsspec.implementations.memory import MemoryFileSystem

    files = MemoryFileSystem()
    for name, folder, inside in (("val", "photos", "val"), ("train", "loose", "train/ant")):
        with tarfile.open(project / f"{name}.tar", "w") as tar:
            tar.add(project / folder, inside)
        files.pipe_file(f"/lent/{name}.tar", (project / f"{name}.tar").read_bytes())
    yield "memory://lent"
    files.rm("/lent", recursive=True)


def test_images_at_an_address_are_looked_at_as_well(project: Path, lent: str) -> None:
    data = {"validation": f"tar:{lent}/val.tar", "calibration": f"tar:{lent}/val.tar"}
    told = "\n".join(refused(write(project, data=data)))
    assert f"data.calibration: {lent}/val.tar holds the images of data.validation" in told
    data["calibration"] = f"tar:{lent}/none.tar"
    told = "\n".join(refused(write(project, data=data)))
    assert f"data.calibration: no tar file at {lent}/none.tar: check" in told


def test_a_run_reads_images_at_an_address(project: Path, lent: str) -> None:
    """And takes what an equal set on a disk gave as its own."""
    data = {"validation": f"tar:{lent}/val.tar", "calibration": f"tar:{lent}/train.tar"}
    options = ("--only", "calibrate", "--quiet")
    first = CliRunner().invoke(main, ["run", str(write(project, data=data)), *options])
    assert first.exit_code == 0, first.output
    here = {"validation": "tar:val.tar", "calibration": "tar:train.tar"}
    path = write(project, data=here)
    planned = CliRunner().invoke(main, ["run", str(path), "--dry-run", "--only", "calibrate"])
    assert "up to date" in planned.output, planned.output


def test_a_network_whose_export_is_in_the_store_is_not_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second machine takes what the first one made: seconds, and no framework."""

    def build(self: ExportStep, folder: Path) -> Mapping[str, Any]:
        (folder / "model.onnx").write_bytes(b"what takes the exporter seconds")
        return ExportFacts(1, 20, 0.0, self.source.network).to_facts()

    monkeypatch.setattr(ExportStep, "build", build)
    store = {"address": str(project / "store"), "push": True}
    outputs = [str(project / name) for name in ("first", "second")]
    only = ["--only", "export", "--quiet"]
    path = write(project, store=store, output=outputs[0])
    first = CliRunner().invoke(main, ["run", str(path), *only])
    assert first.exit_code == 0, first.output
    path = write(project, store=store, output=outputs[1])
    assert in_a_process(path, *only) == "CODE 0 False"
    one, other = (Artifact.read(Path(output) / "trial" / "export") for output in outputs)
    assert one.digest == other.digest


@pytest.mark.parametrize("required", [False, True])
def test_a_store_that_does_not_answer_is_told_before_anything_is_made(
    project: Path, required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it is not required the network is looked at, since it is exported here."""
    looked: list[str] = []

    def look(source: Source) -> None:
        looked.append("network")
        raise ModelError("model.name: too large for this test")

    monkeypatch.setattr(Source, "network", property(look))
    (project / "store").write_text("no folder")
    store = {"address": str(project / "store"), "required": required}
    path = write(project, store=store)
    result = CliRunner().invoke(main, ["run", str(path), "--only", "export", "--quiet"])
    assert result.exit_code == (4 if required else 2), result.output
    assert ("cannot be read" if required else "too large") in result.output
    assert looked == ([] if required else ["network"])
    assert not (project / "engines").exists()
