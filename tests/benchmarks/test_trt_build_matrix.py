from __future__ import annotations

from pathlib import Path

import pytest
import trt_build_matrix
from trt_build_matrix import Cell, reasons, table, together, unexpected

from pipeline.core.errors import PipelineError


def cell(
    precision: str, *capabilities: str, size: int | None = 2_000_000, refusal: str = ""
) -> Cell:
    return Cell("small", precision, capabilities, size, 1.25, refusal)


def test_what_can_be_built_together() -> None:
    assert together("fp16") == ("7.5", "8.0", "8.6", "8.9", "12.0")
    assert together("fp32") == ("8.0", "8.6", "8.9", "12.0")
    assert together("fp8") == ("8.9", "12.0")


def test_every_reason_stands_once() -> None:
    cells = [
        Cell(network, "fp8", (capability,), None, 0.1, "no fp8_e4m3")
        for network in ("a", "b")
        for capability in ("7.5", "8.0", "8.6")
    ]
    assert reasons([*cells, cell("fp8", "8.9")]) == [
        'fp8 on 7.5, 8.0, 8.6: float8 tensor cores came with compute capability 8.9 ("no fp8_e4m3")'
    ]


def test_where_library_and_target_disagree() -> None:
    agreed = [cell("fp16", "7.5"), cell("fp8", "8.6", size=None)]
    surprising = [cell("fp16", "8.9", size=None), cell("fp8", "8.0")]
    assert unexpected(agreed) == []
    assert unexpected([*agreed, *surprising]) == ["small fp16 8.9", "small fp8 8.0"]


def test_the_table_has_a_row_for_network_and_precision() -> None:
    cells = [cell("fp16", "7.5"), cell("fp16", "8.0", size=None, refusal="no"), cell("int8", "7.5")]
    lines = table(cells).splitlines()
    assert lines[2:4] == [
        "| small | fp16 | 2.0 MB, 1.2 s | no |",
        "| small | int8 | 2.0 MB, 1.2 s |",
    ]
    assert lines[-1] == '- fp16 on 8.0: not known to this project ("no")'


def test_the_librarys_words_are_shortened(tmp_path: Path) -> None:
    graph = tmp_path / "small.onnx"
    known = trt_build_matrix.shortened(
        PipelineError("Error 9: [x] FP32 GEMM is not supported on SM75"), graph
    )
    assert known == "FP32 GEMM is not supported"
    other = trt_build_matrix.shortened(PipelineError(f"{graph}: odd"), graph)
    assert other == "small.onnx: odd"


@pytest.mark.parametrize("name", ["head.bias", "norm.running_var", "stem.weight"])
def test_parameters_depend_on_name_and_shape_alone(name: str) -> None:
    from networks import parameter

    first, second = parameter(name, (4, 3)), parameter(name, (4, 3))
    assert (first == second).all()
    assert first.dtype == "float32"
    assert (first != parameter(f"other.{name}", (4, 3))).any()
