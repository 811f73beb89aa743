"""Session options, as ONNX Runtime gets them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.targets.ort import providers
from pipeline.targets.ort.session import (
    LONG_SPIN_US,
    SPIN_US,
    Settings,
    _spin_limit,
    errors,
    limits_spinning,
    options,
    runtime,
    start,
)


def test_what_is_asked_for_is_set() -> None:
    made = options(Settings(spinning=False, entries={"session.set_denormal_as_zero": "1"}), 1)
    assert made.intra_op_num_threads == 1
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert made.get_session_config_entry("session.set_denormal_as_zero") == "1"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.25.2", {"session.force_spinning_stop": "1"}),
        ("1.9.3", {"session.force_spinning_stop": "1"}),
        ("1.26.0", {"session.intra_op.spin_duration_us": str(SPIN_US)}),
        ("2.0.0.dev1", {"session.intra_op.spin_duration_us": str(SPIN_US)}),
    ],
)
def test_threads_do_not_wait_actively_for_long(version: str, expected: dict[str, str]) -> None:
    assert _spin_limit(version, SPIN_US) == expected
    assert limits_spinning(version) is ("session.intra_op.spin_duration_us" in expected)


def test_threads_may_wait_longer() -> None:
    made = options(Settings(spin_us=LONG_SPIN_US), 2)
    (name, value), *_ = _spin_limit(onnxruntime.__version__, LONG_SPIN_US).items()
    assert made.get_session_config_entry(name) == value
    assert LONG_SPIN_US == 1000


def test_what_is_not_asked_for_is_written_down_too(tmp_path: Path) -> None:
    made = options(Settings(), 3)
    assert made.intra_op_num_threads == 3
    assert made.inter_op_num_threads == 1
    assert made.log_severity_level == 4
    assert made.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    (name, value), *_ = _spin_limit(onnxruntime.__version__, SPIN_US).items()
    assert made.get_session_config_entry(name) == value
    assert SPIN_US == 50
    assert not made.enable_profiling
    profiling = options(Settings(), 1, tmp_path / "profile")
    assert profiling.enable_profiling
    assert profiling.profile_file_prefix == str(tmp_path / "profile")


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("none", "ORT_DISABLE_ALL"),
        ("basic", "ORT_ENABLE_BASIC"),
        ("extended", "ORT_ENABLE_EXTENDED"),
        ("layout", "ORT_ENABLE_LAYOUT"),
        ("all", "ORT_ENABLE_ALL"),
    ],
)
def test_levels_are_onnx_runtimes(level: str, name: str) -> None:
    expected = getattr(onnxruntime.GraphOptimizationLevel, name)
    assert options(Settings(level=level), 1).graph_optimization_level == expected


def test_an_entry_has_the_last_word() -> None:
    made = options(Settings(entries={"session.intra_op.allow_spinning": "0"}), 1)
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_settings_are_read_back() -> None:
    settings = Settings(2, "basic", False, "openvino", {"a": "b"})
    assert settings.to_dict() == {
        "threads": 2,
        "level": "basic",
        "spinning": False,
        "provider": "openvino",
        "entries": {"a": "b"},
        "spin_us": 50,
        "precision": "fp32",
        "huge_pages": True,
    }
    assert Settings.from_dict(settings.to_dict()) == settings
    assert Settings() == Settings(None, "all", True, "cpu", {}, SPIN_US)
    older: dict[str, Any] = {
        "threads": None,
        "level": "all",
        "spinning": True,
        "provider": "cpu",
        "entries": {},
    }
    assert Settings.from_dict(older) == Settings(spin_us=LONG_SPIN_US)


def test_a_model_is_opened(tmp_path: Path, small_graph: Callable[..., onnx.ModelProto]) -> None:
    onnx.save(small_graph(), tmp_path / "model.onnx")
    session = start(tmp_path / "model.onnx", Settings(), 1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1
    profiled = start(tmp_path / "model.onnx", Settings(), 1, tmp_path / "profile")
    assert Path(profiled.end_profiling()).name.startswith("profile")


def test_what_is_no_model_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    message = r"onnxruntime does not accept .*model\.onnx: [^\n]+$"
    for name in ("model.onnx", "gone/model.onnx"):
        with pytest.raises(ArtifactError, match=message):
            start(tmp_path / name, Settings(), 1)


def test_all_that_onnx_runtime_raises_is_known() -> None:
    assert {error.__name__ for error in errors()} == {
        *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile"),
        *("NotImplemented", "RuntimeException"),
    }
    assert all(issubclass(error, Exception) for error in errors())


def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "missing", lambda provider, *more: f"no {provider} here")
    with pytest.raises(UnavailableError, match="no cpu here"):
        start(tmp_path / "model.onnx", Settings(), 1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match="pip install onnxruntime"):
        runtime()


def test_a_plugins_device_needs_no_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_graph: Callable[..., onnx.ModelProto]
) -> None:
    onnx.save(small_graph(), tmp_path / "model.onnx")
    given: list[Any] = []

    def open_session(model: str, made: Any, providers: Any) -> None:
        given.append((model, made.intra_op_num_threads, providers))

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    for added in ([], ["some"]):
        monkeypatch.setattr(providers, "add", lambda *arguments, added=added: added)
        start(tmp_path / "model.onnx", Settings(), 2)
    model = str(tmp_path / "model.onnx")
    assert given == [(model, 2, None), (model, 2, ["some"])]


def test_its_chatter_is_kept_off_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", levels.append)
    assert runtime() is onnxruntime
    assert levels == [4]
