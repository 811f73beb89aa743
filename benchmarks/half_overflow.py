"""Shows where the published attention form leaves float16, and that the inference form does not.

    python benchmarks/half_overflow.py [--network care_s1] [--images 2] [--size 224]

Both forms of one network are exported, rewritten in float16 and run on the strict executor, which
rounds every result to its type. The table names each block's tensor of least headroom: 65504
divided by its largest value; below 1 it overflows. Weights come from a formula, in the spread that
trained networks have; a checkpoint of yours takes their place with --checkpoint.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from networks import fused, published_form, write_graph

from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.ranges import TensorRange, first_failure, tightest
from pipeline.graphs import float16

if TYPE_CHECKING:
    from torch import nn


def judge(module: nn.Module, images: np.ndarray) -> list[TensorRange]:
    """Ranges of all tensors of the float16 graph over the images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_graph(module, path, images.shape[-1])
        model, _ = float16.to_half(float16.read_graph(path), float16.FLOAT16)
    executor = OnnxExecutor(model, record=True)
    executor.run(images)
    return executor.overflow_report()


def show(title: str, report: list[TensorRange]) -> dict[str, Any]:
    """Print the table and give its summary."""
    print(f"\n{title}")
    print(f"{'block':24} {'operator':14} {'largest value':>14} {'headroom':>10}  overflowed")
    for block, entry in tightest(report).items():
        if entry.finite:
            figures = f"{entry.largest:14.4g} {entry.headroom:10.2f}"
        else:
            figures = f"{'not finite':>14} {'none':>10}  {entry.overflowed or 'carried on'}"
        print(f"{block or '(input)':24} {entry.op_type:14} {figures}")
    failure = first_failure(report)
    if failure is None:
        least = min(e.headroom for e in report if e.dtype == "float16")
        print(f"no overflow; least headroom {least:.1f}")
        return {"overflow": None, "headroom": least}
    print(
        f"the first overflow: tensor {failure.tensor} of {failure.op_type} in {failure.block}: "
        f"{failure.largest:.4g}, {failure.overflowed} of {failure.values} values beyond 65504"
    )
    return {"overflow": failure.block, "headroom": failure.headroom}


def main() -> None:
    """Judge both forms."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--network", default="care_s1")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    shape = (arguments.images, 3, arguments.size, arguments.size)
    images = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    model = published_form(arguments.network, arguments.checkpoint or "formula")
    result = {
        "published": show("Published form, float16", judge(model, images)),
        "inference": show("Inference form, float16", judge(fused(model), images)),
    }
    print(json.dumps({"network": arguments.network, **result}))


if __name__ == "__main__":
    main()
