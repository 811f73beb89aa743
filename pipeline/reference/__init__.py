"""Executors of built graphs on plain torch, with every operation's result rounded to its type.

They answer what an engine would compute where its runtime cannot run: a TensorRT engine without a
GPU, a Core ML package off a Mac. `onnx_executor` runs ONNX graphs; the operator kernels in
`kernels` and the number formats in `rounding` are shared by every executor.
"""
