"""Executors that run a saved graph or program on the CPU as a device would, rounding every result.

Imports pipeline.core and torch, no target: what an executor says must not depend on who asks.
A newcomer adds operators here, each with a test against the runtime that it stands for.
"""
