"""The data side of quantization: which images, which batches, which ranges, which layers stay.

Imports pipeline.core and pipeline.emulate, never a graph rewrite or a target.
A newcomer adds a way to choose ranges in `ranges`, or a search in `sensitivity`.
"""
