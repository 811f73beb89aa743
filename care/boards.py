"""Where others watch a run: TensorBoard, Weights & Biases, MLflow.

TensorBoard is always there; the two others are extras of the installation (`.[watch]`). Of MLflow
it is mlflow-skinny: all of it would bring a release of scikit-learn that switches off palettes in
coremltools.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from care.settings import TrainSettings
from pipeline.core.errors import UnavailableError

Values = Mapping[str, float | int | None]


class Board(Protocol):
    """Shows what is measured while a network is trained."""

    def show(self, kind: str, values: Values) -> None:
        """Show figures of a step or an epoch.

        Args:
            kind: "step" or "epoch".
            values: Figures by name, with `step`.
        """

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """TensorBoard's event files in the folder of the run.

    Args:
        folder: Of the run.
        steps: Steps taken so far; what was shown of later ones is purged.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(folder), purge_step=steps)

    def show(self, kind: str, values: Values) -> None:
        """See `Board.show`."""
        for name, value in _figures(kind, values).items():
            self.writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """See `Board.close`."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on as ours does.

    Args:
        settings: Of the run; they name it.
    """

    def __init__(self, settings: TrainSettings) -> None:
        library = _library("wandb")
        name = settings.name or settings.model
        config = settings.model_dump(mode="json")
        identifier = settings.digest()[:16]
        self.run = library.init(
            project="care", name=name, id=identifier, resume="allow", config=config
        )

    def show(self, kind: str, values: Values) -> None:
        """See `Board.show`."""
        self.run.log(_figures(kind, values), step=values["step"])

    def close(self) -> None:
        """See `Board.close`."""
        self.run.finish()


class Mlflow:
    """A run of MLflow; where it goes MLFLOW_TRACKING_URI says.

    Args:
        settings: Of the run; they name it.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.library = _library("mlflow")
        self.library.start_run(run_name=settings.name or settings.model)
        self.library.log_params({k: str(v)[:250] for k, v in settings.identity().items()})

    def show(self, kind: str, values: Values) -> None:
        """See `Board.show`."""
        self.library.log_metrics(_figures(kind, values), step=values["step"])

    def close(self) -> None:
        """See `Board.close`."""
        self.library.end_run()


def boards(settings: TrainSettings, folder: Path, steps: int) -> list[Board]:
    """The boards that the settings ask for.

    Raises:
        UnavailableError: One is not installed.
    """
    found: list[Board] = []
    if settings.tensorboard:
        found.append(TensorBoard(folder, steps))
    if settings.wandb:
        found.append(WeightsAndBiases(settings))
    if settings.mlflow:
        found.append(Mlflow(settings))
    return found


def _figures(kind: str, values: Values) -> dict[str, float | int]:
    return {
        f"{kind}/{name}": value
        for name, value in values.items()
        if name not in ("epoch", "step") and value is not None
    }


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"--{name} needs a library that is not installed: pip install 'care-deploy[watch]'"
        ) from error
