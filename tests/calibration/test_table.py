"""Tables of ranges."""

import json

import numpy as np
import pytest

from calibration.observe import Statistics
from calibration.ranges import ACTIVATIONS_INT8, ACTIVATIONS_UINT8, Method, Range
from calibration.table import Table, make_table
from pipeline.core.errors import DataError


def statistics(**values: list[float]) -> dict[str, Statistics]:
    result = {}
    for name, numbers in values.items():
        result[name] = Statistics(name)
        result[name].add(np.array([numbers], dtype=np.float32))
    return result


@pytest.fixture
def table() -> Table:
    seen = statistics(a=[-1, 0, 3], b=[2, 2])
    return make_table(seen, Method.MIN_MAX, ACTIVATIONS_UINT8, images=5)


def test_make_table(table: Table) -> None:
    assert table.ranges == {"a": Range(-1, 3), "b": Range(2, 2)}
    assert table.warnings == ("tensor b is 2 on all calibration images: its range says nothing",)
    assert table.tensors["a"].clipped == 0
    assert sum(table.tensors["a"].histogram) == 5  # three values and the extremes once more


def test_make_table_refuses_nan_but_in_exempt_tensors() -> None:
    seen = statistics(a=[0, 1], b=[np.nan, 1])
    with pytest.raises(DataError, match="tensor b has 1 NaN"):
        make_table(seen, Method.MSE, ACTIVATIONS_INT8, images=1)
    table = make_table(seen, Method.MSE, ACTIVATIONS_INT8, images=1, exempt={"b"})
    assert list(table.tensors) == ["a"]


def test_tables_survive_json(table: Table) -> None:
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_tables_with_values_that_are_not_finite_are_refused(table: Table) -> None:
    plain = json.loads(json.dumps(table.to_dict()).replace("-1.0", "NaN"))
    with pytest.raises(DataError, match="not finite"):
        Table.from_dict(plain)
