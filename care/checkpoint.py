"""Reading published checkpoints; reading and writing our own.

    load("CARETrans_S0.pth.tar", model)       # strict: every weight fits, or an error says why not
    state = read("run/last.pt", ema=True)     # just the tensors
    save("model.safetensors", model.state_dict(), {"model": "care_tiny", "num_classes": 10})
    read_metadata("model.safetensors")["model"]

The format is told from a file's content, never from its name. A pickle is read with PyTorch's
restricted unpickler only, so that no checkpoint can run code.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError

# Under these keys training programs keep the weights, in order of preference.
STATE_KEYS = ("state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")
METADATA_KEY = "metadata"

# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")

# Plain data that training programs keep beside the weights (timm: its arguments, the best metric);
# none of it runs code.
_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]  # its function is private by name
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]

# How a damaged archive or pickle surfaces in torch.load.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
)
# How torch.load names what a pickle wants to call.
_UNSAFE = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")

_VARIANTS = ("care_s0", "care_s1", "care_s2", "care_tiny", "mlla_t")
_ASSETS = Path(__file__).parent / "assets"
_EMBEDDED = {"care_tiny": "care_tiny.safetensors"}


def embedded(variant: str = "care_tiny") -> Path | None:
    """Path of the trained checkpoint that this package carries, or None where it carries none.

    Raises:
        CheckpointError: The package should carry it, but the file is missing.
    """
    if variant not in _EMBEDDED:
        return None
    path = _ASSETS / _EMBEDDED[variant]
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: reinstall the package, or train it with "
            f"python -m care.train --config configs/train_{variant}.yaml"
        )
    return path


def load(path: str | os.PathLike[str], model: nn.Module, *, ema: bool = False) -> None:
    """Load a checkpoint's weights into `model`, in place; all of them or none.

    Args:
        path: A published `.pth.tar`, a safetensors file, or a training checkpoint of `care.train`.
        model: The model, of the variant and number of classes that the checkpoint was made for.
        ema: Take the moving average of the weights.

    Raises:
        CheckpointError: The file cannot be read, or a name or shape does not fit.
    """
    state = read(path, ema=ema)
    fit(state, model, str(path))
    model.load_state_dict(state, strict=True)


def read(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's weights, on the CPU, under the names that the model uses.

    Wrapper prefixes (`module.`) are dropped. Complex buffers, as MLLA's published rotations, become
    real ones with a last axis (real, imaginary).

    Raises:
        CheckpointError: The file is missing, empty, damaged, unsafe or no checkpoint, or lacks an
            EMA that was asked for.
    """
    content = read_all(path)
    state = _select(content, ema, str(path))
    return {
        _strip_wrappers(name): torch.view_as_real(value) if value.is_complex() else value
        for name, value in state.items()
    }


