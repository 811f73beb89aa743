"""Real commands among other people's files: nothing of theirs changes or goes."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.steps.artifact import Artifact

ROOT = Path(__file__).parents[2]

CONFIG = """\
name: trial
model: {onnx: model.onnx}
data: {validation: "folder:photos", calibration: "folder:samples"}
preprocess: {size: 8, crop: 1.0, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
calibration: {images: 8}
targets:
  ort: {precisions: [fp32], tune_seconds: 0.1}
bench: {batches: [1], samples: 3, warmup: 1, max_seconds: 2}
output: engines
"""


KEPT_UP = (".hashes.sqlite", ".imports.json", ".lock", ".announcing.lock")
"""Files of ours that a run may write; older versions of filelock give empty ones another date."""


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def command(folder: Path, *arguments: str) -> Result:
    """A command in this process, which has loaded what it takes long to load."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(main, arguments, catch_exceptions=False)


def watched(folder: Path) -> dict[str, str]:
    """What is at every path of a tree: a folder, a link, or a file's hash, date and mode."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content = f"link to {path.readlink()}"
        elif path.is_dir():
            content = "folder"
        else:
            stat = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            content = f"{digest} {stat.st_mtime_ns} {stat.st_mode:o}"
        found[path.relative_to(folder).as_posix()] = content
    return found


def lost(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Paths that changed or are gone."""
    return [name for name, content in before.items() if after.get(name) != content]


CANARIES = (
    "notes.txt",
    "src/train.py",
    "engines/README.md",
    "engines/other/export/model.onnx",
    "engines/other/.lock",
    "engines/other/.making-export-abcd_123/draft",
    "engines/trial/notes.txt",
    "engines/trial/pipeline.yaml",
    "engines/trial/.making-movies/film.mkv",
    "engines/trial/.making-export-abcd_123/draft",
    "engines/trial/ranges/of-mountains.json",
    "engines/trial/mydata/calibration/0001.png",
    "engines/trial/mydata/.making-of/photo.png",
    "engines/trial/ort/notes.txt",
    "engines/trial/ort/int8/mine.bin",
    "engines/trial/bench/results.csv",
    "engines/trial/validate/mine/artifact.json",
    "models/trial-notes.txt",
    "models/other/1/model.onnx",
)


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory, lay_graph_project: Callable[[Path], Path]
) -> Path:
    """A working folder full of canaries, after one run among them."""
    folder = lay_graph_project(tmp_path_factory.mktemp("ground"))
    for name in CANARIES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"canary {name}")
    (folder / "pipeline.yaml").write_text(CONFIG)
    (folder / "engines/trial/link").symlink_to("../other")
    before = watched(folder)
    result = process(folder, "run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert lost(before, watched(folder)) == []
    return folder


@pytest.fixture
def copied(ground: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ground"
    shutil.copytree(ground, folder, symlinks=True)
    return folder


def test_a_run_among_foreign_files_ends_well_and_a_second_does_nothing(copied: Path) -> None:
    before = watched(copied)
    result = command(copied, "run", "--quiet")
    assert result.exit_code == 0, result.stderr
    changed = lost(before, watched(copied))
    written = ("results.json", "report.md", "report.html", "run.log")
    assert set(changed) <= {f"engines/trial/{name}" for name in (*written, *KEPT_UP)}


def test_a_run_by_force_replaces_its_own_alone(copied: Path) -> None:
    before = watched(copied)
    result = command(copied, "run", "--only", "export", "--only", "build", "--force", "--quiet")
    assert result.exit_code == 0, result.stderr
    changed = lost(before, watched(copied))
    assert [name for name in changed if name in CANARIES or name.endswith("link")] == []
    assert not [name for name in watched(copied) if ".before-" in name]


IN_THE_WAY = (
    "export/thesis.txt",
    "onnx/model.onnx",
    "calibration/0001.png",
    "precision/int8-ort/graph.onnx",
    "ort/fp32/model.onnx",
    "ort/fp32",
    "validate/samples/pixels.npy",
    "validate/pytorch/logits.npy",
    "bench/ort/times.csv",
    "results.json",
    "report.md",
    "report.html",
    "run.log",
    ".lock",
    ".hashes.sqlite",
    ".imports.json",
    ".unreported.json",
)


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_of_a_run_is_refused(graph_project: Path, name: str) -> None:
    (graph_project / "pipeline.yaml").write_text(CONFIG.replace("[fp32]", "[fp32, int8]"))
    path = graph_project / "engines/trial" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"precious": 1}')
    before = watched(graph_project)
    run = CliRunner().invoke(main, ["run", "--quiet"])
    assert run.exit_code == 2, run.output
    assert run.stderr.startswith("error: engines/trial/")
    assert run.stderr.count("\n") == 1
    assert "move it away" in run.stderr
    assert watched(graph_project) == before
    dry = CliRunner().invoke(main, ["run", "--dry-run"])
    assert (dry.exit_code, dry.stderr) == (2, run.stderr)
    assert watched(graph_project) == before


def test_files_in_an_artifact_are_set_aside_with_it_and_this_is_said(copied: Path) -> None:
    built = copied / "engines/trial/ort/fp32"
    (built / "my-notes.txt").write_text("precious")
    before = watched(built)
    result = command(copied, "run", "--only", "build")
    assert result.exit_code == 0, result.stderr
    aside = next(path for path in built.parent.glob("fp32.before-*"))
    assert f"what was there was set aside as {aside.name}" in result.stderr
    assert watched(aside) == before
    Artifact.read(built).verify()
    # What was set aside is no result any more.
    assert command(copied, "check", "trial").exit_code in (0, 1)
    assert "before" not in command(copied, "check", "trial").stdout
    assert "before" not in command(copied, "export", "triton", "trial", "--precision", "x").stderr


def test_calibrate_refuses_a_foreign_folder(copied: Path) -> None:
    mine = copied / "engines/trial/ranges/min-max-int8/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    before = watched(copied)
    result = command(copied, "calibrate", "--method", "min-max")
    assert result.exit_code == 2, result.stdout
    assert "ranges/min-max-int8 is in the way" in result.stderr
    changed = set(lost(before, watched(copied)))
    assert changed <= {f"engines/trial/{name}" for name in ("run.log", *KEPT_UP)}


def test_triton_does_not_take_the_results_for_a_model(ground: Path) -> None:
    before = watched(ground)
    result = command(ground, "export", "triton", "trial", "--repository", "engines")
    assert result.exit_code == 2
    assert "engines/trial is in the way" in result.stderr
    assert watched(ground) == before


def test_triton_leaves_other_versions_and_notes(copied: Path) -> None:
    arguments = ("export", "triton", "trial", "--repository", "models")
    before = watched(copied)
    assert command(copied, *arguments).exit_code == 0
    for name in ("2/model.onnx", "notes.txt", "1.old/model.onnx", ".making-of/film"):
        path = copied / "models/trial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("canary")
    with_canaries = watched(copied)
    result = command(copied, *arguments)
    assert (result.exit_code, result.stdout) == (0, "wrote models/trial\n")
    assert watched(copied) == with_canaries
    assert lost(before, watched(copied)) == []


def test_the_coreml_bench_package_needs_a_new_folder(ground: Path) -> None:
    before = watched(ground)
    result = command(ground, "export", "coreml-bench", "trial", "--folder", "src")
    assert result.exit_code == 2
    assert watched(ground) == before


# Every place in the product that removes, replaces or moves onto a path, or opens one for writing,
# and why nobody loses anything by it. A new place has to be looked at and named here.
MADE = "in a folder that is being made, which `artifact.make` moves into place"
PLACES = {
    "care/assets/make.py:write": "remakes the package's own data",
    "care/checkpoint.py:save": "into the file that _write_atomically opened",
    "care/checkpoint.py:_write_atomically": "its own temporary file, then the path asked for",
    "care/runs.py:RunFolder.prepare": "only a run's own files, in a folder that is a run",
    "care/runs.py:RunFolder.export": "refuses what is no exported checkpoint",
    "care/boards.py:TensorBoard.__init__": "TensorBoard's events, under a name that is new",
    "care/data/imagenet.py:_write": "an index in the user's cache, under its digest",
    "care/history.py:History.clear": "only checkpoints of a run, in a folder that is a run",
    "care/history.py:History.save": "only checkpoints of a run, in a folder that is a run",
    "care/history.py:write_sealed": "its own temporary file, then a checkpoint of a run",
    "care/imagenet.py:_write_bytes": "its own temporary file; an image that is there is compared",
    "care/imagenet.py:_write_shard": "its own temporary file; a shard that is there stays",
    "care/summary.py:write_summary": "a page in a run's folder",
    "care/runs.py:Logbook.epoch": "appends, in a run's folder",
    "care/runs.py:Logbook._write": "appends, in a run's folder",
    "care/runs.py:_write_text": "its own temporary file, then a file of the run's folder",
    "pipeline/exports/bundle.py:write_bundle": "a new file, in a workspace",
    "calibration/kept.py:Kept._append": "its own file, known by its first line",
    "calibration/kept.py:Kept.forget": "its own file, known by its first line",
    "calibration/parts.py:write_part": MADE,
    "pipeline/commands/clean.py:_remove": "what was asked for: whole artifacts and caches of ours",
    "pipeline/commands/compare.py:Files.tell": "refuses what is no comparison of ours",
    "pipeline/commands/environment.py:_make": "in a temporary folder",
    "pipeline/commands/environment.py:changed": "in a temporary folder",
    "pipeline/commands/rebuild.py:_copied": "in a temporary folder, and links to files that stay",
    "pipeline/commands/rebuild.py:_link": "in a temporary folder",
    "pipeline/commands/run.py:run": "refuses what is no JUnit of ours, before anything is made",
    "pipeline/commands/devices.py:_take_over.write": MADE,
    "pipeline/commands/reduce.py:reduce": "refuses a file that is there",
    "pipeline/commands/reduce.py:_Search._refusal": "in a temporary folder",
    "pipeline/commands/repair.py:repair": "refuses a file that is there; in a temporary folder",
    "pipeline/commands/sweep.py:run_all": "refuses what is no table of a sweep",
    "pipeline/exports/golden.py:write_data": "into an export that is being made",
    "pipeline/exports/golden.py:write_kit": "into an export that is being made",
    "pipeline/exports/triton.py:_take_away": "only what an earlier export wrote, as it wrote it",
    "pipeline/stages/golden.py:GoldenStep.build": MADE,
    "pipeline/scheduler/worker.py:main": "into a temporary folder of the worker's",
    "pipeline/scheduler/worker.py:work": "into a temporary folder of the worker's",
    "pipeline/stages/shards.py:forget": "a folder that is empty",
    "pipeline/stages/shards.py:ShardStep.build": MADE,
    "pipeline/stages/shards.py:remove": "shards of ours, and a folder that is empty then",
    "pipeline/store/parcels.py:receive_file": "in a workspace, in the place of a worker",
    "pipeline/store/objects.py:Objects._put": "aside, under a new name, or under its own hash",
    "pipeline/store/objects.py:Objects.fetch": "a file that is new",
    "pipeline/targets/ort/build.py:by_tanh": MADE,
    "pipeline/commands/init.py:write": "refuses a file that is there",
    "pipeline/core/files.py:write_atomically": "refuses what is not ours; in a workspace",
    "pipeline/steps/artifact.py:write_manifest": MADE,
    "pipeline/steps/artifact.py:_write_made": MADE,
    "pipeline/steps/artifact.py:Artifact.copy": "into an export that is being made",
    "pipeline/steps/artifact.py:rewrite_manifest": "in a workspace, onto a manifest of ours",
    "pipeline/steps/stated.py:Stated.announce": "refuses what holds no such seals",
    "pipeline/steps/stated.py:Stated.is_reported": "only what holds seals that were announced",
    "pipeline/targets/floats.py:Float32.convert": MADE,
    "pipeline/graphs/float16.py:write_graph": MADE,
    "pipeline/targets/ort/quantize.py:Int8Ort.convert": MADE,
    "pipeline/targets/ort/quantize.py:_Work._measure": "in a temporary folder",
    "pipeline/targets/ort/quantize.py:_write_float32": "in a temporary folder",
    "pipeline/steps/log.py:_appending": "appends to what was seen to be a log of ours",
    "pipeline/steps/log.py:_screen": "the error stream",
    "pipeline/core/replacing.py:workspace": "a folder that is new",
    "pipeline/core/replacing.py:put": "the one place where something of ours is replaced",
    "pipeline/core/replacing.py:set_aside": "renames to a name that is free",
    "pipeline/core/replacing.py:_clear": "a workspace of ours",
    "pipeline/core/hashes.py:HashCache.save": "refuses what is no such cache",
    "pipeline/stages/export.py:ExportStep._export_one": MADE,
    "pipeline/stages/simplify.py:SimplifyStep.build": MADE,
    "pipeline/stages/onnxsim_process.py:": MADE,
    "pipeline/report/answers.py:to_bytes": "into memory",
    "pipeline/report/history.py:keep": "a new entry, and the oldest of our own",
    "pipeline/stages/memory.py:memory_of": "in a temporary folder",
    "pipeline/stages/memory_worker.py:main": "in a temporary folder",
    "pipeline/stages/export.py:ExportStep._take": MADE,
    "care/teacher_cache.py:Store.__init__": "in a folder that is named after a key",
    "care/teacher_cache.py:_reserve": "in a folder that is named after a key",
    "pipeline/graphs/photo.py:difference_to_pillow": "in a temporary folder",
    "pipeline/stages/export.py:ExportStep._write_photo": MADE,
    "pipeline/stages/export.py:_say_quantized": MADE,
    "pipeline/stages/training.py:_prepared": "in a temporary folder",
    "pipeline/stages/training.py:_simplified": "in a temporary folder",
    "pipeline/targets/coreml/refusals.py:_saved": "in a new folder for temporary files",
    "pipeline/targets/coreml/repair.py:_Work._write": "in a temporary folder",
    "pipeline/targets/ort/build.py:write_photo": MADE,
    "pipeline/targets/ort/as_cpu.py:_ends_with_cpuid": "in a temporary folder",
    "pipeline/report/write.py:write": "refuses what is no report of ours",
    "pipeline/report/pages.py:write_pages": "after write refused what is no report of ours",
    "pipeline/stages/build.py:BuildStep._build_from_exported": MADE,
    "pipeline/stages/class_worker.py:work": "in a temporary folder",
    "pipeline/stages/cpu_class.py:ClassStep._run": "in a temporary folder",
    "pipeline/stages/ranges.py:RangesStep.build": MADE,
    "pipeline/stages/samples.py:write_samples": MADE,
    "pipeline/stages/validate.py:ReferenceStep.build": MADE,
    "pipeline/stages/validate.py:ValidateStep.build": MADE,
    "pipeline/exports/coreml_bench.py:_write": "in a workspace; its place has to be empty",
    "pipeline/targets/coreml/package.py:save": MADE,
    "pipeline/targets/coreml/package.py:edit": MADE,
    "pipeline/targets/coreml/package.py:_write_manifest": MADE,
    "pipeline/targets/coreml/package.py:_usual_modes": MADE,
    "pipeline/targets/coreml/package.py:as_arrays": "refuses a folder that is there",
    "pipeline/targets/coreml/results.py:Measurements.write": MADE,
    "pipeline/targets/coreml/search.py:WeightFile.replaced": "in a temporary folder",
    "pipeline/targets/coreai/package.py:_write_in_order": MADE,
    "pipeline/targets/ort/as_cpu.py:_compile": "a helper in the user's cache, under its digest",
    "pipeline/targets/ort/as_cpu.py:_copies": "copies in the user's cache, under their digest",
    "pipeline/targets/ort/as_cpu.py:_replace": "a copy that is being made",
    "pipeline/targets/ort/build.py:write_models": MADE,
    "pipeline/targets/ort/build.py:_save": MADE,
    "pipeline/targets/ort/build.py:_check_answers": MADE,
    "pipeline/targets/ort/layout.py:write_probe": MADE,
    "pipeline/targets/tensorrt/builder.py:build": MADE,
    "pipeline/targets/tensorrt/session.py:_keep": "a cache named by the engine's hash",
    "pipeline/steps/keys.py:Code._remember": "refuses what is no such memory",
    "pipeline/exports/triton.py:export": "in a workspace; refuses a folder that we did not write",
    "pipeline/exports/triton.py:_update": "between workspaces; sets aside what was changed",
}


def writes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Name of the enclosing function, and the call, of everything that touches a path."""

    def walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside = (*inside, node.name)
        if isinstance(node, ast.Call) and _touches(node):
            yield ".".join(inside), ast.unparse(node.func)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, ())


_ALWAYS = re.compile(
    r"(rmtree|unlink|rmdir|removedirs|rename|renames|move|write_text|write_bytes|copyfile|copytree"
    r"|copy2|copymode|extractall|symlink_to|hardlink_to|truncate|open_memmap|mkdtemp|mkstemp"
    r"|write_array_header_1_0|savez|savez_compressed|write_atomically|SummaryWriter)"
)
_SAVERS = ("onnx.save", "np.save", "ir.save", "torch.save", "model.save", "image.save")


def _touches(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    if _ALWAYS.fullmatch(name) or function in _SAVERS or function == "os.remove":
        return True
    if name == "replace" and isinstance(call.func, ast.Attribute):
        return len(call.args) == 1 and not call.keywords  # Path's; text's takes two
    if name in ("open", "memmap", "fdopen"):
        modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
        return any(
            isinstance(m, str) and re.fullmatch(r"[rwabx+t]*[wax+][rwabx+t]*", m) for m in modes
        )
    return False


def found_places() -> set[str]:
    found = set()
    for package in ("care", "pipeline", "calibration"):
        for path in (ROOT / package).rglob("*.py"):
            for function, _ in writes(ast.parse(path.read_text())):
                found.add(f"{path.relative_to(ROOT).as_posix()}:{function}")
    return found


def test_every_place_that_writes_or_removes_is_known() -> None:
    assert found_places() == set(PLACES)


@pytest.mark.parametrize(
    ("code", "touches"),
    [
        ("shutil.rmtree(x)", True),
        ("path.replace(other)", True),
        ("text.replace('a', 'b')", False),
        ("replace(value, size=1)", False),
        ("path.open('rb')", False),
        ("path.open('r+b')", True),
        ("open(path, 'w')", True),
        ("np.lib.format.open_memmap(path)", True),
        ("target.open(artifact)", False),
    ],
)
def test_such_places_are_recognized(code: str, touches: bool) -> None:
    assert bool(list(writes(ast.parse(code)))) == touches
