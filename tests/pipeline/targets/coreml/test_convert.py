from __future__ import annotations

import re
from typing import Any

import coremltools as ct
import pytest
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

from pipeline.targets.coreml.convert import seldom_checked
from pipeline.targets.coreml.quiet import logged


def program() -> Any:
    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 3))])  # type: ignore[untyped-decorator]
    def made(x: Any) -> Any:
        doubled = Builder.add(x=x, y=x, name="doubled")
        return Builder.exp(x=Builder.relu(x=doubled, name="positive"), name="result")

    return made


def simplified() -> str:
    made = program()
    with logged(lambda line: None):
        PassPipelineManager.apply_pipeline(made, ct.PassPipeline.DEFAULT)
    return re.sub(r"(block|cast_)\d+", r"\1", str(made))  # counted over all programs


def test_passes_do_what_they_do() -> None:
    plain = simplified()
    with seldom_checked():
        assert simplified() == plain


def test_thorough_checks_stay_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = Program.validate, []

    def recorded(made: Any, check_essential_scope: bool = False) -> None:
        asked.append(check_essential_scope)
        whole(made, check_essential_scope=check_essential_scope)

    monkeypatch.setattr(Program, "validate", recorded)
    with seldom_checked():
        simplified()
    assert set(asked) == {True}


def test_a_program_that_a_pass_broke_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Any, made: Any) -> None:
        operations = made.functions["main"].operations
        for broken in [each for each in operations if each.name == "doubled"]:
            operations.remove(broken)

    monkeypatch.setattr(type(PASS_REGISTRY["common::const_elimination"]), "apply", breaks)
    with seldom_checked(), pytest.raises(AssertionError, match="doubled"):
        simplified()


def test_all_checks_are_back_after_a_failure() -> None:
    whole = Program.validate
    with pytest.raises(RuntimeError), seldom_checked():
        raise RuntimeError
    assert Program.validate is whole
