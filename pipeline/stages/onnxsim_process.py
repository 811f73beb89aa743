"""Runs onnxsim: `python -m pipeline.stages.onnxsim_process SOURCE RESULT`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import onnx
    import onnxsim

    simplified, valid = onnxsim.simplify(onnx.load(sys.argv[1]))
    if not valid:
        sys.exit("onnxsim's own check failed")
    onnx.save(simplified, sys.argv[2])
