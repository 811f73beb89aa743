"""ONNX Runtime: an optimized model for the CPU.

target.py   what the pipeline sees: build, open, inspect; `profile`
build.py    the model files, and what they do on this machine
layout.py   the blocked layout that this CPU uses
tune.py     which way of running is the fastest here
profile.py  what really ran, node by node
session.py  session settings, errors, silence
"""
