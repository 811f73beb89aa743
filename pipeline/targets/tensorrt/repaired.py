"""The 8-bit forms for TensorRT of a network that float16 breaks.

It is repaired in float16 first. What that raises to bfloat16 or float32 is not quantized; of the
rest, the search of the plain forms decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from calibration.budget import Budget
from pipeline.targets.forms import FormJob
from pipeline.targets.repaired import FLOAT16_ERROR, repair_facts, repaired
from pipeline.targets.tensorrt.quantize import Fp8Trt, Int8Trt, Quantized

if TYPE_CHECKING:
    import onnx

    from pipeline.graphs.repair import Repaired


class _RepairedFirst(Quantized):
    """What is not in 8 bits is repaired in float16 first; what that raises stays as it is."""

    mends_first = True
    bfloat16: ClassVar[bool] = True

    def repaired(self, source: onnx.ModelProto, job: FormJob) -> Repaired | None:
        """See `Quantized.repaired`."""
        from pipeline.graphs.float16 import FLOAT16

        budget = Budget.of(job.options, FLOAT16_ERROR)
        return repaired(source, job, FLOAT16, budget, bfloat16=self.bfloat16)

    def told(self, repaired: Repaired) -> dict[str, Any]:
        """See `Quantized.told`."""
        return {"repair": repair_facts(repaired).to_dict()}


class RepairedInt8Trt(_RepairedFirst, Int8Trt):
    """int8 as in `Int8Trt`, with those parts in bfloat16 or float32 that float16 breaks."""

    name = "int8-trt-repaired"


class RepairedInt8TrtOnly(_RepairedFirst, Int8Trt):
    """The same without bfloat16, for GPUs that lack it."""

    name = "int8-trt-repaired-float32"
    bfloat16 = False


class RepairedFp8Trt(_RepairedFirst, Fp8Trt):
    """float8 as in `Fp8Trt`, with those parts in bfloat16 or float32 that float16 breaks."""

    name = "fp8-trt-repaired"
