"""Published attention leaves float16 where the inference form does not, and the block is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.ranges import TensorRange, first_failure, tightest
from pipeline.graphs import float16
from pipeline.stages.export import trace

if TYPE_CHECKING:
    from torch import nn

SCALE = 200.0
BLOCK = "stages.2.blocks.1"


def float16_report(traced: onnx.ModelProto, images: np.ndarray) -> list[TensorRange]:
    model, _ = float16.to_half(traced, float16.FLOAT16)
    onnx.checker.check_model(model, full_check=True)
    executor = OnnxExecutor(model, record=True)
    executor.run(images)
    return executor.overflow_report()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_overflow_is_found_and_its_block_named(
    parity_model: Callable[..., nn.Module], images: Callable[[int, int], np.ndarray]
) -> None:
    import torch

    from care.fuse import fuse

    model = parity_model("care_tiny", depths=(1, 1, 2, 1))
    # Large queries and keys in one block: exact attention hardly depends on their scale.
    block = model.get_submodule(BLOCK)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if ".qk." in f".{name}":
                parameter.mul_(SCALE)
    pictures = images(2, 64)
    traced = trace(model, pictures, dynamic=False)
    published = float16_report(traced, pictures)
    failure = first_failure(published)
    assert failure is not None
    assert failure.block == BLOCK
    assert failure.largest > 65504
    assert failure.headroom < 1
    # The name survives the tools that rewrite graphs, of which this one drops all metadata.
    raised = float16.raise_opset(traced, float16.BFLOAT16_OPSET)
    executor = OnnxExecutor(float16.to_half(raised, float16.FLOAT16)[0], record=True)
    executor.run(pictures)
    failure = first_failure(executor.overflow_report())
    assert failure is not None
    assert failure.block == BLOCK
    inference = float16_report(trace(fuse(model), pictures, dynamic=False), pictures)
    assert first_failure(inference) is None
    assert min(entry.headroom for entry in tightest(inference).values()) > 4
