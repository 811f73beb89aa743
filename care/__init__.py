"""The CARE Transformer in PyTorch: model, exact inference form, training and evaluation.

Importing this package registers care_s0, care_s1, care_s2, care_tiny and mlla_t with timm.
"""

from care import mlla, model

__all__ = ["mlla", "model"]
