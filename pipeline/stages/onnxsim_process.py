"""Runs onnxsim: `python -m pipeline.stages.onnxsim_process SOURCE RESULT`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from pipeline.core.signals import die_with_parent

    die_with_parent()

    # onnxsim loads PyTorch and SymPy where there are any, for devices, measures and formulas that
    # are not asked for here, and that takes 20 times as long as most graphs: to it, there are none.
    sys.modules["torch"] = sys.modules["sympy"] = None  # type: ignore[assignment]

    import onnx
    import onnxsim

    from pipeline.graphs.metadata import carry_metadata

    exported = onnx.load(sys.argv[1])
    simplified, valid = onnxsim.simplify(exported)
    if not valid:
        sys.exit("onnxsim's own check failed")
    carry_metadata(exported, simplified)
    onnx.save(simplified, sys.argv[2])
