"""The executor of ML Programs, as Core ML packages hold them.

Imports pipeline.core and pipeline.emulate, not coremltools' converter.
A newcomer adds an operation in `operators/`.
"""
