"""What makes a step run again, and what does not: no key may miss what decides its result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from care import checkpoint
from care.factory import create_model
from pipeline import config
from pipeline.core import hashes, machine
from pipeline.core.errors import CheckpointError
from pipeline.core.files import file_hash
from pipeline.core.listing import Folders
from pipeline.core.network import Network
from pipeline.scheduler.plan import make_context, plan
from pipeline.source import Source
from pipeline.stages.context import StageStep
from pipeline.steps import keys
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.keys import OWN, PROJECT, Code
from pipeline.targets.ort.session import Settings
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt import target as trt
from pipeline.targets.tensorrt.device import Gpu

Planned = Callable[..., dict[str, str]]

CONFIG = """\
name: trial
model: {name: timm/test_resnet, checkpoint: weights.pt}
data: {validation: 'folder:data', calibration: 'folder:data'}
preprocess: {size: 32, crop: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
targets:
  trt: {precisions: [fp16, int8], compute_capabilities: ["8.9"]}
  ort: {precisions: [fp32, int8]}
  coreml: {precisions: [fp16, w8a8], deployment_target: iOS17}
"""

NETWORK = Network("trial", ("ant", "bee"), (3, 32, 32), {"mean": [0.5], "std": [0.5]})

SILENT: Any = lambda line: None  # noqa: E731
"""A log that keeps nothing."""

FACTS: Mapping[str, Any] = {
    "network": NETWORK.to_dict(),
    "session": Settings().to_dict(),
    "library_version": "1.0",
    "cuda_major": 13,
    "compute_capabilities": ["8.9"],
}
"""What the targets ask of an artifact to know whether they can run it."""


def write_project(folder: Path) -> Path:
    for split in ("train", "val"):
        for shade, name in enumerate(("ant", "bee")):
            images = folder / "data" / split / name
            images.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (80 * shade, 80 * i, 0)).save(images / f"{i}.png")
    (folder / "weights.pt").write_bytes(b"weights")
    (folder / "pipeline.yaml").write_text(CONFIG)
    return folder


def steps_of(folder: Path, code: Code | None = None) -> dict[str, StageStep]:
    """The steps of a project, which is the working directory, by name."""
    context = make_context(config.load(folder / "pipeline.yaml"), SILENT, lambda *told: None)
    if code is not None:
        context = dataclasses.replace(context, code=code)
    return {step.name: step for step in plan(context) if isinstance(step, StageStep)}


def finish(steps: Mapping[str, StageStep]) -> None:
    """Leave an artifact of every step, of which the content is its name."""
    for step in steps.values():

        def build(folder: Path, name: str = step.name) -> Mapping[str, Any]:
            (folder / "file").write_text(name)
            return FACTS

        step.make(build)
    next(iter(steps.values())).context.source.hashes.save()


def reasons(steps: Mapping[str, StageStep]) -> dict[str, str]:
    """Why steps have to run, those that have to."""
    stale = {name: step.stale() for name, step in steps.items()}
    return {name: why for name, why in stale.items() if why is not None}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every step is finished; not to be changed."""
    folder = write_project(tmp_path_factory.mktemp("done") / "project")
    with contextlib.chdir(folder):
        finish(steps_of(folder))
    return folder


@pytest.fixture
def project(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the working directory."""
    folder = shutil.copytree(done, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def planned() -> Callable[..., dict[str, str]]:
    """Why the steps of a project have to run, by name: (folder, code)."""
    return lambda folder, code=None: reasons(steps_of(folder, code))


TIMED = {"precision/int8-ort", "ort/fp32", "ort/int8", "bench/trt", "bench/ort", "bench/coreml"}
"""Steps that measure, and decide or report by it."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code."""
    folder = tmp_path_factory.mktemp("code")
    for package in OWN:
        shutil.copytree(
            PROJECT / package,
            folder / package,
            ignore=lambda _, names: [n for n in names if n.endswith((".gz", ".pyc"))],
        )
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StageStep]]:
    """All steps of a project, finished."""
    with pytest.MonkeyPatch.context() as patch:
        folder = write_project(tmp_path_factory.mktemp("finished") / "project")
        patch.chdir(folder)
        steps = steps_of(folder)
        finish(steps)
        yield steps


