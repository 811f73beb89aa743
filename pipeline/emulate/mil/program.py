"""Reading a saved Core ML package: what its ML Program says, without Core ML and without a Mac.

A package is a folder with `Manifest.json`, the specification (a protobuf) and a weight file:

    model.mlpackage/
      Manifest.json                        names the specification among the package's items
      Data/com.apple.CoreML/model.mlmodel  the specification: interface, metadata, the program
      Data/com.apple.CoreML/weights/weight.bin

The generated protobuf classes come from coremltools, but not through `import coremltools`, which
takes several seconds: loaded alone they take about 25 ms. Both ways can be used in one process.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pipeline.core.errors import ArtifactError
from pipeline.core.plain import read_json
from pipeline.emulate.mil.constants import ConstantReader, TensorType, Value, tensor_type

_COLOURS = {10: "GRAYSCALE", 20: "RGB", 30: "BGR", 40: "GRAYSCALE_FLOAT16"}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the program.

    Attributes:
        type: Its name in the MIL operation set, such as `conv`.
        line: Its position among the operations of its function, constants included, from 1.
        inputs: For each parameter, the names of values or the constants themselves.
        outputs: Names and types of the results.
    """

    type: str
    line: int
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, TensorType], ...]

    @property
    def where(self) -> str:
        """How messages name this operation."""
        results = ", ".join(name for name, _ in self.outputs)
        return f"operation '{self.type}' (line {self.line} of the program, result '{results}')"


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant that is written at its use."""

    value: Value


@dataclass(frozen=True, slots=True)
class Feature:
    """An input or output of the model as its interface describes it.

    Attributes:
        name: The feature's name.
        kind: An image, an array of numbers, or what a classifier answers.
        shape: Default shape; (channels, height, width) of an image, () where it has none.
        colour: RGB, BGR, GRAYSCALE or GRAYSCALE_FLOAT16 of an image, else empty.
    """

    name: str
    kind: Literal["image", "array", "label", "dictionary"]
    shape: tuple[int, ...] = ()
    colour: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """The main function of a package's ML Program, and the model's interface.

    Attributes:
        package: The folder.
        specification: Specification version: 7 for iOS 16, 8 for 17, 9 for 18.
        operations: In order of evaluation, constants included.
        constants: Values of the `const` operations, by name.
        arguments: Names and types of the function's inputs.
        results: Names of the function's outputs.
        inputs: The interface's inputs.
        outputs: The interface's outputs.
        labels: A classifier's class labels, else empty.
        label_output: Name of the classifier's answer, else empty.
        probabilities_output: Name of the classifier's dictionary of probabilities, else empty.
        metadata: author, license, version, description and the user-defined entries.
    """

    package: Path
    specification: int
    operations: tuple[Operation, ...]
    constants: Mapping[str, Value]
    arguments: tuple[tuple[str, TensorType], ...]
    results: tuple[str, ...]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    labels: tuple[str, ...] = ()
    label_output: str = ""
    probabilities_output: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def in_float16(self) -> set[str]:
        """Names of the results that are of type float16."""
        outputs = (output for operation in self.operations for output in operation.outputs)
        return {name for name, kind in outputs if kind.dtype == "FLOAT16"}


def read_program(package: Path) -> Program:
    """Read a saved `.mlpackage`.

    Args:
        package: The package's folder.

    Raises:
        ArtifactError: No package, a foreign or older kind of model, a weight file that is missing,
            cut off or does not fit the program, or class labels that do not fit the probabilities.
        UnsupportedOperatorError: The program holds a constant of a kind that cannot be read.
    """
    package = Path(package)
    path = _specification_path(package)
    model = _parse(path)
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise ArtifactError(
            f"{package}: this is a Core ML model of kind '{kind}', not an ML Program; convert it"
            " with convert_to='mlprogram' and a deployment target of iOS 16 or later"
        )
    function = _main_function(model, package)
    if function.opset not in function.block_specializations:
        raise ArtifactError(f"{package}: the program has no operations for '{function.opset}'")
    block = function.block_specializations[function.opset]
    reader = ConstantReader(path.parent)
    description = _description(model)
    constants, operations = _read_operations(block, reader)
    program = Program(
        package=package,
        specification=model.specificationVersion,
        operations=operations,
        constants=constants,
        arguments=tuple((entry.name, tensor_type(entry.type)) for entry in function.inputs),
        results=tuple(block.outputs),
        inputs=tuple(_feature(entry) for entry in description.input),
        outputs=tuple(_feature(entry) for entry in description.output),
        labels=_labels(operations, constants),
        label_output=description.predictedFeatureName,
        probabilities_output=description.predictedProbabilitiesName,
        metadata=_metadata(model.description.metadata),
    )
    _check_labels(program)
    return program


def _specification_path(package: Path) -> Path:
    """Find the specification as the manifest names it."""
    manifest = package / "Manifest.json"
    if not manifest.is_file():
        what = "there is no such folder" if not package.exists() else "it has no Manifest.json"
        raise ArtifactError(f"{package} is not a Core ML package: {what}; name an .mlpackage")
    try:
        content = read_json(manifest)
        item = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        path = package / "Data" / str(item)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{manifest} does not name the package's model ({type(error).__name__}: {error})"
        ) from error
    if not path.is_file():
        raise ArtifactError(f"{package} is incomplete: {path} is missing; copy the whole package")
    return path


def _parse(path: Path) -> Any:
    message = importlib.import_module(f"{_protobuf_package().__name__}.Model_pb2").Model()
    try:
        message.ParseFromString(path.read_bytes())
    except importlib.import_module("google.protobuf.message").DecodeError as error:
        raise ArtifactError(
            f"{path} is not a Core ML specification, or is cut off ({error}); copy it again"
        ) from error
    return message


def _protobuf_package() -> ModuleType:
    """Load coremltools' generated protobuf classes without running coremltools itself."""
    name = "_coremltools_protobuf"
    if name not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise ArtifactError("reading a Core ML package needs coremltools: pip install it")
        package = ModuleType(name, "coremltools.proto under another name")
        package.__path__ = [str(Path(next(iter(found.submodule_search_locations))) / "proto")]
        sys.modules[name] = package
    return sys.modules[name]


