"""Saved Core ML packages: written the same every time, as a classifier, or as its twin for devices.

Packages are converted and compressed in a plain form, the core: an image goes in, logits and
probabilities come out. `as_classifier` adds class labels to it, because coremltools cannot compress
a program that has them; `as_arrays` makes the twin for benchmarks on devices, whose tools take
arrays only. All three share every operation of the network and the weight file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError
from pipeline.core.files import file_hash

IMAGE, LOGITS, PROBABILITIES = "image", "logits", "probabilities"
LABEL, LABEL_PROBABILITIES = "classLabel", "classLabel_probs"
"""Names of a package's input and outputs; the last two are coremltools' own."""

SPECIFICATION = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights")
_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")  # RFC 9562: object identifiers
_VOLATILE = ("com.github.apple.coremltools.conversion_date",)


def save(model: Any, package: Path) -> None:
    """Save a coremltools model with nothing in it that changes from build to build.

    coremltools writes random identifiers into the manifest, the date into the metadata, and for
    programs from torch.export a table for ExecuTorch's debugger, which nothing here reads.
    """
    model.save(str(package))
    for path in package.iterdir():
        if path.name not in ("Data", "Manifest.json"):
            path.unlink()
    edit(package, lambda specification: None)


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Change a saved package's specification, and write it in a canonical form.

    Args:
        package: The package's folder.
        change: Takes the specification, a protobuf message.
    """
    import coremltools

    path = package / SPECIFICATION
    specification = coremltools.proto.Model_pb2.Model()
    specification.ParseFromString(path.read_bytes())
    change(specification)
    for key in _VOLATILE:
        if key in specification.description.metadata.userDefined:
            del specification.description.metadata.userDefined[key]
    # Maps of a protobuf have no order of their own.
    path.write_bytes(specification.SerializeToString(deterministic=True))
    _write_manifest(package)
    # coremltools moves files out of temporary folders, which their owner alone may read.
    for_files, for_folders = _usual_modes(package)
    for path in package.rglob("*"):
        path.chmod(for_folders if path.is_dir() else for_files)


def _usual_modes(folder: Path) -> tuple[int, int]:
    """Modes of a new file and a new folder: what the user's umask leaves of them.

    The umask itself can only be read by setting it, for all threads.
    """
    inside = folder / ".modes"
    inside.mkdir()
    file = inside / "file"
    file.touch()
    modes = stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(inside.stat().st_mode)
    file.unlink()
    inside.rmdir()
    return modes


def digest(package: Path) -> str:
    """SHA-256 that names a package's content; the measuring program on a phone computes it too.

    Of one line for each file under Data, in the order of their paths: path, colon, its SHA-256.

    Raises:
        ArtifactError: The package holds no files.
    """
    data = package / "Data"
    files = {
        path.relative_to(package).as_posix(): path for path in data.rglob("*") if path.is_file()
    }
    if not files:
        raise ArtifactError(f"{package} is no Core ML package: it holds no files under Data")
    lines = "".join(f"{name}:{file_hash(files[name])}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _write_manifest(package: Path) -> None:
    items = {"model.mlmodel": "CoreML Model Specification"}
    if (package / WEIGHTS).is_dir():
        items["weights"] = "CoreML Model Weights"
    content = digest(package)
    keys = {name: str(uuid.uuid5(_NAMESPACE, f"{content}/{name}")) for name in items}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            keys[name]: {
                "author": "com.apple.CoreML",
                "description": description,
                "name": name,
                "path": f"com.apple.CoreML/{name}",
            }
            for name, description in items.items()
        },
        "rootModelIdentifier": keys["model.mlmodel"],
    }
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def describe(specification: Any, fields: Mapping[str, str], user: Mapping[str, str]) -> None:
    """Write metadata.

    Args:
        specification: A specification's protobuf message.
        fields: Those of author, license, version and short_description that are known.
        user: Entries of our own.
    """
    metadata = specification.description.metadata
    names = {"short_description": "shortDescription", "version": "versionString"}
    for name, value in fields.items():
        setattr(metadata, names.get(name, name), value)
    for name, value in user.items():
        metadata.userDefined[name] = value


