"""The stages, in their order: export, simplify, calibrate, precision, build, validate, bench.

Imports all floors below, and no command or report; no stage asks for a target's name.
A newcomer adds a stage here and its place in `pipeline.scheduler.plan`.
"""
