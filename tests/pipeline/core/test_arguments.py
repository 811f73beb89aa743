from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
from timm.models import build_model_with_cfg

from pipeline.core.arguments import first_reserved, first_unknown, why_reserved


def test_all_that_timm_takes_itself_is_reserved() -> None:
    taken = [
        *inspect.signature(timm.create_model).parameters,
        *inspect.signature(build_model_with_cfg).parameters,
    ]
    assert [name for name in taken if name != "kwargs" and not why_reserved(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
        "scriptable",
        "exportable",
        "no_jit",
    ],
)
def test_reserved_names_are_told_with_the_reason(name: str) -> None:
    problem = first_reserved(["drop_rate", name])
    assert problem is not None
    assert problem.startswith(f"{name} cannot be an argument of the network: ")
    assert first_unknown({name: None}) == problem


@pytest.mark.parametrize(
    "arguments",
    [
        {"init_value": 0.1, "drop_path_rate": 0, "num_classes": 10, "qkv_bias": True},
        {"depths": [1, 2, 3], "ratios": [[2, 2], [2, 3]], "head_dims": [None, 16]},
        {"img_size": 224, "patch_size": [8, 16], "global_pool": "avg", "act_layer": "gelu"},
        {},
    ],
)
def test_plain_arguments_of_constructors_may_be_stated(arguments: dict[str, Any]) -> None:
    assert first_unknown(arguments) is None
    assert first_reserved(arguments) is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"foo": 1}, "'foo' is not among"),
        ({"device": "cuda"}, "'device' is not among"),
        ({"num_classes": "10"}, "num_classes must be a whole number"),
        ({"num_classes": True}, "num_classes must be a whole number"),
        ({"num_classes": 10**12}, "num_classes must be a whole number"),
        ({"in_chans": 3.5}, "in_chans must be a whole number"),
        ({"drop_rate": "0.1"}, "drop_rate must be a number"),
        ({"drop_rate": float("nan")}, "drop_rate must be a number"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false"),
        ({"act_layer": "os.system"}, "act_layer must be a word"),
        ({"act_layer": ["gelu"]}, "act_layer must be a word"),
        ({"global_pool": "http://x"}, "global_pool must be a word"),
        ({"depths": "1"}, "depths must be a number, or a list"),
        ({"depths": [[[1]]]}, "depths must be a number, or a list"),
        ({"depths": [1] * 65}, "depths must be a number, or a list"),
        ({"depths": {"a": 1}}, "depths must be a number, or a list"),
    ],
)
def test_anything_else_is_refused(arguments: dict[str, Any], problem: str) -> None:
    found = first_unknown(arguments)
    assert found is not None
    assert found.startswith(problem)
