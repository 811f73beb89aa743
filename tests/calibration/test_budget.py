from __future__ import annotations

import math

import pytest

from calibration.budget import Budget
from pipeline.core.errors import InputError


def test_what_is_stated_counts_and_what_is_not_is_the_default() -> None:
    stated = {"headroom": 2.0, "max_top1_drop": 0.01, "method": "mse", "images": 8}
    assert Budget.of(stated, None) == Budget(2.0, None, 0.01, 0.5)
    assert Budget.of({"max_error": 0.1}, 5e-3).max_error == 0.1
    assert Budget.of({}, 0.05) == Budget()


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("headroom", 0.5, "headroom lies between 1 and 1e"),
        ("max_error", -1e-3, "max_error lies between 0 and"),
        ("max_top1_drop", 1.5, "max_top1_drop lies between 0 and 1, not at 1.5"),
        ("max_share", math.nan, "max_share lies between 0 and 1, not at nan"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(limit: str, value: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget.of({limit: value}, None)