def with_code(step: StageStep, code: Code) -> str | None:
    """Why a step has to run with other code."""
    before = step.context
    step.context = dataclasses.replace(before, code=code)
    try:
        return step.stale()
    finally:
        step.context = before


def test_nothing_runs_again_by_itself(project: Path, planned: Planned) -> None:
    assert planned(project) == {}


MUTATED = (
    "export",
    "onnx",
    "calibration",
    "precision/float16",
    "precision/int8-trt",
    "precision/int8-ort",
    "trt/fp16",
    "ort/fp32",
    "coreml/w8a8",
    "validate/samples",
    "validate/pytorch",
    "validate/golden",
    "validate/trt-fp16",
    "validate/coreml-fp16",
    "bench/ort",
)


def reread(code: Code, module: str) -> Code:
    """The same code, of which one module is read again: reading 300 for each takes 0.1 s."""
    again = copy.copy(code)
    again._modules = {name: found for name, found in code._modules.items() if found.title != module}
    again._found = {}
    return again


def test_a_changed_line_makes_those_steps_run_that_have_the_module(
    finished: dict[str, StageStep], sources: Path
) -> None:
    modules = {name: set(finished[name].code()) for name in MUTATED}
    assert min(map(len, modules.values())) > 10
    whole = Code(sources)
    assert [with_code(finished[name], whole) for name in MUTATED] == [None] * len(MUTATED)
    for module in sorted(set().union(*modules.values())):
        file = sources / module
        before = file.read_bytes()
        file.write_bytes(before + b"\n# changed\n")
        code = reread(whole, module)
        why = {name: with_code(finished[name], code) for name in MUTATED}
        expected = {name: f"changed: {module}" for name in MUTATED if module in modules[name]}
        assert {name: said for name, said in why.items() if said} == expected
        file.write_bytes(before)
    code = Code(sources)
    assert [with_code(finished[name], code) for name in MUTATED] == [None] * len(MUTATED)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("export", "care/checkpoint care/factory care/fuse care/data/folders pipeline/source"),
        ("validate/samples", "care/data/fashion_mnist care/data/tars pipeline/source"),
        ("calibration", "calibration/sample care/data/base pipeline/core/listing"),
        ("onnx", "pipeline/stages/onnxsim_process pipeline/graphs/metadata"),
        ("precision/float16", "pipeline/targets/floats pipeline/graphs/float16"),
        ("precision/int8-trt", "pipeline/targets/tensorrt/quantize pipeline/emulate/onnx/executor"),
        ("precision/int8-ort", "pipeline/targets/ort/quantize pipeline/targets/ort/tune"),
        ("trt/fp16", "pipeline/targets/base pipeline/targets/tensorrt/process"),
        ("ort/fp32", "pipeline/graphs/passes/nchwc pipeline/targets/ort/tune"),
        ("coreml/fp16", "care/checkpoint care/fuse pipeline/source"),
        ("validate/pytorch", "care/checkpoint pipeline/targets/pytorch"),
        ("validate/ort-fp32", "pipeline/core/network pipeline/targets/ort/runner"),
        ("validate/trt-fp16", "pipeline/targets/tensorrt/emulation pipeline/emulate/kernels"),
        ("bench/ort", "pipeline/targets/ort/runner pipeline/core/timing care/checkpoint"),
        ("bench/trt", "pipeline/targets/tensorrt/runner pipeline/targets/tensorrt/nvml"),
    ],
)
def test_what_does_the_work_is_in_the_key(
    name: str, modules: str, finished: dict[str, StageStep]
) -> None:
    assert {f"{module}.py" for module in modules.split()} <= set(finished[name].code())


def change_all(sources: Path, folder: str) -> dict[Path, bytes]:
    """Append a line to every module below a folder; returns what was there."""
    below = sources / folder
    files = [below] if below.is_file() else sorted(below.rglob("*.py"))
    assert files
    before = {file: file.read_bytes() for file in files}
    for file, content in before.items():
        file.write_bytes(content + b"\n# changed\n")
    return before


