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
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch

import care  # noqa: F401  registers the networks
from care.fuse import fuse
from pipeline.precisions import half
from pipeline.reference.onnx_executor import OnnxExecutor
from pipeline.reference.ranges import TensorRange, first_failure, tightest

if TYPE_CHECKING:
    import onnx
    from torch import nn


def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter that depends on its name and shape alone."""
    rng = np.random.default_rng([7, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith(("running_mean", "bias")):
        value = 0.1 * rng.standard_normal(shape)
    elif name.endswith("gamma"):
        value = rng.uniform(0.1, 0.5, shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def network(name: str, checkpoint: Path | None) -> nn.Module:
    """The published form of a network, in evaluation mode."""
    model: nn.Module = timm.create_model(name).eval()
    if checkpoint:
        from care.checkpoint import load

        load(checkpoint, model)
        return model
    state = model.state_dict()
    for key, value in state.items():
        if not key.endswith(("num_batches_tracked", "rotations")):
            state[key] = weights(key, tuple(value.shape))
    model.load_state_dict(state)
    return model


def float16_graph(module: nn.Module, size: int) -> onnx.ModelProto:
    """The module as a float16 ONNX graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            opset_version=20,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    return half.to_half(program.model_proto, half.FLOAT16)[0]


def judge(module: nn.Module, images: np.ndarray) -> list[TensorRange]:
    """Ranges of all tensors of the float16 graph over the images."""
    executor = OnnxExecutor(float16_graph(module, images.shape[-1]), record=True)
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
    model = network(arguments.network, arguments.checkpoint)
    result = {
        "published": show("Published form, float16", judge(model, images)),
        "inference": show("Inference form, float16", judge(fuse(model), images)),
    }
    print(json.dumps({"network": arguments.network, **result}))


if __name__ == "__main__":
    main()
