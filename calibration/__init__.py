"""The data side of quantization: which images, which batches, which ranges."""
