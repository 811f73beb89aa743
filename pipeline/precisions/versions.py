"""Versions of the packages that the forms are made with."""

from __future__ import annotations

from importlib import metadata


def onnx_version() -> dict[str, str]:
    """The version of the onnx package, without importing it."""
    return {"onnx": metadata.version("onnx")}
