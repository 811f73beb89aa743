"""Builds, validates and measures TensorRT, ONNX Runtime and Core ML models of one network.

    import pipeline

    results = pipeline.run("pipeline.yaml")
    with pipeline.load("engines/care_tiny/ort/int8") as model:
        print(model.predict("photo.jpg").best.label)

The floors, from the ground up: core, (care), emulate, (calibration), graphs, steps, targets, config
and source, stages, scheduler, report, exports, api, commands, cli. A floor imports only from those
below it; `docs/architecture.md` draws them. Importing this package imports nothing else: a public
name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.model import Model, Prediction, Score, load
    from pipeline.api.results import Results, run
    from pipeline.core.errors import PipelineError
    from pipeline.scheduler.execute import Observer

__all__ = ["Model", "Observer", "PipelineError", "Prediction", "Results", "Score", "load", "run"]

# ONNX Runtime tells its maker of the models that it loads, since 1.29 on Linux and macOS, too, and
# leaves files in the folder for temporary ones and in the user's home. What is deployed here is
# nobody else's: it is asked not to, before it is loaded, where the user has said nothing of it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_PLACES = {
    "Model": "pipeline.api.model",
    "Observer": "pipeline.scheduler.execute",
    "PipelineError": "pipeline.core.errors",
    "Prediction": "pipeline.api.model",
    "Results": "pipeline.api.results",
    "Score": "pipeline.api.model",
    "load": "pipeline.api.model",
    "run": "pipeline.api.results",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
