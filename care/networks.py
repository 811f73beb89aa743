"""Importing this module registers care_s0, care_s1, care_s2, care_tiny and mlla_t with timm."""

from care import mlla, model

__all__ = ["mlla", "model"]
