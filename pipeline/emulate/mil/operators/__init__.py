"""The operations of ML Programs, one function each, registered in `table`.

Imports pipeline.core and pipeline.emulate. A newcomer adds a function and its test.
"""
