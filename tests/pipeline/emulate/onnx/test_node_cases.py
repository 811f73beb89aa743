"""ONNX's own cases of every operator: each passes or is refused by name, and nothing else happens.

The cases are those of `onnx.backend.test`, with the tolerances of its runner. Expansions of
functions into simpler operators are among them.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.runner import Runner

from pipeline.core.errors import ArtifactError, PipelineError, UnsupportedOperatorError
from pipeline.emulate.onnx.executor import GraphExecutor
from pipeline.emulate.onnx.graph import to_dtype
from pipeline.emulate.onnx.operators import OPERATORS

JUDGES = (1, 23)
"""ONNX's first version whose cases are right: 1.19 expects queries to be grouped otherwise, NaN of
an L2 norm of zero and rotary angles that do not fit its inputs, and has no case of CumProd."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        tuple(map(int, onnx.__version__.split(".")[:2])) < JUDGES,
        reason=f"some cases of ONNX {onnx.__version__} expect what later ones corrected",
    ),
]

REFUSALS = {
    r"has the type (STRING|FLOAT4E2M1|FLOAT8E8M0|U?INT2),": "no target computes with these types",
    r"is no tensor \((sequence|optional)\)": "no exporter of networks writes them",
    r"BatchNormalization .* with training_mode=1": "an engine is no training program",
    r"Dropout in training mode": "its result is random",
    r"the model declares opset \d+,": "before opset 13 operators of the same name differ",
}
"""Messages with which cases of claimed operators are refused, and why."""

TWO_UNITS = {"test_attention_4d_causal_fp16_expanded"}
"""Cases of float16 whose expected values round inside of Softmax: right within two units.

The runner allows bfloat16 as much. The executor's Softmax rounds once.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        claimed: The executor knows all of its operators.
        kind: passed, refused, or what went wrong.
        message: What was said.
    """

    claimed: bool
    kind: str
    message: str
    operators: frozenset[str]


def array(value: Any) -> np.ndarray:
    """A case's value, which may be a protobuf."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)


def run(case: Any) -> None:
    """Run a case; raises what the executor raises, or AssertionError."""
    executor = GraphExecutor(case.model)
    given, expected = case.data_sets[0]
    with np.errstate(invalid="ignore"):  # numpy warns of NaN that is or becomes an 8-bit float
        feeds = {p.name: array(v) for p, v in zip(case.model.graph.input, given, strict=True)}
        values = executor.evaluate(feeds)
    results = []
    for port, wanted in zip(case.model.graph.output, map(array, expected), strict=True):
        declared = to_dtype(helper.np_dtype_to_tensor_dtype(wanted.dtype), port.name)
        assert executor.dtype(port.name) == declared, f"{port.name} is {executor.dtype(port.name)}"
        with np.errstate(invalid="ignore"):
            results.append(values[port.name].astype(wanted.dtype))
    tolerance = 2**-9 if case.name in TWO_UNITS else case.rtol
    compare([array(v) for v in expected], results, tolerance, case.atol)


def compare(
    expected: Sequence[np.ndarray], results: Sequence[np.ndarray], rtol: float, atol: float
) -> None:
    """Compare as ONNX's runner does."""
    Runner.assert_similar_outputs(expected, results, rtol, atol)


def outcome(case: Any) -> Outcome:
    nodes = case.model.graph.node
    own = {n.op_type for n in nodes if n.domain in ("", "ai.onnx")} - {"Constant"}
    foreign = any(n.domain not in ("", "ai.onnx") for n in nodes)
    claimed = not foreign and own <= set(OPERATORS)
    try:
        run(case)
        kind, message = "passed", ""
    except (UnsupportedOperatorError, ArtifactError) as error:
        kind, message = "refused", f"{type(error).__name__}: {error}"
    except AssertionError as error:
        kind, message = "wrong", str(error)
    except Exception as error:  # whatever else is raised is the finding
        kind, message = f"an internal {type(error).__name__}", str(error)
    return Outcome(claimed, kind, message, frozenset(own))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators of the cases overflow and divide by zero
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    return {case.name: outcome(case) for case in cases}


def listing(found: dict[str, Outcome]) -> str:
    return "\n".join(f"{name}: {o.kind}: {o.message[:300]}" for name, o in found.items())


def test_every_case_passes_or_is_refused(outcomes: dict[str, Outcome]) -> None:
    third = {n: o for n, o in outcomes.items() if o.kind not in ("passed", "refused")}
    assert not third, listing(third)
    counts = Counter(o.kind for o in outcomes.values())
    assert counts["passed"] > 2 * counts["refused"]  # 1,436 and 448 with onnx 1.23


def test_what_is_not_claimed_is_refused_by_name(outcomes: dict[str, Outcome]) -> None:
    others = {n: o for n, o in outcomes.items() if not o.claimed}
    assert others
    unnamed = {
        name: o
        for name, o in others.items()
        if not re.match(r"UnsupportedOperatorError: node '.*': operator \w+ of the ", o.message)
    }
    assert not unnamed, listing(unnamed)


def test_what_is_claimed_is_refused_for_reasons_on_the_list(outcomes: dict[str, Outcome]) -> None:
    refused = {n: o for n, o in outcomes.items() if o.claimed and o.kind == "refused"}
    used: set[str] = set()
    other = {}
    for name, o in refused.items():
        reasons = {pattern for pattern in REFUSALS if re.search(pattern, o.message)}
        used |= reasons
        if not reasons:
            other[name] = o
    assert not other, listing(other)
    assert used == set(REFUSALS)


def test_every_claimed_operator_passes_a_case(outcomes: dict[str, Outcome]) -> None:
    passed: set[str] = set()
    for o in outcomes.values():
        if o.kind == "passed":
            passed |= o.operators
    assert set(OPERATORS) - passed == {"GlobalLpPool"}  # of which there is none


def test_the_comparison_sees_wrong_values(outcomes: dict[str, Outcome]) -> None:
    one = np.ones(3, dtype=np.float32)
    with pytest.raises(AssertionError):
        compare([one], [one + 0.01], 1e-3, 1e-7)
    with pytest.raises(AssertionError):
        compare([one], [one[:, None]], 1e-3, 1e-7)
    assert issubclass(UnsupportedOperatorError, PipelineError)
