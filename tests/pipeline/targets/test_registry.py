from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pipeline.core.errors import InputError
from pipeline.targets.base import Target
from pipeline.targets.registry import TARGETS, able, form_named, form_of, needs_calibration


def test_names_are_known_without_loading_a_target() -> None:
    program = (
        "import sys; from pipeline.targets.registry import TARGETS; names = list(TARGETS)\n"
        "print(names, [m for m in sys.modules if m.startswith('pipeline.targets.') "
        "and m != 'pipeline.targets.registry'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "['trt', 'ort', 'coreml', 'coreai'] []\n"


BUILDERS = (
    "calibration.sensitivity",
    "difflib",
    "pipeline.report.junit",
    "pipeline.scheduler.audit",
    "pipeline.scheduler.estimate",
    "pipeline.scheduler.places",
    "pipeline.scheduler.processes",
    "pipeline.scheduler.side_by_side",
    "pipeline.store.shared",
    "pipeline.targets.apple",
    "pipeline.targets.coreml.convert",
    "pipeline.targets.coreml.network",
    "pipeline.targets.coreml.verify",
    "pipeline.targets.ort.build",
    "pipeline.targets.ort.certificate",
    "pipeline.targets.ort.tune",
)
"""What builds, measures or is seldom asked for: each takes some milliseconds to load."""


def test_what_plans_and_looks_loads_nothing_that_builds() -> None:
    """An up-to-date run does no more than that, and two thirds of its time is loading."""
    program = (
        "import sys, pipeline.commands.run\n"
        "from pipeline.targets.registry import TARGETS\n"
        "[TARGETS[name] for name in ('trt', 'ort', 'coreml')]\n"
        f"print([name for name in {BUILDERS} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


def test_targets_are_loaded_once() -> None:
    assert TARGETS["ort"] is TARGETS["ort"]
    assert [target.name for target in TARGETS.values()] == list(TARGETS)


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_precision_has_a_form_or_is_built_from_the_module(name: str) -> None:
    target: Target = TARGETS[name]
    for precision, form in target.precisions.items():
        found = form_of(target, precision)
        assert (found.name if found else "module") == form


@pytest.mark.parametrize(
    ("target", "precision", "bfloat16", "form"),
    [
        ("trt", "fp16", True, "float16-repaired"),
        ("trt", "fp16", False, "float16-repaired-float32"),
        ("trt", "bf16", True, "bfloat16-repaired"),
        ("trt", "int8", True, "int8-trt-repaired"),
        ("trt", "int8", False, "int8-trt-repaired-float32"),
        ("trt", "fp8", True, "fp8-trt-repaired"),
        ("ort", "int8", True, "int8-ort-repaired"),
    ],
)
def test_repaired_forms_are_there(target: str, precision: str, bfloat16: bool, form: str) -> None:
    told = TARGETS[target].repaired(precision, bfloat16=bfloat16)
    assert told == form
    assert form_named(TARGETS[target], told).name == form


@pytest.mark.parametrize(
    ("target", "precision", "bfloat16", "told"),
    [
        ("trt", "bf16", False, "--no-bfloat16 is for fp16 and int8, not for bf16"),
        ("trt", "fp8", False, "--no-bfloat16 is for fp16 and int8, not for fp8"),
        ("trt", "fp32", True, "TensorRT repairs fp16, int8, bf16, fp8, not fp32"),
        ("ort", "int8", False, "give --precision int8, without --no-bfloat16"),
        ("ort", "fp32", True, "compute in float32 and int8; give --precision int8"),
        ("coreml", "fp16", True, "Core ML has no repaired form of an ONNX graph"),
    ],
)
def test_what_no_target_repairs_is_refused(
    target: str, precision: str, bfloat16: bool, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        TARGETS[target].repaired(precision, bfloat16=bfloat16)


@pytest.mark.parametrize("name", able("proposed"))
def test_what_is_proposed_can_be_asked_for_with_and_without_images(name: str) -> None:
    target = TARGETS[name]
    plain = [p for p in target.proposed if not needs_calibration(target, p, None)]
    assert set(target.proposed) <= set(target.precisions)
    assert plain


def test_who_offers_what_others_leave_out() -> None:
    assert able("diff") == ["trt", "ort", "coreml"]
    assert able("refusal") == ["trt"]
    assert able("repaired") == ["trt", "ort"]
    assert able("proposed") == ["trt", "ort", "coreml"]
    assert able("read_measurements") == ["coreml", "coreai"]
    assert able("profile") == ["ort"]


@pytest.mark.parametrize(
    ("name", "facts", "counts"),
    [
        ("coreml", {"operations": {"conv": 2, "add": 1}}, {"conv": 2, "add": 1}),
        ("coreai", {"operations": {"conv": 2}}, {"conv": 2}),
        (
            "ort",
            {"nodes": {"A": {"float": 6, "uint8": 1}, "B": {"float": 2}}},
            {"float": 8, "uint8": 1},
        ),
        ("trt", {"layers": {"layers": 13, "by_kind": {"CAST": 2}}}, {"CAST": 2}),
        ("coreml", {"operations": {"conv": "two", "add": True}}, {}),
        ("ort", {"nodes": ["A"]}, {}),
        ("ort", {"nodes": {"A": None}}, {}),
        ("trt", {"layers": 13}, {}),
        ("trt", {}, {}),
    ],
)
def test_operations_are_counted_by_kind_as_far_as_they_were_written_down(
    name: str, facts: dict[str, Any], counts: dict[str, int]
) -> None:
    assert TARGETS[name].operations(facts) == counts


def test_an_unknown_name_is_a_key_error() -> None:
    assert "toy" not in TARGETS
    with pytest.raises(KeyError):
        TARGETS["toy"]


@pytest.mark.parametrize(
    ("name", "file", "kit"),
    [
        ("ort", "model.onnx", True),
        ("trt", "model.engine", False),
        ("coreml", "model.mlpackage", False),
        ("coreai", "model.aimodel", False),
    ],
)
def test_how_to_run_an_artifact_alone(name: str, file: str, kit: bool) -> None:
    told = TARGETS[name].usage(f"{name}/fp16", (3, 8, 8), "golden/kit")
    assert f"{name}/fp16/{file}" in told
    assert ("golden/kit/check.py" in told) is kit
    assert "check.py" not in TARGETS[name].usage(f"{name}/fp16", (3, 8, 8), "")
    assert len(told.splitlines()) <= 3
    assert max(map(len, told.splitlines())) <= 100


def test_bfloat16_of_onnx_runtime_alone_is_float32() -> None:
    told = TARGETS["ort"].usage("ort/bf16", (3, 8, 8), "")
    assert told.splitlines()[0].endswith("   # in float32, without OpenVINO")
    assert "OpenVINO" not in TARGETS["ort"].usage("ort/fp32", (3, 8, 8), "")
