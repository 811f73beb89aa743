from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from care.data import open_dataset
from pipeline import config as configuration
from pipeline.core.errors import ConfigError, InputError, UnavailableError
from pipeline.steps import keys
from pipeline.steps.step import StageResult, State

ROOT = str(Path(__file__).parents[3])


def test_a_run_gives_rows_that_say_where_figures_come_from(results: pipeline.Results) -> None:
    rows = {row["artifact"]: row for row in results.table()}
    assert list(rows) == ["trt/fp16", "ort/fp32"]
    ort = rows["ort/fp32"]
    assert ort["top1_state"] == "measured"
    assert ort["top1"] >= 0.8
    assert ort["agreement"] == 1.0
    assert ort["use"] is True
    assert ort["latency_ms"] is None
    assert ort["latency_state"] == "not measured"
    assert ort["bytes"] > 1_000_000
    assert Path(ort["folder"]) == results.folder / "ort" / "fp32"
    assert rows["trt/fp16"]["top1_state"] == "emulated"
    assert results.exit_code == 0
    assert (results.folder / "report.html").is_file()


def test_results_are_read_back(results: pipeline.Results) -> None:
    assert pipeline.Results.read(results.folder).table() == results.table()


def test_what_is_up_to_date_does_not_run_and_observers_are_told(
    settings: dict[str, Any], results: pipeline.Results
) -> None:
    ended: list[StageResult] = []

    class Watch(pipeline.Observer):
        def finished(self, result: StageResult) -> None:
            ended.append(result)

    again = pipeline.run(settings, only=("export", "build"), targets=("ort",), observer=Watch())
    assert [(end.name, end.state) for end in ended] == [
        ("export", State.UP_TO_DATE),
        ("ort/fp32", State.UP_TO_DATE),
    ]
    assert again.run.not_selected


def test_a_run_reads_each_of_our_modules_once(
    settings: dict[str, Any], results: pipeline.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    own = keys.Code._read

    def noted(code: keys.Code, name: str) -> keys.Module:
        read.append(name)
        return own(code, name)

    monkeypatch.setattr(keys.Code, "_read", noted)
    assert pipeline.run(settings, only=("export", "build"), targets=("ort",)).exit_code == 0
    assert "pipeline.stages.export" in read
    assert len(read) == len(set(read))


def test_a_model_is_opened_by_its_name(results: pipeline.Results, photos: list[Path]) -> None:
    with results.model("ort/fp32") as model:
        assert model.predict(photos[0]).best.label == "Ankle boot"
    with pytest.raises(InputError, match="int8 was not built: there are trt/fp16, ort/fp32"):
        results.model("ort/int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "nmae: unknown key; did you mean name"),
        ({"model": {"name": "care_tiny"}}, "model.checkpoint"),
        ({"bench": {"samples": 0}}, "bench.samples"),
        ({"validation": {"images": {1, 2}}}, "validation.images"),
    ],
)
def test_a_mapping_is_checked_as_a_file_is(
    settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pipeline.run({**settings, **change})
    assert ":0" not in str(caught.value)


def test_a_mapping_is_not_filled_from_the_environment(settings: dict[str, Any]) -> None:
    stated = {**settings, "data": {**settings["data"], "labels": "${HOME}/no"}}
    assert configuration.from_mapping(stated).config.data.labels == "${HOME}/no"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"only": ("biuld",)}, "did you mean build"), ({"targets": ("rot",)}, "did you mean ort")],
)
def test_stages_and_targets_are_known(
    settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.run(settings, **options)


def test_a_foreign_folder_is_refused_and_stays(settings: dict[str, Any], tmp_path: Path) -> None:
    foreign = tmp_path / "trial" / "export" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("chapter 1")
    with pytest.raises(pipeline.PipelineError, match="export"):
        pipeline.run({**settings, "output": tmp_path})
    assert foreign.read_text() == "chapter 1"
    assert [path.name for path in foreign.parents[1].iterdir()] == ["export"]


def test_importing_the_package_loads_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import pipeline; dir(pipeline);"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "['pipeline']"


def _where_it_is_loaded(folder: Path, code: str, **environment: str) -> str:
    """What code prints that has this folder for its home and for temporary files."""
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        # Little is inherited: ONNX Runtime keeps quiet by itself where a variable says CI.
        env={"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": ROOT, **environment},
    )
    return told.stdout.strip()