def read_all(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all that a checkpoint holds, as `save` was given it (training resumes from this).

    A safetensors file gives `{"state_dict": …, "metadata": …}`.

    Raises:
        CheckpointError: The file is missing, empty, damaged, unsafe or no checkpoint.
    """
    path = _existing(path)
    if _is_safetensors(path):
        try:
            state = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from error
        return {"state_dict": state, METADATA_KEY: read_metadata(path)}
    return _read_pickle(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a checkpoint says about itself, without its weights where the format allows.

    Returns:
        What was given to `save`; empty for a checkpoint that was written by another program.

    Raises:
        CheckpointError: The file is missing, empty, damaged, unsafe or no checkpoint.
    """
    path = _existing(path)
    if not _is_safetensors(path):
        metadata = _read_pickle(path).get(METADATA_KEY, {})
        return dict(metadata) if isinstance(metadata, Mapping) else {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stated = file.metadata() or {}
        return dict(json.loads(stated.get(METADATA_KEY, "{}")))
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint: whole and flushed to the disk, or not at all.

    Args:
        path: Its suffix chooses the format: `.safetensors`, anything else is PyTorch's own.
        state: A model's state dict; for a training checkpoint, named parts such as
            `{"model": …, "model_ema": …, "optimizer": …, "epoch": 3}`.
        metadata: What the checkpoint says about itself, in JSON's types: model, num_classes,
            preprocess, labels, …

    Raises:
        CheckpointError: The file cannot be written, or the metadata is not JSON.
    """
    path = Path(path)
    try:
        described = json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"metadata of {path} is not JSON: {error}") from error
    flat = bool(state) and all(isinstance(value, Tensor) for value in state.values())
    if path.suffix == ".safetensors":
        if not flat:
            raise CheckpointError(
                f"{path}: safetensors holds tensors only; save a training checkpoint as .pt"
            )
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        header = {"format": "pt", METADATA_KEY: json.dumps(described, sort_keys=True)}
        content = safetensors.torch.save(tensors, header)
        _write_atomically(path, lambda file: file.write(content))
        return
    parts = {"state_dict": dict(state)} if flat else dict(state)
    _write_atomically(path, lambda file: torch.save({**parts, METADATA_KEY: described}, file))


def fit(state: dict[str, Tensor], model: nn.Module, where: str) -> None:
    """Check that `state` has exactly the model's names and shapes, and finite values.

    BatchNorm's `num_batches_tracked` counters, which nothing computes with and some tools drop, are
    added to `state` from the model where it lacks them.

    Raises:
        CheckpointError: Lists the first ten names of each kind of mismatch, and how many more.
    """
    expected = model.state_dict()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, value)
    problems = [
        _listing("missing", [name for name in expected if name not in state]),
        _listing("unexpected", [name for name in state if name not in expected]),
        _listing(
            "misshapen",
            [
                f"{name} (is {_shape(state[name])}, should be {_shape(value)})"
                for name, value in expected.items()
                if name in state and state[name].shape != value.shape
            ],
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        hint = _suggest(state)
        raise CheckpointError(
            f"{where} does not fit {_model_name(model)}: {'; '.join([*hint, *found])}"
        )
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(
            f"{where} holds NaN or infinity {_listing('in', broken)}: the training that made it "
            "diverged, or the file is damaged; use an earlier checkpoint"
        )


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file in it")
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: check the path")
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes): copy or download it again")
        with path.open("rb"):
            return path
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with the length of its JSON header, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            # Either the file can be read all the same, or the error below says more.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        unsafe = _UNSAFE.search(str(error))
        if unsafe is None:
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} was refused: loading it asks for {unsafe[1]}, which could run code; save only "
            "the state dict, or use safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict: it is no checkpoint"
        )
    return content


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # torch.load puts its reason after a page of advice.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    return CheckpointError(
        f"{path} is no checkpoint, or truncated or corrupt ({reason[:120]}): copy or download it "
        "again"
    )


def _select(content: dict[str, Any], ema: bool, where: str) -> dict[str, Tensor]:
    """Find the state dict among what a checkpoint holds."""
    for key in EMA_KEYS if ema else STATE_KEYS:
        candidate = content.get(key)
        if _is_state(candidate):
            return candidate
    if not ema and _is_state(content):
        return content
    keys = ", ".join(str(key) for key in list(content)[:10]) or "nothing"
    if ema:
        raise CheckpointError(
            f"{where} has no moving average of the weights ({' or '.join(EMA_KEYS)}), it holds "
            f"{keys}: leave ema out"
        )
    raise CheckpointError(
        f"{where} holds no state dict under {' or '.join(STATE_KEYS)}, but {keys}"
    )


def _is_state(candidate: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(candidate, dict)
        and bool(candidate)
        and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items()
        )
    )


def _strip_wrappers(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _listing(kind: str, names: list[str], limit: int = 10) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{kind} {', '.join(names[:limit])}{more}"


def _shape(value: Tensor) -> str:
    return "x".join(str(length) for length in value.shape) or "a scalar"


def _model_name(model: nn.Module) -> str:
    stated = getattr(model, "pretrained_cfg", None) or {}
    return str(stated.get("architecture") or type(model).__name__)


def _suggest(state: Mapping[str, Tensor]) -> list[str]:
    """Name the variant whose shapes `state` has, if one does."""
    shapes = _shapes(state.items())
    for variant in _VARIANTS:
        options = _options(variant, state)
        if options is None:
            continue
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            candidate = _create(variant, **options)
        if _shapes(candidate.state_dict().items()) == shapes:
            return [
                f"this is a checkpoint of {variant}, {options['num_classes']} classes: create that"
            ]
    return []


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors if not k.endswith("num_batches_tracked")}


def _options(variant: str, state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Number of classes and of input channels of a checkpoint, if it can be one of `variant`."""
    import timm

    stated = timm.get_pretrained_cfg(variant)
    classifier = stated.classifier if isinstance(stated.classifier, str) else stated.classifier[0]
    head, first = state.get(f"{classifier}.weight"), state.get(f"{stated.first_conv}.weight")
    if head is None or first is None or head.ndim != 2 or first.ndim != 4:
        return None
    return {"num_classes": head.shape[0], "in_chans": first.shape[1]}


def _create(variant: str, **options: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(variant, **options)
    return model


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the target, flush to the disk, then move into place.

    A crash leaves the old file or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be a folder: {error.strerror}") from error
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
