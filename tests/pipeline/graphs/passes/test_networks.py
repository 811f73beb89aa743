"""All passes together on a whole network, as the ONNX Runtime target applies them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pipeline.graphs.edit import INTERNAL
from pipeline.graphs.passes import finish_blocked, finish_portable, for_ort, optimize
from pipeline.graphs.passes.nchwc import NCHWC
from pipeline.targets.ort.layout import block_size, write_probe

SIZE = 64


@pytest.fixture(params=["exported", "simplified"])
def exported(request: pytest.FixtureRequest, embedded_results: Path) -> Path:
    """Both graphs that a run makes of CARE-tiny in its exact inference form, of a dynamic batch.

    The pipeline optimizes the simplified one, or the exported one where onnxsim fails.
    """
    if request.param == "simplified":
        return embedded_results / "onnx" / "model.onnx"
    path = embedded_results / "export" / "model.onnx"
    if any(node.op_type == "Shape" for node in onnx.load(path).graph.node):
        version = metadata.version("torch")
        pytest.skip(f"PyTorch {version} exports sizes that are computed: for onnxsim")
    return path


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> int | None:
    """Channels of a block here; None if there are none."""
    probe = tmp_path_factory.mktemp("probe") / "probe.onnx"
    write_probe(probe)
    return block_size(probe)


def test_portable(
    exported: Path,
    run: Callable[..., Any],
    count: Callable[[ir.Model], Counter[str]],
    images: Callable[[int, int], Any],
) -> None:
    model = ir.load(exported)
    before = count(model)
    expected = run(model, images(3, SIZE))
    optimize(model, [*for_ort(16), *finish_portable()])
    found = run(model, images(3, SIZE))
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()
    after = count(model)
    # Five attentions with one division and no mean; no Elu, no scale by product.
    assert before["Div"] - after["Div"] == 10
    assert before["ReduceSum"] - after["ReduceSum"] == 5
    assert after["ReduceMean"] == 1
    assert (after["Elu"], after["Mul"]) == (0, 0)
    assert not any(name.startswith(("com.microsoft", INTERNAL)) for name in after)


def test_blocked(
    exported: Path,
    run: Callable[..., Any],
    count: Callable[[ir.Model], Counter[str]],
    images: Callable[[int, int], Any],
    block: int | None,
) -> None:
    if block is None:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    model = ir.load(exported)
    expected = run(model, images(3, SIZE))
    optimize(model, [*for_ort(block), *finish_blocked(block)])
    found = run(model, images(3, SIZE))
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()
    after = count(model)
    assert (after["Conv"], after["ReduceMean"], after["Div"]) == (0, 0, 5)
    assert not [name for name, value in model.graph.initializers.items() if not value.uses()]
    assert after[f"{NCHWC}:ReorderInput"] == after[f"{NCHWC}:ReorderOutput"] == 0
