"""What travels between a run and its workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.core.errors import ArtifactError, BuildError, UnforeseenError
from pipeline.scheduler.orders import Answer, Order, config_for_workers, differences
from pipeline.store.parcels import Parcel

PARCEL = Parcel("0" * 64, 3)
ORDER = Order(
    step="ort/fp32",
    config={"name": "mine"},
    store="s3://bucket/care",
    timeout_s=60.0,
    files={"module/nets/own.py": PARCEL},
    artifacts={"export": PARCEL},
    missing=(),
    anew=False,
    parts={"tools": {"torch": "2.15"}},
)


def test_orders_and_answers_are_read_back() -> None:
    assert Order.from_json(ORDER.to_json()) == ORDER
    answer = Answer("box", PARCEL, ("a note",), ("a line",))
    assert Answer.from_json(answer.to_json()) == answer
    assert answer.failure() is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "a//b", "a\\b"])
def test_an_order_writes_nowhere_else(name: str) -> None:
    changes: list[dict[str, Any]] = [{"files": {name: PARCEL}}, {"artifacts": {name: PARCEL}}]
    for changed in [*changes, {"step": name}]:
        order = dataclasses.replace(ORDER, **changed)
        with pytest.raises(ArtifactError, match="outside of a worker's place"):
            Order.from_json(order.to_json())


def test_images_at_an_address_keep_it(tmp_path: Path) -> None:
    data = {"validation": "wds:s3://bucket/val-{000..049}.tar", "calibration": "folder:photos"}
    values: dict[str, Any] = {
        "name": "mine",
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "targets": {"ort": {"precisions": ["fp32"]}},
        "data": data,
    }
    found = config_for_workers(config.from_mapping(values).config)["data"]
    assert found["validation"] == data["validation"]
    assert found["calibration"] == f"folder:{Path('photos').absolute()}"


def test_failures_come_back_as_what_they_are() -> None:
    failed = Answer("box", error="the runtime refused", kind="BuildError").failure()
    assert type(failed) is BuildError
    assert str(failed) == "on worker box: the runtime refused"
    for kind in ("annotations", "Exception", "about", "nothing"):
        assert type(Answer("box", error="x", kind=kind).failure()) is UnforeseenError


def test_a_place_belongs_to_a_configuration_and_its_files() -> None:
    same = dataclasses.replace(ORDER, step="export", artifacts={})
    other = dataclasses.replace(ORDER, files={"module/nets/own.py": Parcel("1" * 64, 3)})
    assert same.place == ORDER.place != other.place


def test_a_configuration_travels_without_secrets_and_own_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "name": "mine",
        "output": "results",
        "model": {"name": "care_tiny", "checkpoint": "there/own.pth.tar"},
        "data": {"validation": "wds:val/{0..3}.tar", "labels": "words/labels.txt"},
        "targets": {"ort": {"precisions": ["fp32"]}},
        "store": {"address": "s3://user:topsecret@bucket/x"},
        "fleet": {"scheduler": "tls://box:8786"},
    }
    plain = config_for_workers(config.from_mapping(values).config)
    assert "topsecret" not in str(plain)
    assert (plain["output"], plain["model"]["checkpoint"]) == (
        "../results",
        "../checkpoint/own.pth.tar",
    )
    assert plain["data"]["labels"] == "../labels/labels.txt"
    assert plain["data"]["validation"] == f"wds:{tmp_path}/val/{{0..3}}.tar"
    values["model"]["checkpoint"], values["data"]["validation"] = "embedded", "fashion-mnist"
    plain = config_for_workers(config.from_mapping(values).config)
    assert plain["model"]["checkpoint"] == "embedded"
    assert plain["data"]["validation"] == "fashion-mnist"


def test_a_configuration_says_to_workers_what_it_said(
    graph_project: Path, graph_settings: dict[str, Any]
) -> None:
    """Its defaults, said aloud, would contradict what an ONNX graph brings."""
    plain = config_for_workers(config.from_mapping(graph_settings).config)
    assert plain["model"]["onnx"] == "../checkpoint/model.onnx"
    there = config.from_mapping(plain).config
    assert there.targets == config.from_mapping(graph_settings).config.targets
    assert "calibration" not in plain["data"]


@pytest.mark.parametrize(
    ("kind", "here", "there", "told"),
    [
        ("tools", {"torch": "2.15"}, {"torch": "2.14"}, "torch 2.14 (here 2.15)"),
        ("tools", {"torch": "2.15"}, {"torch": "2.15"}, ""),
        ("inputs", {"machine.cpu": "a"}, {"machine.cpu": "b"}, "machine.cpu"),
        ("inputs", {"settings bench.samples": 3}, {"settings bench.samples": 4}, "settings bench"),
        ("inputs", {"batches": (1, 2)}, {"batches": [1, 2]}, ""),
        ("made_from", {"export": "a"}, {"export": "b"}, "export"),
        ("code", {"pipeline/a.py": "a"}, {}, "pipeline/a.py"),
    ],
)
def test_differences_are_named(
    kind: str, here: dict[str, Any], there: dict[str, Any], told: str
) -> None:
    found = differences({kind: here}, {kind: there})
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_many_differences_are_counted() -> None:
    code = {f"{number}.py": "a" for number in range(9)}
    assert differences({"code": code}, {"code": {}}).endswith("5.py and 3 more")
