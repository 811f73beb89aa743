"""The golden kit of one artifact: images, what it gives for them, and programs that check it.

    kit.json            shapes, labels, preprocessing, tolerances, what the artifact is
    pixels.u8           the images, resized and cropped
    inputs.f32          the same as the network's input
    logits.f32          the artifact's own logits, pytorch.f32 those of PyTorch
    card.png, card.u8   a test card, and what the preprocessing makes of it
    check.py            checks a model, logits, an input or a resize; needs none of this project
    check_tensorrt.cpp  checks an engine from C++; of TensorRT's artifacts only
    triton_client.py    checks a model that Triton serves; in Triton's repository only

All comes from the results: the kit of the run, and the validation of the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.files import read_regular
from pipeline.core.network import Logits, Network, Pixels
from pipeline.core.plain import read_json
from pipeline.core.replacing import Whose, cannot_write, put, workspace
from pipeline.stages.names import CARD, CARD_PIXELS, GOLDEN_INPUT, GOLDEN_PIXELS, LOGITS, PYTORCH
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.accuracy import ValidationFacts
from pipeline.steps.facts.golden import Expected, GoldenFacts
from pipeline.steps.library import Library
from pipeline.targets.registry import TARGETS

FOLDER = "golden"
KIT = "kit.json"
OWN_LOGITS = "logits.f32"
CHECK = "check.py"
TRITON_CLIENT = "triton_client.py"
README = "README.md"
FORMAT = "care-deploy/golden/1"
_MOST_OF_VALUES = 2**30

_SHARED = (GOLDEN_PIXELS, GOLDEN_INPUT, PYTORCH, CARD, CARD_PIXELS)


@dataclass(frozen=True)
class Kit:
    """What there is to write.

    Attributes:
        artifact: Whose kit it is.
        images: The run's kit.
        facts: What the run's kit states.
        expected: What the artifact gives for it.
        state: How that came about: "measured" or "emulated".
        logits: The artifact's own, (images, classes).
    """

    artifact: Artifact
    images: Artifact
    facts: GoldenFacts
    expected: Expected
    state: str
    logits: Logits

    @property
    def network(self) -> Network:
        """Labels and preprocessing."""
        return self.images.network()


@dataclass(frozen=True)
class Served:
    """A model as Triton serves it.

    Attributes:
        model: Its name for clients.
        source: Name of its input.
        result: Name of its output.
        batch: Images of a request.
    """

    model: str
    source: str
    result: str
    batch: int


@dataclass(frozen=True)
class Golden:
    """Golden images of an artifact, wherever they were found.

    Attributes:
        pixels: uint8 (images, height, width, channels).
        logits: What the artifact gives for them, (images, classes).
        labels: Their classes, (images,).
        tolerance: Largest error against `logits` that a device may have.
        mean_tolerance: Largest mean of them.
        state: How `logits` came about: "measured" or "emulated".
    """

    pixels: Pixels
    logits: Logits
    labels: tuple[int, ...]
    tolerance: float
    mean_tolerance: float
    state: str


def golden_of(artifact: Artifact) -> Golden | str:
    """An artifact's golden images, out of the bundle or the results in which it lies.

    Returns:
        The images, or why there are none.

    Raises:
        ArtifactError: Those of the bundle are damaged, or of another artifact.
    """
    packed = artifact.folder.parents[1] / FOLDER / artifact.name.replace("/", "-")
    if (packed / KIT).is_file():
        return _packed(packed, artifact)
    kit = kit_of(artifact)
    if isinstance(kit, str):
        return kit
    pixels = np.fromfile(kit.images.path(GOLDEN_PIXELS), "u1")
    return Golden(
        pixels.reshape(kit.facts.pixels_shape),
        kit.logits,
        kit.facts.labels,
        kit.expected.tolerance,
        kit.expected.mean_tolerance,
        kit.state,
    )


def _packed(folder: Path, artifact: Artifact) -> Golden:
    stated = read_json(folder / KIT)
    try:
        if stated["format"] != FORMAT or stated["digest"] != artifact.digest:
            raise ArtifactError(f"{folder} is of another {artifact.name} than {artifact.folder}")
        images, classes = int(stated["images"]), int(stated["classes"])
        depth, height, width = artifact.network().input_shape
        pixels = _values(folder / GOLDEN_PIXELS, "u1", (images, height, width, depth))
        return Golden(
            pixels,
            _values(folder / OWN_LOGITS, "<f4", (images, classes)),
            tuple(int(label) for label in stated["labels"]),
            float(stated["tolerance"]),
            float(stated["mean_tolerance"]),
            str(stated["logits"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{folder / KIT} is damaged") from error


def _values(path: Path, kind: str, shape: tuple[int, ...]) -> Any:
    try:
        data = read_regular(path, _MOST_OF_VALUES)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    return np.frombuffer(data, kind).reshape(shape)


def kit_of(artifact: Artifact) -> Kit | str:
    """The golden kit of a built artifact, or why there is none.

    Raises:
        ArtifactError: What it comes from is damaged, or not what was stated.
    """
    results = artifact.folder.parents[artifact.name.count("/")]
    if results / artifact.name != artifact.folder:
        return f"{artifact.folder} lies outside of results"
    name = f"validate/{artifact.name.replace('/', '-')}"
    again = "run python -m pipeline run again"
    library = Library(results)
    if name not in library.places:
        return f"{artifact.name} was not validated: {again}"
    stated = library.artifact(name).made_from
    if stated.get(artifact.name) != artifact.digest:
        return f"{name} is of an earlier build of {artifact.name}: {again}"
    if "validate/golden" not in stated:
        return f"{name} is of an earlier version: {again}"
    if not library.stated.of(name):
        return f"nothing states the seal of {name}: {again}, which writes results.json"
    validated = library.require_whole(name)
    facts = ValidationFacts.from_facts(validated.facts, name)
    if facts.golden is None:
        why = facts.numbers.top1.why if facts.numbers.top1.value is None else "it gives NaN"
        return f"nothing is known of what {artifact.name} gives: {why}"
    images = library.require_whole("validate/golden")
    kit = GoldenFacts.from_facts(images.facts, images.name)
    logits = np.load(validated.path(LOGITS), mmap_mode="r")[list(kit.images)]
    state = str(facts.numbers.top1.state)
    return Kit(artifact, images, kit, facts.golden, state, np.asarray(logits))


def write_kit(kit: Kit, folder: Path, *, served: Served | None = None) -> None:
    """Write the kit's files.

    Args:
        kit: The kit.
        folder: Where they shall lie; is made.
        served: As what Triton serves it; None where it does not.
    """
    folder.mkdir(parents=True)
    write_data(kit, folder)
    for name in (CHECK, README):
        (folder / name).write_text(_template(name), encoding="utf-8")
    for name in TARGETS[kit.artifact.name.partition("/")[0]].checks:
        text = filled(_template(name), _constants(kit))
        (folder / name).write_text(text, encoding="utf-8")
    if served is not None:
        values = {name.upper(): value for name, value in asdict(served).items()}
        text = filled(_template(TRITON_CLIENT), values)
        (folder / TRITON_CLIENT).write_text(text, encoding="utf-8")


def write_data(kit: Kit, folder: Path) -> None:
    """Write images, logits and what is known of them, without programs."""
    for name in _SHARED:
        kit.images.copy(name, folder / name)
    (folder / OWN_LOGITS).write_bytes(kit.logits.astype("<f4").tobytes())
    (folder / KIT).write_text(json.dumps(described(kit), indent=1) + "\n", encoding="utf-8")


def described(kit: Kit) -> dict[str, Any]:
    """What `kit.json` holds."""
    facts, network = kit.facts, kit.network
    return {
        "format": FORMAT,
        "artifact": kit.artifact.name,
        "digest": kit.artifact.digest,
        "logits": kit.state,
        "images": len(facts.images),
        "classes": facts.classes,
        "pixels_shape": list(facts.pixels_shape),
        "input_shape": list(facts.input_shape),
        "input_sha256": facts.input_sha256,
        "card_shape": list(facts.card_shape),
        "labels": list(facts.labels),
        "names": [network.labels[label] for label in facts.labels],
        "preprocess": dict(network.preprocess),
        **({"licence": network.licence} if network.licence else {}),
        "error": kit.expected.error,
        "mean_error": kit.expected.mean_error,
        "tolerance": kit.expected.tolerance,
        "mean_tolerance": kit.expected.mean_tolerance,
    }


def export(artifact: Artifact, folder: Path) -> Path:
    """Write an artifact's kit into a folder of its own.

    Returns:
        `folder`.

    Raises:
        InputError: There is no kit, or the folder holds something.
        ArtifactError: Something is damaged, or the folder cannot be written.
    """
    kit = kit_of(artifact)
    if isinstance(kit, str):
        raise InputError(f"there is no golden kit: {kit}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: name a new folder")
    place = folder.resolve()
    try:
        with workspace(place) as new:
            write_kit(kit, new)
            put(new, place, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    return folder


def add_to(artifact: Artifact, folder: Path, say: Callable[[str], object], served: Served) -> bool:
    """Put an artifact's kit into a folder of Triton's, or say why it has none; whether it has."""
    kit = kit_of(artifact)
    if isinstance(kit, str):
        say(f"without a golden kit: {kit}")
        return False
    write_kit(kit, folder / FOLDER, served=served)
    return True


def filled(template: str, values: Mapping[str, object]) -> str:
    """A template with values in the place of their names, such as @IMAGES@."""
    for name, value in values.items():
        template = template.replace(f"@{name}@", str(value))
    return template


def _template(name: str) -> str:
    path = Path(__file__).parent / "templates" / f"golden_{name}.txt"
    return path.read_text(encoding="utf-8")


def _constants(kit: Kit) -> dict[str, object]:
    images, channels, height, width = kit.facts.input_shape
    return {
        "ARTIFACT": kit.artifact.name,
        "IMAGES": images,
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "CLASSES": kit.facts.classes,
        "TOLERANCE": repr(kit.expected.tolerance),
        "MEAN_TOLERANCE": repr(kit.expected.mean_tolerance),
    }
