"""Random graphs: some of them, and that a wrong value among them would be seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import random_graphs
import torch
from click.testing import CliRunner
from random_graphs import KINDS, Tally, wrong_values
from torch import Tensor

from pipeline.emulate.onnx.operators import OPERATORS

GRAPHS = 51


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def half(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float16)


def test_random_graphs_agree_with_onnx_runtime() -> None:
    torch.set_num_threads(1)
    tally = Tally()
    for number in range(GRAPHS):
        random_graphs.compare(number, 1, tally)
    assert not tally.wrong
    assert tally.graphs == GRAPHS
    assert tally.tensors > 10 * GRAPHS
    assert len(tally.operators) > 60


def reductions_of(x: np.ndarray) -> set[str]:
    drawn = random_graphs.Drawn("float16", np.random.default_rng(0))
    return {draft[0] for _ in range(200) if (draft := random_graphs._reduce(drawn, x))}


def test_no_product_is_drawn_whose_value_depends_on_the_order() -> None:
    # Graph 256 of seed 14: 432 values whose product is -8e41, of which the runtime made NaN.
    beyond, within = np.tile(half(9, 0.01), 80), np.tile(half(9, 0.01), 8)
    assert np.isclose(np.log2(beyond.astype(float)).sum(), -277.4, atol=0.5)
    assert "ReduceProd" not in reductions_of(beyond)
    assert "ReduceProd" in reductions_of(within)
    assert "ReduceProd" in reductions_of(half(0, np.inf, np.nan))
    assert reductions_of(beyond) | {"ReduceProd"} == reductions_of(within)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_draws_the_same_graph_each_time(kind: str) -> None:
    first, second = (
        [node.SerializeToString() for _, node in random_graphs.draw(kind, np.random.default_rng(5))]
        for _ in range(2)
    )
    assert len(first) > 2
    assert first == second


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda call, *inputs: function(call, *inputs) * 1.01

    for name in ("Add", "MatMul", "Conv", "Sigmoid"):
        entry = OPERATORS[name]
        function = worse(entry.function)  # type: ignore[arg-type]
        monkeypatch.setitem(OPERATORS, name, replace(entry, function=function))
    result = CliRunner().invoke(random_graphs.main, ["--graphs", "30"])
    assert result.exit_code == 1
    assert "wrong of" in result.output
    assert not result.output.strip().endswith(" 0 with wrong values")


def test_a_refusal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Identity", "Relu", "Conv", "Add", "MatMul", "Cast", "Transpose"):
        monkeypatch.delitem(OPERATORS, name)
    result = CliRunner().invoke(random_graphs.main, ["--graphs", "12"])
    assert result.exit_code == 1
    assert "refused: node" in result.output


def test_the_last_line_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(random_graphs.main, ["--graphs", "2", "--first", "7"])
    assert result.exit_code == 0
    assert result.output.startswith("2 graphs, ")
    assert result.output.endswith(": 0 with wrong values\n")


def test_half_precision_may_differ_by_one_unit() -> None:
    unit = 2**-10
    assert wrong_values(half(1, 1 + unit), half(1, 1), 1) == 0
    assert wrong_values(half(1, 1 + 2 * unit), half(1, 1), 1) == 1


def test_other_values_may_differ_by_less() -> None:
    one = np.ones(2, dtype=np.float32)
    assert wrong_values(one + np.float32(1e-5), one, 1) == 0
    assert wrong_values(one + np.float32(1e-4), one, 1) == 2
    # What large operands leave of each other is as uncertain as they are.
    assert wrong_values(one + np.float32(1e-4), one, 1000) == 0
    assert wrong_values(np.array([3, 4]), np.array([3, 5]), 1) == 1
    assert wrong_values(one[:1], one, 1) == 2


def test_infinities_and_nan_must_be_the_same() -> None:
    special = np.array([np.inf, -np.inf, np.nan, 1], dtype=np.float32)
    assert wrong_values(special, special, 1) == 0
    assert wrong_values(special[::-1], special, 1) == 4


def test_make_soak_draws_a_thousand() -> None:
    lines = (Path(random_graphs.__file__).parents[1] / "Makefile").read_text().splitlines()
    soak = itertools.takewhile(bool, lines[lines.index("soak: $(INSTALLED)") + 1 :])
    assert "\t$(BIN)/python scripts/random_graphs.py --graphs 1000" in soak
