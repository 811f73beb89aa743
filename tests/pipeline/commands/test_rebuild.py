from __future__ import annotations

import json
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import pipeline
from pipeline.cli import main
from tests.pipeline.commands.test_environment import wheel

STAGES = ("export", "simplify", "precision", "build", "validate")


STAND_IN = """
__path__ = [{real!r}]
exec(compile(open({real!r} + '/__init__.py').read(), {real!r} + '/__init__.py', 'exec'))
_Real = InferenceSession
class InferenceSession(_Real):
    def run(self, *arguments, **options):
        return [each[..., ::-1].copy() for each in super().run(*arguments, **options)]
"""
"""ONNX Runtime as it is, but for the order of the classes."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    output = tmp_path_factory.mktemp("rebuild")
    settings: dict[str, Any] = {
        "name": "trial",
        "output": str(output),
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {"ort": {"precisions": ["fp32"], "tune": False}},
        "validation": {"images": 60},
    }
    (output / "trial.yaml").write_text(yaml.safe_dump(settings))
    begin(output / "trial")
    pipeline.run(output / "trial.yaml", only=STAGES)
    return output / "trial"


def compare(results: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", str(results), *map(str, arguments)])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_another_version_changes_is_told(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    real = str(Path(onnxruntime.__file__).parent)
    wheel(tmp_path / "index", "onnxruntime", "99.1", STAND_IN.format(real=real))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.chdir(tmp_path)
    before = content(results)
    told = tmp_path / "told.json"
    result = compare(results, "--with", "onnxruntime==99.1", "--json", told)
    assert result.exit_code == 1, result.output
    assert "ort/fp32 lost" in result.output
    assert "with onnxruntime==99.1, made anew: ort/fp32, validate/ort-fp32" in result.output
    plain = json.loads(told.read_text())
    assert plain["versions"]["onnxruntime"] == [onnxruntime.__version__, "99.1"]
    assert plain["new"] == f"{results}, with onnxruntime==99.1"
    assert content(results) == before


def test_the_same_environment_makes_nothing_anew(results: Path) -> None:
    result = compare(results, "--python", sys.executable)
    assert result.exit_code == 0, result.output
    assert "nothing is made by what is other" in result.output
    assert "the same" in result.output


def test_an_interpreter_without_this_project_is_refused(results: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    result = compare(results, "--python", tmp_path / "bare" / "bin" / "python")
    assert result.exit_code == 4
    assert "lacks this project" in result.output
    assert "install care-deploy there" in result.output
    result = compare(results, "--python", tmp_path / "none")
    assert result.exit_code == 4
    assert "is no program" in result.output


@pytest.mark.parametrize(
    "arguments",
    [[], ["--baseline", "x", "--with", "filelock==1"], ["--with", "filelock==1", "--python", "x"]],
)
def test_one_thing_to_compare_with_is_needed(results: Path, arguments: list[str]) -> None:
    result = compare(results, *arguments)
    assert result.exit_code == 2
    assert "give one of OLD, --baseline, --with and --python" in result.output


def test_results_of_another_configuration_are_refused(results: Path) -> None:
    path = results.with_suffix(".yaml")
    written = path.read_text()
    try:
        path.write_text(written.replace("images: 60", "images: 50"))
        result = compare(results, "--python", sys.executable)
        assert result.exit_code == 2
        assert "is not up to date (validate/samples" in result.output
        path.write_text(written.replace("name: trial", "name: there"))
        result = compare(results, "--python", sys.executable)
        assert "puts its results into" in result.output
        path.unlink()
        result = compare(results, "--python", sys.executable)
        assert result.exit_code == 2
        assert "which is not there" in result.output
    finally:
        path.write_text(written)