def _description(model: Any) -> Any:
    """The interface of the default function, which multi-function packages describe apart."""
    description = model.description
    for function in description.functions:
        if function.name == (description.defaultFunctionName or "main"):
            return function
    return description


def _main_function(model: Any, package: Path) -> Any:
    functions = model.mlProgram.functions
    name = model.description.defaultFunctionName or "main"
    if name not in functions:
        raise ArtifactError(
            f"{package}: the program has no function '{name}', only {sorted(functions)}"
        )
    return functions[name]


def _read_operations(
    block: Any, reader: ConstantReader
) -> tuple[dict[str, Value], tuple[Operation, ...]]:
    constants: dict[str, Value] = {}
    operations = []
    for line, message in enumerate(block.operations, start=1):
        outputs = tuple((entry.name, tensor_type(entry.type)) for entry in message.outputs)
        if message.type == "const":
            name = outputs[0][0]
            constants[name] = reader.read(message.attributes["val"], name)
        inputs = dict(_inputs(message, reader)) if message.type != "const" else {}
        operations.append(Operation(message.type, line, inputs, outputs))
    return constants, tuple(operations)


def _inputs(
    message: Any, reader: ConstantReader
) -> Iterator[tuple[str, tuple[str | Constant, ...]]]:
    """The operation's inputs, and those attributes which are parameters under iOS 16 and 17."""
    where = message.outputs[0].name if message.outputs else message.type
    for parameter, argument in message.inputs.items():
        yield (
            parameter,
            tuple(
                binding.name
                if binding.WhichOneof("binding") == "name"
                else Constant(reader.read(binding.value, f"{where}.{parameter}"))
                for binding in argument.arguments
            ),
        )
    if message.type.startswith("constexpr_"):
        for parameter, value in message.attributes.items():
            if parameter != "name":
                yield parameter, (Constant(reader.read(value, f"{where}.{parameter}")),)


def _feature(entry: Any) -> Feature:
    kind = entry.type.WhichOneof("Type")
    if kind == "imageType":
        image = entry.type.imageType
        colour = _COLOURS.get(image.colorSpace, "")
        channels = 1 if colour.startswith("GRAYSCALE") else 3
        shape = (channels, int(image.height), int(image.width))
        return Feature(entry.name, "image", shape, colour)
    if kind == "multiArrayType":
        return Feature(entry.name, "array", tuple(entry.type.multiArrayType.shape))
    return Feature(entry.name, "dictionary" if kind == "dictionaryType" else "label")


def _metadata(metadata: Any) -> dict[str, str]:
    fixed = {
        "description": metadata.shortDescription,
        "version": metadata.versionString,
        "author": metadata.author,
        "license": metadata.license,
    }
    return {**{key: value for key, value in fixed.items() if value}, **metadata.userDefined}


def _classifier(operations: tuple[Operation, ...]) -> Operation | None:
    return next((op for op in reversed(operations) if op.type == "classify"), None)


def _labels(operations: tuple[Operation, ...], constants: Mapping[str, Value]) -> tuple[str, ...]:
    """The labels that the program's `classify` operation names, as strings."""
    classifier = _classifier(operations)
    if classifier is None:
        return ()
    (classes,) = classifier.inputs["classes"]
    value = classes.value if isinstance(classes, Constant) else constants.get(classes)
    if value is None or isinstance(value, str):
        raise ArtifactError(f"{classifier.where}: its class labels are not a constant list")
    return tuple(str(label) for label in value)


def _check_labels(program: Program) -> None:
    classifier = _classifier(program.operations)
    if classifier is None:
        return
    (probabilities,) = classifier.inputs["probabilities"]
    types = {name: kind for op in program.operations for name, kind in op.outputs}
    kind = types.get(probabilities) if isinstance(probabilities, str) else None
    classes = kind.shape[-1] if kind is not None and kind.shape else None
    if classes is not None and classes != len(program.labels):
        raise ArtifactError(
            f"{program.package}: {len(program.labels)} class labels for {classes} probabilities;"
            " build the package with the label list of its model"
        )
