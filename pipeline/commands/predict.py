"""`predict`: what does a built model say of these images?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.api.files import Stated, is_model_file, open_file
from pipeline.api.model import Answering, Prediction, load
from pipeline.commands.engine import is_engine, open_engine
from pipeline.core.errors import InputError, about
from pipeline.core.inputs import expanded
from pipeline.core.listing import images_below
from pipeline.exports.built import built
from pipeline.report.terminal import render
from pipeline.steps.artifact import MANIFEST
from pipeline.steps.folders import results_folders

FROM_STDIN = "-"


def predict(
    images: Sequence[str],
    artifact: str,
    *,
    stated: Stated,
    output: Path,
    name: str | None,
    top: int,
    threads: int | None,
    as_json: bool,
) -> int:
    """Print the most likely classes of images; returns the number of images.

    Args:
        images: Files, folders of images, or "-" for a list of files on the standard input.
        artifact: Folder of a built artifact, or its target and, after a slash, its precision; or a
            model's file, which may come as the first of the images, too.
        stated: What a model's file does not say of itself.
        output: Where results lie, for an artifact that is named by its target.
        name: Which results; None if there are but one.
        top: How many classes.
        threads: CPU threads; None for the artifact's own choice.
        as_json: A JSON object an image, one a line, in place of a table.

    Raises:
        InputError: There is no such image or artifact.
        DataError: A file is no image that can be used.
    """
    if is_model_file(images[0]) or is_engine(images[0]):
        artifact, images = images[0], images[1:]
    files = list(_files(images))
    if not files:
        raise InputError(f"no images in {', '.join(images)}: name image files or a folder of them")
    with _opened(artifact, stated, output, name, threads) as model:
        if as_json:
            for file in files:
                print(json.dumps(plain(model, model.predict(file, top))), flush=True)
        else:
            print(_text(model, [model.predict(file, top) for file in files]))
    return len(files)


def _opened(
    artifact: str, stated: Stated, output: Path, name: str | None, threads: int | None
) -> Answering:
    if is_model_file(artifact):
        path = Path(expanded(artifact))
        with about(str(path)):
            return open_file(path, stated, threads)
    if stated != Stated():
        raise InputError(
            "a built artifact says itself how images are prepared: leave out --labels, --size, "
            "--crop, --mean and --std, or name a model's file"
        )
    if is_engine(artifact):
        return open_engine(Path(expanded(artifact)), threads)
    return load(find(artifact, output, name), threads=threads)


def find(artifact: str, output: Path, name: str | None) -> Path:
    """Folder of an artifact that is named by its folder, or by target and precision.

    Raises:
        InputError: There is none, or several results are there and none is named.
        ArtifactError: It is damaged.
    """
    folder = Path(expanded(artifact))
    if (folder / MANIFEST).is_file():
        return folder
    target, _, precision = artifact.partition("/")
    folders = results_folders(output, name)
    if len(folders) > 1:
        known = ", ".join(path.name for path in folders)
        raise InputError(f"{output} holds several results ({known}): name one with --name")
    return built(output, folders[0].name, target, precision or None).folder


def plain(model: Answering, prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON holds it."""
    return {
        "image": prediction.image,
        "artifact": model.name,
        "state": str(model.state),
        "scores": [
            {"label": score.label, "index": score.index, "probability": score.probability}
            for score in prediction.scores
        ],
        "milliseconds": prediction.milliseconds,
    }


def _text(model: Answering, predictions: Sequence[Prediction]) -> str:
    table = Table("image", "class", "probability", "ms", box=None)
    for prediction in predictions:
        took = prediction.milliseconds
        image, time = prediction.image, "" if took is None else f"{took:.2f}"
        for score in prediction.scores:
            table.add_row(image, score.label, f"{100 * score.probability:.2f} %", time)
            image = time = ""  # once an image
    by = f"{model.name}, {model.state}: {model.device.removeprefix('emulated: ')}"
    return render(table, by, *([f"emulated: {model.why}"] if model.why else []))


def _files(images: Sequence[str]) -> Iterator[str]:
    for stated in images:
        if stated == FROM_STDIN:
            # Not `for line in sys.stdin`: the test runner of click 8.2 raises EOFError at its end.
            lines = iter(sys.stdin.readline, "")
            yield from (line.strip() for line in lines if line.strip())
            continue
        path = Path(expanded(stated))
        yield from map(str, images_below(path)) if path.is_dir() else [str(path)]
