"""Rewrites of ONNX graphs: precision, quantize/dequantize pairs, exact passes, comparison.

Imports core, emulate and calibration, never a runtime's target.
A newcomer adds a pass in `passes/`, a file with its own test.
"""