@pytest.mark.parametrize(
    ("folder", "own"),
    [
        ("pipeline/targets/coreml", "coreml"),
        ("pipeline/targets/ort", "ort"),
        ("pipeline/targets/tensorrt", "trt"),
    ],
)
def test_a_target_changes_nothing_of_the_others(
    folder: str, own: str, finished: dict[str, StageStep], sources: Path
) -> None:
    before = change_all(sources, folder)
    code = Code(sources)
    stale = {name for name, step in finished.items() if with_code(step, code)}
    for file, content in before.items():
        file.write_bytes(content)
    steps = {name for name, step in finished.items() if step.target == own}
    assert stale == steps | {n for n in finished if n.startswith("precision/") and own in n}


@pytest.mark.parametrize(
    "place",
    [
        "pipeline/report",
        "pipeline/commands",
        "pipeline/exports",
        "pipeline/scheduler",
        "pipeline/cli.py",
        "pipeline/config.py",
        "pipeline/targets/registry.py",
        "care/train.py",
        "care/evaluate.py",
    ],
)
def test_what_only_shows_or_plans_makes_nothing_run(
    place: str, finished: dict[str, StageStep], sources: Path
) -> None:
    before = change_all(sources, place)
    code = Code(sources)
    stale = {name for name, step in finished.items() if with_code(step, code)}
    for file, content in before.items():
        file.write_bytes(content)
    assert stale == set()


def test_a_form_changes_its_precision_and_not_the_others_builds(
    finished: dict[str, StageStep], sources: Path
) -> None:
    before = change_all(sources, "pipeline/targets/ort/quantize.py")
    code = Code(sources)
    stale = {name for name, step in finished.items() if with_code(step, code)}
    for file, content in before.items():
        file.write_bytes(content)
    assert stale == {"precision/int8-ort"}


def test_a_step_without_the_source_in_its_key_cannot_use_it(finished: dict[str, StageStep]) -> None:
    with pytest.raises(AssertionError, match="without from_source"):
        _ = finished["ort/fp32"].source
    assert finished["export"].source is finished["export"].context.source


def test_stages_that_read_the_source_say_so() -> None:
    """Functions beside the steps get the source by a context, which does not ask."""
    for file in (PROJECT / "pipeline/stages").glob("*.py"):
        if file.stem != "context" and "context.source" in file.read_text():
            stage = importlib.import_module(f"pipeline.stages.{file.stem}")
            steps = [
                each
                for each in vars(stage).values()
                if isinstance(each, type) and each.__module__ == stage.__name__
            ]
            own: list[type[StageStep]] = [step for step in steps if issubclass(step, StageStep)]
            assert own
            assert all(step.from_source for step in own), file


def edit(project: Path, old: str, new: str) -> None:
    path = project / "pipeline.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_changed_setting_is_named(project: Path, planned: Planned) -> None:
    edit(project, "targets:", "export: {opset: 21, simplify: false}\ntargets:")
    assert planned(project) == {
        "export": "changed: settings export.opset",
        "onnx": "changed: settings export.simplify",
    }


def test_images_at_a_time_change_the_last_bits_of_logits(project: Path, planned: Planned) -> None:
    runs = ("pytorch", "trt-fp16", "trt-int8", "ort-fp32", "ort-int8", "coreml-fp16", "coreml-w8a8")
    edit(project, "targets:", "validation: {batch: 3}\ntargets:")
    assert planned(project) == dict.fromkeys(
        [f"validate/{name}" for name in runs], "changed: settings validation.batch"
    )


def test_a_changed_option_of_a_target_is_named(project: Path, planned: Planned) -> None:
    edit(project, '["8.9"]', '["8.6"]')
    why = "changed: settings targets.trt.compute_capabilities"
    assert planned(project) == {"trt/fp16": why, "trt/int8": why}


