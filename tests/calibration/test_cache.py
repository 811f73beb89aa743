"""Tables of ranges, and the cache that keeps them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.cache import CacheKey, cached, read, write
from calibration.observe import Statistics
from calibration.ranges import ACTIVATIONS_INT8, ACTIVATIONS_UINT8, Method, Range
from calibration.table import Table, make_table
from pipeline.core.errors import ArtifactError, DataError

KEY = CacheKey("graph", "images", "preprocess", "entropy, int8, symmetric")


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


def test_the_cache_is_reused(tmp_path: Path, table: Table) -> None:
    path, calls = tmp_path / "cache" / "ranges.json", []

    def make() -> Table:
        calls.append(1)
        return table

    first, why = cached(path, KEY, make)
    again, note = cached(path, KEY, make)
    assert first == again == table
    assert len(calls) == 1
    assert "there are no ranges" in why
    assert "reused" in note
    assert [p.name for p in path.parent.iterdir()] == ["ranges.json"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graph": "x"}, "another graph"),
        ({"images": "x"}, "other calibration images"),
        ({"preprocess": "x"}, "another preprocessing"),
        ({"method": "mse"}, r"another method \(entropy, int8, symmetric, not mse\)"),
        ({"graph": "x", "images": "x"}, "another graph and other calibration images"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_replaced(
    tmp_path: Path, table: Table, change: dict[str, str], reason: str
) -> None:
    path = tmp_path / "ranges.json"
    write(path, KEY, table)
    other = replace(KEY, **change)
    with pytest.raises(ArtifactError, match=reason):
        read(path, other)
    _, note = cached(path, other, lambda: table)
    assert "was made from" in note
    assert read(path, other) == table


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "damaged"),
        ('{"kind": "calibration ranges", "format": 99}', "format 99"),
        ('{"kind": "calibration ranges", "format": 1}', "damaged"),
    ],
)
def test_damaged_files_are_made_anew(
    tmp_path: Path, content: str, reason: str, table: Table
) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=reason):
        read(path, KEY)
    assert cached(path, KEY, lambda: table)[0] == table


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]", "something other"),
        ('{"kind": "TRT-8501-EntropyCalibration2"}', "something other"),
        ("TRT-8501-EntropyCalibration2\nimage: 3c01\n", "damaged"),
    ],
)
def test_files_of_other_programs_stay(
    tmp_path: Path, content: str, reason: str, table: Table
) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=reason):
        read(path, KEY)
    with pytest.raises(ArtifactError, match=r"ranges\.json is in the way"):
        cached(path, KEY, lambda: table)
    with pytest.raises(ArtifactError, match=r"ranges\.json is in the way"):
        write(path, KEY, table)
    assert path.read_text() == content


def test_a_cache_with_nan_is_damaged(tmp_path: Path, table: Table) -> None:
    path = tmp_path / "ranges.json"
    write(path, KEY, table)
    path.write_text(path.read_text().replace("-1.0", "NaN"))
    with pytest.raises(ArtifactError, match="not finite"):
        read(path, KEY)


def test_a_failure_leaves_the_old_cache(tmp_path: Path, table: Table) -> None:
    path = tmp_path / "ranges.json"
    write(path, KEY, table)

    def fail() -> Table:
        raise DataError("no")

    with pytest.raises(DataError):
        cached(path, replace(KEY, graph="x"), fail)
    assert read(path, KEY) == table


def test_the_key_depends_on_everything(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"1")

    def key(
        hashes: tuple[str, ...] = ("a", "b"),
        mean: float = 0.5,
        method: Method = Method.PERCENTILE,
        percentile: float = 99.9,
        tensors: list[str] | None = None,
    ) -> CacheKey:
        return CacheKey.of(
            model, hashes, {"mean": mean}, method, ACTIVATIONS_INT8, percentile, tensors
        )

    keys = {
        key(),
        key(hashes=("b", "a")),
        key(mean=0.4),
        key(method=Method.MSE),
        key(percentile=99),
        key(tensors=["x"]),
        key(tensors=["y"]),
    }
    assert len(keys) == 7
    assert key(tensors=["x", "y"]) == key(tensors=["y", "x"])
    assert key(method=Method.MSE, percentile=1) == key(method=Method.MSE, percentile=2)
    before = key()
    model.write_bytes(b"2")
    assert key().graph != before.graph
