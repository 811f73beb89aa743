"""Builds, validates and measures TensorRT, ONNX Runtime and Core ML models of one network."""