def test_a_changed_tool_is_named_with_its_versions(
    project: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = keys.versions("torch")["torch"]
    real = keys._version
    monkeypatch.setattr(keys, "_version", lambda p: "9.9" if p == "torch" else real(p))
    assert planned(project)["export"] == f"changed: torch {known} -> 9.9"


def test_several_changes_are_named_and_many_are_counted(project: Path, planned: Planned) -> None:
    edit(project, "size: 32", "size: 64")
    edit(project, "test_resnet", "test_vit")
    assert planned(project)["export"] == ("changed: settings model.name, settings preprocess.size")
    edit(project, "crop: 1.0, mean: [0.5, 0.5, 0.5]", "crop: 0.9, mean: [0.4, 0.5, 0.5]")
    edit(project, "std: [0.5, 0.5, 0.5]", "std: [0.4, 0.5, 0.5], interpolation: bilinear")
    assert planned(project)["export"].endswith(" and 2 more")


def test_another_checkpoint_is_named_by_content(project: Path, planned: Planned) -> None:
    shutil.copy(project / "weights.pt", project / "copy.pt")
    edit(project, "weights.pt", "copy.pt")
    assert planned(project) == {}
    (project / "copy.pt").write_bytes(b"other weights")
    names = ("export", "validate/pytorch", "coreml/fp16", "coreml/w8a8")
    benches = ("bench/trt", "bench/ort", "bench/coreml")
    assert planned(project) == dict.fromkeys((*names, *benches), "changed: checkpoint")


def test_a_project_may_lie_elsewhere(
    project: Path, planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "deep" / "elsewhere"
    shutil.copytree(project, elsewhere)
    monkeypatch.chdir(elsewhere)
    shutil.rmtree(project)
    assert planned(elsewhere) == {}
    # Absolute names of the same files, and code that lies elsewhere, are the same too.
    edit(elsewhere, "folder:data", f"folder:{elsewhere}/data")
    edit(elsewhere, "weights.pt", f"{elsewhere}/weights.pt")
    assert planned(elsewhere) == {}


def test_code_may_lie_elsewhere(project: Path, planned: Planned, sources: Path) -> None:
    assert planned(project, Code(sources)) == {}


SAMPLES = {"validate/samples", "calibration"}


def test_a_changed_image_is_named(project: Path, planned: Planned) -> None:
    Image.new("RGB", (8, 8), "red").save(project / "data/val/ant/0.png")
    assert planned(project) == dict.fromkeys(SAMPLES, "changed: the images of data.validation")


def test_a_split_that_is_not_used_is_not_looked_at(project: Path, planned: Planned) -> None:
    (project / "data/train/ant/0.png").write_bytes(b"changed")
    assert planned(project) == {"calibration": "changed: the images of data.calibration"}
    (project / "data/train/ant/notes.txt").write_text("no image: an error, for who asks")
    steps = steps_of(project)
    del steps["calibration"]
    assert reasons(steps) == {}


def test_renamed_and_added_classes_change_the_labels(project: Path, planned: Planned) -> None:
    names = {"export", "validate/pytorch", "coreml/fp16", "coreml/w8a8", *SAMPLES}
    names |= {"bench/trt", "bench/ort", "bench/coreml"}
    for split in ("train", "val"):
        (project / "data" / split / "ant").rename(project / "data" / split / "zebra")
    found = planned(project)
    assert set(found) == names
    assert found["export"] == "changed: the labels"
    for split in ("train", "val"):
        (project / "data" / split / "zebra").rename(project / "data" / split / "ant")
    assert planned(project) == {}
    for split in ("train", "val"):
        shutil.copytree(project / "data" / split / "ant", project / "data" / split / "cat")
    assert planned(project)["export"] == "changed: the labels"


def test_a_file_of_labels_counts_by_content(project: Path, planned: Planned) -> None:
    (project / "labels.txt").write_text("ant\nbee\n")
    edit(project, "folder:data'}", "folder:data', labels: labels.txt}")
    assert planned(project)["export"] == "changed: the labels"
    finish(steps_of(project))
    (project / "labels.txt").rename(project / "classes.txt")
    edit(project, "labels.txt", "classes.txt")
    assert planned(project) == {}


def test_a_fingerprint_trusts_sizes_and_says_so(project: Path, planned: Planned) -> None:
    edit(project, "folder:data'}", "folder:data', identity: fingerprint}")
    assert planned(project) == dict.fromkeys(
        SAMPLES,
        "changed: the images of data.validation, settings data.identity",
    ) | {
        "calibration": "changed: the images of data.calibration, settings data.identity, "
        "the images of data.validation"
    }
    facts = steps_of(project)["export"].source.data_facts("validation")
    assert facts["identity"] == "fingerprint"


def test_what_was_measured_is_measured_again_on_another_machine(
    project: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine.cpu_class()
    for part, other in (("cpu", "another"), ("instructions", "avx9"), ("cpus_granted", 99)):
        monkeypatch.setattr(machine, "cpu_class", lambda p=part, o=other: {**here, p: o})
        assert planned(project) == dict.fromkeys(TIMED, f"changed: machine.{part}")


def test_what_a_gpu_decides_belongs_to_it(
    project: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu("RTX 4090", "8.9", 24 << 30, (13, 0))
    monkeypatch.setattr(trt, "find_gpu", lambda: gpu)
    full: dict[str, str | None] = {api.RTX: "1.0", api.FULL: None}
    monkeypatch.setattr(api, "installed", full.get)
    assert "machine.gpu" in planned(project)["bench/trt"]
    finish(steps_of(project))
    # TensorRT-RTX builds the same engine anywhere; the full one times kernels on the GPU.
    full[api.FULL] = "10.0"
    assert "machine.gpu" in planned(project)["trt/fp16"]
    finish(steps_of(project))
    gpu = dataclasses.replace(gpu, name="RTX 5090")
    assert set(planned(project)) == {"trt/fp16", "trt/int8", "bench/trt"}
    assert planned(project)["trt/fp16"] == "changed: machine.gpu"
    full[api.FULL] = None
    finish(steps_of(project))
    gpu = dataclasses.replace(gpu, name="RTX 4090")
    assert planned(project) == {"bench/trt": "changed: machine.gpu"}


def test_artifacts_of_an_earlier_version_are_read_and_made_again(
    project: Path, planned: Planned
) -> None:
    path = project / "engines/trial/export" / MANIFEST
    plain = json.loads(path.read_text())
    digest = Artifact.read(path.parent).digest
    del plain["inputs"], plain["code"], plain["seal"]
    path.write_text(json.dumps({**plain, "format": 1}))
    assert Artifact.read(path.parent).digest == digest
    assert "has no seal: made by an older version" in planned(project)["export"]


def test_a_dataset_is_identified_once_a_run_and_tells_how_far_it_is(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    seen: list[Path] = []
    real = hashes.identify

    def identify(split: Folders, *others: Any) -> Any:
        seen.append(split.root)
        return real(split, *others)

    monkeypatch.setattr("pipeline.source.identify", identify)
    (project / "engines/trial/.hashes.sqlite").unlink()
    context = make_context(
        config.load(project / "pipeline.yaml"),
        SILENT,
        lambda done, total=None, what="": told.append(f"{done} of {total} {what}"),
    )
    for step in plan(context):
        assert step.stale() is None
    assert seen == [Path("data/train"), Path("data/val")]
    assert "3 of 4 hashing the images of data.validation" in told


def test_samples_say_how_their_images_are_known(project: Path) -> None:
    facts = steps_of(project)["calibration"].source.data_facts("calibration")
    assert facts["identity"] == "content"
    assert facts["files"] == 4


def test_a_checkpoint_that_changes_during_a_run_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where size, date and inode are as they were."""
    monkeypatch.chdir(write_project(tmp_path))
    weights = tmp_path / "weights.pt"
    module = create_model("test_resnet", num_classes=2)
    first = {name: value.clone() for name, value in module.state_dict().items()}
    checkpoint.save(weights, first)
    date = weights.stat().st_mtime_ns
    before = source_of(tmp_path)
    known = before.checkpoint_hash
    other = {name: torch.zeros_like(value) for name, value in first.items()}
    checkpoint.save(tmp_path / "other.pt", other)
    weights.write_bytes((tmp_path / "other.pt").read_bytes())
    os.utime(weights, ns=(date, date))
    with pytest.raises(CheckpointError, match=r"^model.checkpoint: weights\.pt has changed since"):
        _ = before.module
    after = source_of(tmp_path)
    assert after.checkpoint_hash == file_hash(weights) != known
    assert not any(value.any() for value in after.module.state_dict().values())


def source_of(folder: Path) -> Source:
    context = make_context(config.load(folder / "pipeline.yaml"), SILENT, lambda *told: None)
    context.source.hashes.save()
    return context.source
