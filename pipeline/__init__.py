"""Builds, validates and measures TensorRT, ONNX Runtime and Core ML models of one network.

The floors, from the ground up: core, (care), emulate, (calibration), graphs, steps, targets, config
and source, stages, scheduler, report, exports, commands, cli. A floor imports only from those below
it; `docs/architecture.md` draws them. Importing this package imports nothing else.
"""
