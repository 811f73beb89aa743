"""Comparisons by layer, as the targets offer them that build from an ONNX graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.graphs import float16
from pipeline.stages.export import trace
from pipeline.targets.layers import graph_rows
from tests.pipeline.emulate.faults import SIDE, fault


@pytest.fixture
def pictures() -> Pictures:
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    preprocess = Preprocess(
        size=SIDE, crop=1.0, interpolation="bilinear", mean=mean, std=std, channels="rgb"
    )
    return Pictures(pixels, preprocess)


@pytest.fixture
def reference(tmp_path: Path, pictures: Pictures) -> Path:
    path = tmp_path / "float32.onnx"
    onnx.save(trace(fault("lost bias", 0).right, pictures.images), path)
    return path


def test_rows_of_a_graph_with_a_fault(tmp_path: Path, pictures: Pictures, reference: Path) -> None:
    case, built = fault("lost bias", 0), tmp_path / "float16.onnx"
    wrong = trace(case.wrong, pictures.images)
    onnx.save(float16.to_half(wrong, float16.FLOAT16)[0], built)
    table = graph_rows(built, reference, case.right, pictures)
    assert [row["module"] for row in table if row["jump"]] == [case.module]


def test_a_reference_that_is_not_the_configured_network(
    pictures: Pictures, reference: Path
) -> None:
    other = fault("lost bias", 0).wrong
    with pytest.raises(ArtifactError, match=r"float32\.onnx is not the graph of the configured"):
        graph_rows(reference, reference, other, pictures)
    fewer = fault("lost bias", 0).right
    fewer.head = fewer.head.__class__(8, 4)
    with pytest.raises(ArtifactError, match="their logits differ"):
        graph_rows(reference, reference, fewer, pictures)
