"""The executor of ONNX graphs.

Imports pipeline.core and pipeline.emulate. A newcomer adds an operator in `operators/`.
"""
