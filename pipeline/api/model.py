"""A built artifact as a model that answers: on arrays, or on photographs by its own preprocessing.

    with pipeline.load("engines/care_tiny/ort/int8") as model:
        print(model.predict("photo.jpg").best.label)

An artifact needs nothing but its folder where its runtime is. Elsewhere an executor stands for the
runtime, which needs the graph that the artifact was built from: it lies in the same results.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.core.errors import ArtifactError, InputError, UnavailableError
from pipeline.core.figures import State
from pipeline.core.inputs import expanded
from pipeline.core.network import Batch, Images, Logits, Network, Pixels, in_batches
from pipeline.core.preprocess import Pictures, Preprocess, decode, to_rgb
from pipeline.core.runner import Runner
from pipeline.stages.names import GRAPH, OWN_GRAPH
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import MODULE
from pipeline.targets.registry import TARGETS

_BATCH = 16
"""Images at a time, where the artifact takes any number."""


@dataclass(frozen=True)
class Score:
    """One class of a prediction.

    Attributes:
        label: Its name.
        index: Its place among the logits.
        probability: Softmax of the logits, 0 … 1.
    """

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: The file, or "" for an image that came as an object.
        scores: The most likely classes, the first the likeliest.
        logits: All of them, (classes,).
        milliseconds: What the runtime's call took; None where an executor stands for it.
    """

    image: str
    scores: tuple[Score, ...]
    logits: npt.NDArray[np.float32]
    milliseconds: float | None

    @property
    def best(self) -> Score:
        """The likeliest class."""
        return self.scores[0]


class Answering(AbstractContextManager["Answering"]):
    """Something that answers on images.

    Args:
        name: What it is called.
        network: Labels, input shape and preprocessing.
        runner: Gives the logits; closed with this.
        why: Why it is emulated; "" if it is not.
        precision: What it computes in, for messages.

    Attributes:
        name: What it is called.
        network: Labels, input shape and preprocessing, as the artifact states them.
        state: "measured" where the artifact's own runtime answers, "emulated" where an executor
            stands for it.
        why: Why it is emulated; "" if it is not.
        device: What answers, for people.
    """

    def __init__(
        self, name: str, network: Network, runner: Runner, why: str, precision: str
    ) -> None:
        self.name = name
        self.network = network
        self.state = State.EMULATED if why else State.MEASURED
        self.why = why
        self.device = runner.device
        self._runner = runner
        self._precision = precision
        self._preprocess = Preprocess.from_dict(self.network.preprocess)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.network.labels

    def __call__(self, images: Batch) -> Logits:
        """Logits of any number of images.

        Args:
            images: Pixels, uint8 (images, height, width, channels), see `pixels`; or what the
                network takes, float32 (images, channels, height, width), see `preprocess`. Core
                ML's packages take pixels only.

        Returns:
            float32 (images, classes).

        Raises:
            InputError: Type or shape do not fit.
        """
        images = np.asarray(images)
        self._check(images)
        if not len(images):
            return np.empty((0, len(self.labels)), np.float32)
        given = Pictures(images, self._preprocess) if images.dtype == np.uint8 else images
        size = max(self._runner.smallest, min(_BATCH, self._runner.largest or _BATCH))
        return in_batches(self._runner, self._runner.input_of(given), size, self._runner.smallest)

    def _check(self, images: Batch) -> None:
        depth, height, width = self.network.input_shape
        shapes = {"uint8": (height, width, depth)}
        if self._runner.takes == "images":
            shapes["float32"] = (depth, height, width)
        if images.ndim == 4 and shapes.get(str(images.dtype)) == images.shape[1:]:
            return
        taken = " or ".join(
            f"{kind} of shape (images, {', '.join(map(str, shape))})"
            for kind, shape in shapes.items()
        )
        raise InputError(f"{self.name} takes {taken}, not {images.dtype} of shape {images.shape}")

    def pixels(self, image: str | Path | Image.Image) -> Pixels:
        """One image, resized and cropped by the artifact's own preprocessing.

        Args:
            image: A file, or an image of Pillow's.

        Returns:
            uint8 (1, height, width, channels).

        Raises:
            DataError: It is no image that can be used.
            InputError: The file cannot be read.
        """
        picture = to_rgb(image) if isinstance(image, Image.Image) else _read(image)
        return self._preprocess.pixels(picture)[None]

    def preprocess(self, image: str | Path | Image.Image) -> Images:
        """The network's input for one image, by the artifact's own preprocessing.

        Args:
            image: A file, or an image of Pillow's.

        Returns:
            float32 (1, channels, height, width).

        Raises:
            DataError: It is no image that can be used.
            InputError: The file cannot be read.
        """
        return self._preprocess.normalize(self.pixels(image))

    def predict(self, image: str | Path | Image.Image, top: int = 5) -> Prediction:
        """The most likely classes of one image.

        Args:
            image: A file, or an image of Pillow's.
            top: How many classes, at most.

        Raises:
            DataError: It is no image that can be used.
            InputError: The file cannot be read, or `top` is not positive.
        """
        if top < 1:
            raise InputError(f"top is the number of classes to give, at least 1, not {top}")
        images = self._runner.input_of(Pictures(self.pixels(image), self._preprocess))
        start = time.perf_counter()
        logits = in_batches(self._runner, images, 1, self._runner.smallest)[0]
        took = 1e3 * (time.perf_counter() - start)
        return Prediction(
            image="" if isinstance(image, Image.Image) else str(image),
            scores=self._scores(logits, top),
            logits=logits,
            milliseconds=took if self.state is State.MEASURED else None,
        )

    def _scores(self, logits: npt.NDArray[np.float32], top: int) -> tuple[Score, ...]:
        if not np.isfinite(logits).all():
            raise ArtifactError(
                f"{self.name} gives NaN or infinity for this image: a value leaves the range of "
                f"{self._precision}; use another precision"
            )
        powers = np.exp(logits.astype(np.float64) - logits.max())
        shares = powers / powers.sum()
        # Stable, so that classes of equal logits come in their order.
        best = np.argsort(-logits, kind="stable")[:top]
        return tuple(Score(self.labels[i], int(i), float(shares[i])) for i in best)

    def close(self) -> None:
        """Free what the runtime holds. Can be called again."""
        self._runner.close()

    def __exit__(self, *error: object) -> None:
        self.close()


