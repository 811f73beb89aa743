from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

import pipeline
from pipeline.cli import main
from pipeline.steps.artifact import Artifact

STAGES = ("export", "simplify", "precision", "build", "validate")


def settings(output: Path, **other: Any) -> dict[str, Any]:
    """A configuration. Its name is part of the network's: another one would export anew."""
    return {
        "name": "trial",
        "output": output,
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        # Tuning would choose between two files by time, and they differ in nodes.
        "targets": {"ort": {"precisions": ["fp32"], "tune": False}},
        "validation": {"images": 60},
        **other,
    }


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    """A run of the embedded weights, and one of a graph whose classifier mistakes two classes."""
    folder = tmp_path_factory.mktemp("compare")
    begin(folder / "good" / "trial")
    pipeline.run(settings(folder / "good"), only=STAGES)
    export = Artifact.read(folder / "good" / "trial" / "export")
    model = onnx.load(export.path("model.onnx"))
    mix(model)
    onnx.save(model, folder / "mixed.onnx")
    preprocess, graph = export.network().preprocess, {"onnx": str(folder / "mixed.onnx")}
    pipeline.run(settings(folder / "bad", model=graph, preprocess=preprocess), only=STAGES)
    return folder


def mix(model: onnx.ModelProto) -> None:
    """Let a graph's classifier say the first class where it said the second, and back."""
    order = onnx.helper.make_tensor("order", onnx.TensorProto.INT64, [10], [1, 0, *range(2, 10)])
    model.graph.initializer.append(order)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "unmixed"
    model.graph.node.append(
        onnx.helper.make_node("Gather", ["unmixed", "order"], ["logits"], axis=1)
    )


def compare(output: Path, new: str, baseline: str, *arguments: object) -> Result:
    folders = [str(output / name / "trial") for name in (new, baseline)]
    given = [folders[0], "--baseline", folders[1], *map(str, arguments)]
    return CliRunner().invoke(main, ["compare", *given])


def test_a_proven_regression_is_exit_code_1(output: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("markdown", "html", "junit", "json")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    result = compare(output, "bad", "good", *options)
    assert result.exit_code == 1, result.output
    assert "ort/fp32 lost" in result.output
    told = json.loads(files["json"].read_text())
    (pair,) = told["pairs"]
    assert pair["verdict"] == "worse"
    assert pair["p_value"] < 0.05
    before, after = (sum(counts.values()) for counts in pair["operations"])
    assert after == before + 1  # what mixes the classes
    assert f"operations of ort/fp32: {before} → {after} (" in " ".join(result.output.split())
    assert pair["top1"][0] - pair["top1"][1] == pytest.approx(pair["drop"])
    labels = {image["label"] for image in pair["changed"]}
    assert {"T-shirt/top", "Trouser"} <= labels
    assert files["html"].read_text().count("<img") == len(pair["changed"])
    assert "<failure" in files["junit"].read_text()
    again = compare(output, "bad", "good", *options)
    assert again.exit_code == 1


def test_the_other_way_round_it_is_better(output: Path) -> None:
    result = compare(output, "good", "bad")
    assert result.exit_code == 0
    assert "better" in result.output


def test_two_folders_are_how_it_was_and_how_it_is(output: Path) -> None:
    good, bad = (str(output / name / "trial") for name in ("good", "bad"))
    worse = CliRunner().invoke(main, ["compare", good, bad])
    assert worse.exit_code == 1
    assert worse.output == compare(output, "bad", "good").output
    for more in ([good], ["--baseline", good]):
        refused = CliRunner().invoke(main, ["compare", good, bad, *more])
        assert refused.exit_code == 2
        assert "give " in refused.output
    alone = CliRunner().invoke(main, ["compare", good])
    assert alone.exit_code == 2
    assert "give one of OLD, --baseline, --with and --python" in " ".join(alone.output.split())


def test_a_run_is_the_same_as_itself(output: Path) -> None:
    result = compare(output, "good", "good")
    assert result.exit_code == 0
    assert "the same" in result.output
    assert "no regression is proven" in result.output


def test_other_images_are_not_compared(output: Path) -> None:
    shutil.copytree(output / "good", output / "fewer")
    fewer = settings(output / "fewer", validation={"images": 40})
    pipeline.run(fewer, only=STAGES)
    result = compare(output, "fewer", "good")
    assert result.exit_code == 2
    assert "cannot be told" in result.output
    assert "judged other images" in " ".join(result.output.split())


def test_files_of_somebody_else_stay(output: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    result = compare(output, "good", "good", "--markdown", notes)
    assert result.exit_code == 2
    assert notes.read_text() == "mine"


def test_damaged_and_missing_results_are_refused(output: Path, tmp_path: Path) -> None:
    result = compare(output, "none", "good")
    assert result.exit_code == 2
    assert "results.json" in result.output
    shutil.copytree(output / "bad" / "trial", tmp_path / "bad")
    logits = tmp_path / "bad" / "validate" / "ort-fp32" / "logits.npy"
    data = bytearray(logits.read_bytes())
    data[-1] ^= 1
    logits.write_bytes(bytes(data))
    given = [str(tmp_path / "bad"), "--baseline", str(output / "good" / "trial")]
    result = CliRunner().invoke(main, ["compare", *given])
    assert result.exit_code == 0
    assert "has changed since it was written" in " ".join(result.output.split())
