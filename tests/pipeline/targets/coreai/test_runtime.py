"""Apple's runtime: what of it runs here, and the signatures of what runs on a Mac alone."""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.targets.coreai import quiet, runtime
from pipeline.targets.coreai.options import CoreAIOptions
from pipeline.targets.coreai.runtime import UNITS, Runtime, options

from .conftest import needs_coreai

pytestmark = needs_coreai


def stub_of(name: str) -> dict[str, set[str]]:
    """Classes of the runtime's type stub, which the wheel has for all systems, and their names."""
    import coreai.runtime as installed

    stub = Path(str(installed.__file__)).with_suffix(".pyi")
    classes = [n for n in ast.parse(stub.read_text()).body if isinstance(n, ast.ClassDef)]
    return {
        part.name: {f.name for f in part.body if isinstance(f, ast.FunctionDef)}
        for part in classes
        if part.name == name
    }


def test_the_options_offer_what_the_runtime_takes() -> None:
    from typing import get_args

    field = CoreAIOptions.model_fields["compute_unit"]
    assert get_args(field.annotation) == UNITS


def test_compute_units_have_the_names_that_are_used() -> None:
    kinds = stub_of("ComputeUnitKind")["ComputeUnitKind"]
    assert {"gpu", "neural_engine"} <= kinds


def test_a_preference_is_given_as_the_package_takes_it() -> None:
    from coreai.authoring import AIModelAsset
    from coreai.runtime import SpecializationOptions

    made = SpecializationOptions.from_preferred_compute_unit_kind
    assert list(inspect.signature(made).parameters) == ["compute_unit_kind"]
    assert not inspect.signature(SpecializationOptions.cpu_only).parameters
    parameters = inspect.signature(AIModelAsset.executable).parameters
    assert list(parameters) == ["self", "specialization_options"]


def test_linux_has_the_default_alone() -> None:
    assert options("default") is None
    with pytest.raises(RuntimeError, match="only available on macOS"):
        options("cpu_only")


class Kind:
    @staticmethod
    def neural_engine() -> str:
        return "the Neural Engine"


def test_a_preference_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    import coreai.runtime as installed

    asked: list[Any] = []

    class Options:
        @staticmethod
        def from_preferred_compute_unit_kind(compute_unit_kind: str) -> str:
            asked.append(compute_unit_kind)
            return "options"

    monkeypatch.setattr(installed, "ComputeUnitKind", Kind, raising=False)
    monkeypatch.setattr(installed, "SpecializationOptions", Options)
    assert options("neural_engine") == "options"
    assert asked == ["the Neural Engine"]


def test_what_is_no_asset_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Core AI does not load"):
        Runtime(tmp_path / "none.aimodel")
    assert runtime.UNITS[0] == "default"


def test_lines_of_any_stream_go_to_the_log() -> None:
    lines: list[str] = []
    with quiet.logged(lines.append):
        print("by Python")
        os.write(2, b"by the runtime\n")
    assert lines == ["by the runtime", "by Python"]
