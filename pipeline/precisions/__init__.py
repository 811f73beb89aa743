"""The forms of the ONNX graph, by name."""

from __future__ import annotations

from pipeline.precisions.base import Form
from pipeline.precisions.bfloat16 import BFloat16
from pipeline.precisions.float16 import Float16
from pipeline.precisions.float32 import Float32
from pipeline.precisions.qdq import Fp8Trt, Int8Trt
from pipeline.precisions.qdq_ort import Int8Ort

FORMS: dict[str, Form] = {
    form.name: form for form in (Float32(), Float16(), BFloat16(), Int8Trt(), Fp8Trt(), Int8Ort())
}