def test_onnxruntime_tells_nobody_of_models_and_leaves_nothing(tmp_path: Path) -> None:
    code = "import os, pipeline, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert _where_it_is_loaded(tmp_path, code) == "1"
    assert list(tmp_path.rglob("*")) == []


def test_who_has_said_whether_onnxruntime_may_tell_is_obeyed(tmp_path: Path) -> None:
    code = "import os, pipeline; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert _where_it_is_loaded(tmp_path, code, ORT_DISABLE_TELEMETRY="0") == "0"


def test_unknown_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        pipeline.lode  # noqa: B018


def test_every_public_name_is_documented() -> None:
    text = (Path(ROOT, "docs", "python.md")).read_text()
    missing = [name for name in pipeline.__all__ if f"`{name}" not in text]
    assert missing == []
    assert all(getattr(pipeline, name).__doc__ for name in pipeline.__all__)


def test_the_examples_of_the_documentation_give_what_they_say(
    begin: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of docs/python.md as one session, in a folder such as a reader's.

    By the name of what `begin` puts there: another one would export the network anew.
    """
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "engines" / "trial")
    Path("pipeline.yaml").write_text(
        "name: trial\n"
        "model: {name: care_tiny, checkpoint: embedded}\n"
        "data: {validation: fashion-mnist}\n"
        "targets: {ort: {precisions: [fp32]}}\n"
        "validation: {images: 40}\n"
        "bench: {samples: 3, warmup: 1, max_seconds: 2}\n"
    )
    open_dataset("fashion-mnist", "validation").image(0).save("photo.jpg", quality=95)
    text = Path(ROOT, "docs", "python.md").read_text().replace("engines/care_tiny", "engines/trial")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python") > 2
    assert all(block.startswith(">>> ") for block in blocks)
    session = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "python.md", None, 0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(session, out=said.append)
    assert said == []


def test_rows_are_plain_and_alike_as_pandas_takes_them(results: pipeline.Results) -> None:
    first, *others = results.table()
    assert others
    assert all(list(row) == list(first) for row in others)
    values = [value for row in (first, *others) for value in row.values()]
    assert {type(value) for value in values} <= {str, int, float, bool, type(None)}


@pytest.mark.parametrize(
    ("store", "error", "why"),
    [
        (None, ConfigError, "a scheduler needs a store"),
        ({"address": "STORE", "push": True}, UnavailableError, "scheduler"),
    ],
)
def test_a_fleet_of_the_configuration_is_asked(
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    store: dict[str, Any] | None,
    error: type[Exception],
    why: str,
) -> None:
    monkeypatch.setattr("pipeline.scheduler.fleet.CONNECT_S", 0.3)
    fleet = {"scheduler": "tcp://127.0.0.1:1", "wait_s": 1.0}
    if store:
        store = {**store, "address": str(tmp_path / "store")}
    output = tmp_path / "out"
    with pytest.raises(error, match=why):
        pipeline.run({**settings, "output": output, "store": store, "fleet": fleet})
    assert not list(output.glob("*/*/artifact.json")), "nothing ran here without a word"


def test_steps_run_in_processes_of_their_own(
    graph_project: Path, graph_settings: dict[str, Any]
) -> None:
    results = pipeline.run(graph_settings, only=("export",), jobs=2)
    assert results.exit_code == 0
    with pytest.raises(InputError, match="jobs"):
        pipeline.run(graph_settings, jobs=0)