class Model(Answering):
    """A built artifact that answers; made by `load`.

    Attributes:
        artifact: What was opened: its facts, files and hashes.
        name: Target and precision, such as "ort/int8".
        network, state, why, device: See `Answering`.
    """

    def __init__(self, artifact: Artifact, runner: Runner, why: str) -> None:
        self.artifact = artifact
        precision = str(artifact.facts.get("precision", "its precision"))
        super().__init__(artifact.name, artifact.network(), runner, why, precision)


def load(folder: str | Path, *, threads: int | None = None) -> Model:
    """Open a built artifact, by its runtime or by the executor that stands for it here.

    Args:
        folder: The artifact's folder, such as "engines/care_tiny/ort/int8".
        threads: CPU threads, where that means something; None for the target's own choice.

    Raises:
        ArtifactError: The folder holds no built artifact, or it is damaged.
        UnavailableError: This machine can neither run nor emulate it.
    """
    artifact = Artifact.read(Path(expanded(str(folder))))
    target = artifact.facts.get("target")
    if artifact.kind != "build" or target not in TARGETS:
        raise ArtifactError(
            f"{artifact.folder} is no built model but {artifact.name}: name the folder of a "
            f"precision of {', '.join(TARGETS)}"
        )
    artifact.verify()
    runtime = TARGETS[str(target)]
    missing = runtime.missing(artifact)
    if missing is None:
        return Model(artifact, runtime.open(artifact, threads=threads), "")
    runner = runtime.emulate(artifact, _graph_of(artifact, missing))
    if runner is None:
        raise UnavailableError(f"{artifact.name} cannot run here: {missing}; nor be emulated")
    return Model(artifact, runner, missing)


def _graph_of(artifact: Artifact, missing: str) -> Path | None:
    """The ONNX graph that an artifact was built from; None if it was built from the module.

    Raises:
        UnavailableError: It does not lie there, or is another one.
    """
    if OWN_GRAPH in artifact.files:
        return artifact.path(OWN_GRAPH)
    runtime = TARGETS[str(artifact.facts["target"])]
    if runtime.precisions.get(str(artifact.facts.get("precision"))) == MODULE:
        return None
    results = artifact.folder.absolute().parents[1]
    for name, digest in artifact.made_from.items():
        folder = results / name
        if not name.startswith("precision/") or not folder.is_dir():
            continue
        form = Artifact.read(folder)
        if form.digest != digest:
            raise UnavailableError(
                f"{artifact.name} cannot run here ({missing}), and {folder} holds another graph "
                "than it was built from: run python -m pipeline run again"
            )
        form.verify()
        return form.path(GRAPH)
    raise UnavailableError(
        f"{artifact.name} cannot run here ({missing}), and to emulate it takes the graph that it "
        f"was built from, which does not lie in {results / 'precision'}"
    )


def _read(image: str | Path) -> Any:
    path = Path(expanded(str(image)))
    try:
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: name an image file")
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
