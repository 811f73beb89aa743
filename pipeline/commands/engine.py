"""What can be known of a TensorRT engine without its GPU: what whoever built it wrote beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.api.model import Answering, load
from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.files import file_hash
from pipeline.report.text import size as in_megabytes
from pipeline.steps.artifact import MANIFEST, Artifact

ENDINGS = (".engine", ".plan", ".trt")
"""What engines' files are called."""

_MAGIC = {
    b"vtrt": "an engine of TensorRT-RTX",
    b"ftrt": "an engine of TensorRT",
    b"ptrt": "an engine of TensorRT",
}
"""First bytes of engines, as the libraries write them."""

_TOLD = ("library_version", "cuda_major", "compute_capabilities", "batches")
_LARGEST_HEAD = 4


def look(path: Path) -> tuple[str, dict[str, Any]]:
    """Size, hash and, from the artifact in which it lies, library, input, output and layers.

    Args:
        path: The engine.

    Returns:
        Lines for people, and the same for JSON.

    Raises:
        InputError: It is no engine, or nobody wrote down what is in it.
        ArtifactError: The artifact in which it lies is damaged, or it is not the artifact's.
    """
    kind, artifact = _found(path)
    return _told(path, kind, artifact)


def is_engine(path: str | Path) -> bool:
    """Whether a path is called as engines are."""
    return Path(path).suffix.lower() in ENDINGS


def open_engine(path: Path, threads: int | None = None) -> Answering:
    """Open an engine to ask it, by what its artifact's folder says of images and classes.

    Where this machine cannot run it, the executor answers that stands for it.

    Raises:
        InputError: It is no engine, or nobody wrote down what it takes.
        ArtifactError: The artifact in which it lies is damaged, or it is not the artifact's.
        UnavailableError: This machine can neither run nor emulate it.
    """
    _, artifact = _found(path)
    return load(artifact.folder, threads=threads)


def _found(path: Path) -> tuple[str, Artifact]:
    """What an engine's first bytes say it is, and the artifact whose engine it is.

    Raises:
        InputError, ArtifactError: See `look`.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: name an engine")
    with path.open("rb") as stream:
        head = stream.read(_LARGEST_HEAD)
    kind = _MAGIC.get(head, "of no library that is known")
    folder = path.absolute().parent
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{path} is {kind}, and says nothing of itself: only the TensorRT that built it opens "
            "it, on a GPU that it was built for. Take the ONNX graph that it was built from, or "
            f"the engine in its artifact's folder, whose {MANIFEST} tells"
        )
    artifact = Artifact.read(folder)
    record = artifact.files.get(path.name)
    if record is None or record.sha256 != file_hash(path):
        raise ArtifactError(f"{path} is not the engine that {artifact.folder} says: fetch it again")
    return kind, artifact


def _told(path: Path, kind: str, artifact: Artifact) -> tuple[str, dict[str, Any]]:
    record, facts = artifact.files[path.name], artifact.facts
    plain = {
        "file": str(path),
        "kind": kind,
        "sha256": record.sha256,
        "bytes": record.size,
        "precision": facts.get("precision"),
        "input": facts.get("input"),
        "output": facts.get("output"),
        **{name: facts.get(name) for name in _TOLD},
        "layers": facts.get("layers"),
        "labels": len(artifact.network().labels),
    }
    lines = [f"{path}: {kind}, {in_megabytes(record.size)}, {plain['precision']}"]
    lines += [f"takes {_port(plain['input'])}", f"gives {_port(plain['output'])}"]
    lines += [f"{name.replace('_', ' ')}: {_plain(plain[name])}" for name in _TOLD]
    layers = plain["layers"]
    if isinstance(layers, dict):
        lines.append(f"layers: {_plain({k: v for k, v in layers.items() if k != 'list'})}")
    lines.append(
        "from what was written down when it was built: only that library opens it, on such a GPU; "
        "python -m pipeline diff --target trt says what its values are"
    )
    return "\n".join(lines), plain


def _port(port: Any) -> str:
    if not isinstance(port, dict):
        return "unknown"
    shape = ", ".join("any" if side == -1 else str(side) for side in port.get("shape", ()))
    return f"{port.get('name')}: {port.get('dtype')} ({shape})"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
