"""Saved Core AI assets: the same bytes every time, what they say of themselves, and damage.

An asset is a folder: `main.mlirb` is the program with its weights, `main.hash` the SHA-256 of it,
`metadata.json` what it says of itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Network
from pipeline.core.plain import read_json
from pipeline.steps.keys import versions
from pipeline.targets.coreai.program import Program, read

MODEL = "model.aimodel"
BYTECODE, HASH, METADATA = "main.mlirb", "main.hash", "metadata.json"
PACKAGES = ("coreai-core", "coreai-torch", "coreai-opt")

_FILES = {BYTECODE, HASH, METADATA}
_EPOCH = 0.0
_MOST_METADATA = 10_000_000
_OWN = "care-deploy"
"""Key of our own metadata."""


def save(program: Any, network: Network, precision: str, package: Path) -> None:
    """Save a program with labels, preprocessing and digest in its metadata.

    Args:
        program: A `coreai.authoring.AIProgram` with canonical names.
        network: What it says of itself.
        precision: Name of the precision.
        package: Where it shall lie.
    """
    asset = program.save_asset(package)
    content = digest(package)
    about = network.description

    def describe(metadata: Any) -> None:
        # The day of a build must not change its bytes.
        metadata.creation_date = _EPOCH
        metadata.author = about.get("author", "")
        metadata.license = about.get("license", "")
        metadata.model_description = about.get(
            "short_description", f"{network.name}, {precision}: image classifier"
        )
        own = {
            "name": network.name,
            "precision": precision,
            "digest": content,
            "labels": json.dumps(list(network.labels), ensure_ascii=False),
            "preprocessing": json.dumps(dict(network.preprocess), sort_keys=True),
            **dict(sorted(about.items())),
        }
        for key, value in own.items():
            metadata.set_custom(f"{_OWN}.{key}", value)

    asset.update_metadata(describe)
    _write_in_order(package / METADATA)
    for path in package.iterdir():
        path.chmod(0o644)


def _write_in_order(path: Path) -> None:
    """The package writes keys in an order of its own, which changes."""
    values = read_json(path)
    path.write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def digest(package: Path) -> str:
    """SHA-256 that names an asset's program; the measuring program on a phone computes it too.

    Raises:
        ArtifactError: There is no program.
    """
    return hashlib.sha256(_bytes(package, BYTECODE)).hexdigest()


def size(package: Path) -> int:
    """Bytes of all files together."""
    return sum(path.stat().st_size for path in package.iterdir())


def metadata(package: Path) -> dict[str, Any]:
    """What an asset says of itself: our own entries, without their prefix.

    Raises:
        ArtifactError: It cannot be read, or is not one of ours.
    """
    try:
        values = read_json(package / METADATA, ArtifactError, _MOST_METADATA)
        entries = values.get("creatorDefinedMetadata", {})
        own = {
            key.removeprefix(f"{_OWN}."): value
            for key, value in entries.items()
            if key.startswith(f"{_OWN}.")
        }
    except (ArtifactError, AttributeError) as error:
        raise ArtifactError(f"{package / METADATA} is damaged ({error}): build it again") from error
    if not own:
        raise ArtifactError(f"{package} was not built by this program: it names no labels")
    return own


def check(package: Path, network: Network) -> Program:
    """Read an asset of ours, and refuse what is damaged or foreign.

    The compiler's reader of bytecode is not made for damaged files, so that hashes come first.

    Args:
        package: The asset's folder.
        network: The network that it has to be.

    Returns:
        Its program.

    Raises:
        ArtifactError: It is damaged, foreign, or another network.
    """
    if not package.is_dir():
        raise ArtifactError(f"{package} is no Core AI asset: it is no folder; build it again")
    present = {path.name for path in package.iterdir()}
    if missing := sorted(_FILES - present):
        raise ArtifactError(
            f"{package} is no Core AI asset: it holds no {missing[0]}; build it again"
        )
    found = digest(package)
    if _bytes(package, HASH).hex() != found:
        raise ArtifactError(f"{package / BYTECODE} is damaged, or of another asset: build it again")
    said = metadata(package)
    if said.get("digest") != found:
        raise ArtifactError(f"{package / METADATA} is of another program: build it again")
    if said.get("labels") != json.dumps(list(network.labels), ensure_ascii=False):
        raise ArtifactError(f"{package} has other labels than {network.name}: build it again")
    program = read(package / BYTECODE)
    shape = (1, *network.input_shape)
    inputs = [(name, kind.shape) for name, _, kind in program.main.inputs]
    if inputs != [("image", shape)] or [name for name, _ in program.main.outputs] != ["logits"]:
        raise ArtifactError(
            f"{package} takes {inputs} where an image of shape {shape} was built: build it again"
        )
    return program


def _bytes(package: Path, name: str) -> bytes:
    try:
        return (package / name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{package} is no Core AI asset: {error}") from error


def producers() -> dict[str, str]:
    """Versions of the packages that make assets."""
    return versions(*PACKAGES, "torch")
