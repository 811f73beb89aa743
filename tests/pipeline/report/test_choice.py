"""Which artifact of a target to use."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.choice import choose


def artifact(precision: str, **other: Any) -> dict[str, Any]:
    return {
        "target": "ort",
        "precision": precision,
        "failure": None,
        "why_not": "",
        "files": {"model.onnx": {}},
        **other,
    }


def bench(**medians: float) -> dict[str, Any]:
    samples = {
        name: [median * (1 + 0.01 * (i % 5)) for i in range(50)] for name, median in medians.items()
    }
    return {"batches": {"1": {"samples_ms": samples}, "8": {"samples_ms": {}}}}


BOTH = [artifact("fp32"), artifact("int8")]


def test_the_faster_one_is_chosen_and_says_by_how_much() -> None:
    found = choose(BOTH, bench(fp32=1.0, int8=0.7), [])
    assert found.precision == "int8"
    assert found.why["fp32"].startswith("int8 takes 0.70 (95 %: ")


def test_the_first_stays_where_another_is_slower_or_as_fast() -> None:
    slower = choose(BOTH, bench(fp32=1.0, int8=1.2), [])
    assert (slower.precision, "takes 1.20" in slower.why["int8"]) == ("fp32", True)
    assert choose(BOTH, bench(fp32=1.0, int8=1.0), []).precision == "fp32"


def test_nothing_measured_leaves_the_first_and_says_so() -> None:
    found = choose(BOTH, {}, [])
    assert found.precision == "fp32"
    assert "latency was not measured" in found.why["int8"]


@pytest.mark.parametrize(
    "spoiled",
    [
        artifact("int8", failure="no memory"),
        artifact("int8", files={}),
        artifact("int8", why_not="it loses 2.00 points of top-1 on the calibration images"),
    ],
)
def test_one_that_is_not_good_is_not_chosen_however_fast(spoiled: dict[str, Any]) -> None:
    found = choose([artifact("fp32"), spoiled], bench(fp32=1.0, int8=0.5), [])
    assert found.precision == "fp32"
    assert found.why["int8"]


def test_a_gate_that_does_not_hold_rules_out() -> None:
    gates = ["ort/fp32: top-1 drop is 0.2, max_top1_drop allows 0.005 (measured)"]
    found = choose(BOTH, bench(fp32=1.0, int8=1.2), gates)
    assert found.precision == "int8"
    assert found.why == {
        "fp32": "a gate does not hold: top-1 drop is 0.2, max_top1_drop allows 0.005 (measured)"
    }
    assert choose([artifact("fp32")], {}, gates).precision is None