def as_classifier(specification: Any, labels: Sequence[str]) -> None:
    """Give a core package's specification class labels.

    The result has the outputs `classLabel`, `classLabel_probs` and `logits`.
    """
    block = _block(specification)
    _add_classify(block, labels)
    del block.outputs[:]
    block.outputs.extend([LABEL, LABEL_PROBABILITIES, LOGITS])
    description = specification.description
    kept = {output.name: output for output in description.output}
    logits = type(kept[LOGITS])()
    logits.CopyFrom(kept[LOGITS])
    logits.shortDescription = "Before the softmax, in the order of the class labels."
    del description.output[:]
    label = description.output.add(name=LABEL, shortDescription="The most probable class.")
    label.type.stringType.SetInParent()
    probabilities = description.output.add(
        name=LABEL_PROBABILITIES, shortDescription="Probability of every class."
    )
    probabilities.type.dictionaryType.stringKeyType.SetInParent()
    description.output.append(logits)
    description.predictedFeatureName = LABEL
    description.predictedProbabilitiesName = LABEL_PROBABILITIES


def _add_classify(block: Any, labels: Sequence[str]) -> None:
    import coremltools

    string = coremltools.proto.MIL_pb2.DataType.STRING
    double = coremltools.proto.MIL_pb2.DataType.FLOAT64
    operation = block.operations.add(type="classify")
    operation.inputs["probabilities"].arguments.add(name=PROBABILITIES)
    classes = operation.inputs["classes"].arguments.add().value
    classes.type.listType.type.tensorType.dataType = string
    classes.type.listType.length.constant.size = len(labels)
    for label in labels:
        _set_string(classes.immediateValue.list.values.add(), label)
    operation.outputs.add(name=LABEL).type.tensorType.dataType = string
    dictionary = operation.outputs.add(name=LABEL_PROBABILITIES).type.dictionaryType
    dictionary.keyType.tensorType.dataType = string
    dictionary.valueType.tensorType.dataType = double
    _set_string(operation.attributes["name"], "classify")


def _set_string(value: Any, text: str) -> None:
    import coremltools

    value.type.tensorType.dataType = coremltools.proto.MIL_pb2.DataType.STRING
    value.immediateValue.tensor.strings.values.append(text)


def as_arrays(package: Path, twin: Path) -> None:
    """Write a package's twin: pixels as an array of float32 in, logits out, no image, no labels.

    The tools that measure on connected devices take and give arrays only. Operations and weights
    are those of the package.

    Args:
        package: What `CoreMLTarget` built.
        twin: Where the twin shall lie; nothing may be there.

    Raises:
        ArtifactError: The package is no classifier of ours.
    """
    if not (package / SPECIFICATION).is_file():
        raise ArtifactError(f"{package} holds no {SPECIFICATION}: build it again")
    shutil.copytree(package, twin)
    edit(twin, lambda specification: _strip(specification, package))


def _strip(specification: Any, package: Path) -> None:
    description, block = specification.description, _block(specification)
    logits = [output for output in description.output if output.name == LOGITS]
    if not logits or len(description.input) != 1 or block.operations[-1].type != "classify":
        raise ArtifactError(f"{package} is no classifier with logits: build it again")
    image = description.input[0].type.imageType
    gray = image.colorSpace in (image.GRAYSCALE, image.GRAYSCALE_FLOAT16)
    shape = (1, 1 if gray else 3, image.height, image.width)
    array = description.input[0].type.multiArrayType  # replaces the image: one of several kinds
    array.shape.extend(shape)
    array.dataType = array.FLOAT32
    description.input[0].shortDescription = "Pixels from 0 to 255."
    del block.operations[-1]
    del block.outputs[:]
    block.outputs.append(LOGITS)
    kept = type(logits[0])()
    kept.CopyFrom(logits[0])
    del description.output[:]
    description.output.append(kept)
    description.predictedFeatureName = description.predictedProbabilitiesName = ""


def _block(specification: Any) -> Any:
    function = specification.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def size(package: Path) -> int:
    """Bytes of all files of a package together."""
    return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())


MODEL = "model.mlpackage"
