"""Reading published checkpoints; reading and writing our own.

    load("CARETrans_S0.pth.tar", model)       # strict: every weight fits, or an error says why not
    state = read("run/last.pt", ema=True)     # just the tensors
    save("model.safetensors", model.state_dict(), {"model": "care_tiny", "num_classes": 10})
    read_metadata("model.safetensors")["model"]

The format is told from a file's content, never from its name. A pickle is read with PyTorch's
restricted unpickler only, so that no checkpoint can run code. A file is read once: what is hashed,
checked and loaded are the same bytes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from care import layouts, zipped
from pipeline.core.checkpoints import (
    METADATA_KEY,
    begins_as_safetensors,
    existing,
    header_of,
    metadata_of,
    stated_metadata,
    unreadable,
)
from pipeline.core.errors import CheckpointError, about
from pipeline.core.inputs import read_input
from pipeline.core.shards import Shards, read_shards
from pipeline.core.words import shown

# Under these keys training programs keep the weights, in order of preference.
STATE_KEYS = ("state_dict", "model", "model_state_dict", "net", "network", "params", "module")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")

# How deep such keys lie in each other: {"model_ema": {"module": {...}, "decay": 0.99}}.
_LEVELS = 3

# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")

# BatchNorm's average of variances: a square root is taken of it.
_VARIANCE = "running_var"

# What torch.optim.swa_utils.AveragedModel counts beside the weights.
_COUNTERS = ("n_averaged",)

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

# How torch.load names what a pickle wants to call.
_UNSAFE = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")

_LARGEST = 8 * 2**30
"""Bytes of a checkpoint: it is read into memory."""
# Numbers that weights are made of; others need scales that a state dict does not name.
_NUMBERS = frozenset(
    (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex32, torch.complex64, torch.complex128),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
)

_MOST_CLASSES = 50_000
_MOST_CHANNELS = 64

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


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    ema: bool = False,
    sha256: str | None = None,
) -> None:
    """Load a checkpoint's weights into `model`, in place; all of them or none.

    Args:
        path: A published `.pth.tar`, a safetensors file, or a training checkpoint of `care.train`.
        model: The model, of the variant and number of classes that the checkpoint was made for.
        ema: Take the moving average of the weights.
        sha256: SHA-256 that the file has to have, in hexadecimal; None for any.

    Raises:
        CheckpointError: The file cannot be read, is another one than the hash says, or a name,
            shape or value does not fit.
    """
    place(read(path, ema=ema, sha256=sha256), model, str(path))


def place(state: dict[str, Tensor], model: nn.Module, where: str) -> None:
    """Put weights that were read into `model`, in place; all of them or none.

    Args:
        state: The weights, under any names that are known.
        model: The model.
        where: Where they come from, for messages.

    Raises:
        CheckpointError: A name, shape or value does not fit.
    """
    with about(where):
        state = layouts.fitting(state, model)
    fit(state, model, where)
    model.load_state_dict(state, strict=True)


def read(
    path: str | os.PathLike[str], *, ema: bool = False, sha256: str | None = None
) -> dict[str, Tensor]:
    """Read a checkpoint's weights, on the CPU, under the names that the model uses.

    Wrapper prefixes (`module.`) are dropped. Complex buffers, as MLLA's published rotations, become
    real ones with a last axis (real, imaginary). For the arguments see `load`.

    Raises:
        CheckpointError: The file is missing, empty, damaged, unsafe or no checkpoint, another one
            than the hash says, or lacks an EMA that was asked for.
    """
    content = read_all(path, sha256=sha256)
    state: dict[str, Tensor] = {}
    for name, value in _select(content, ema, str(path)).items():
        bare = _strip_wrappers(name)
        if bare in state:
            raise CheckpointError(f"{path} holds {shown(bare)} twice: save one network")
        if bare not in _COUNTERS:
            state[bare] = _real(name, value, str(path))
    return state


def read_all(path: str | os.PathLike[str], *, sha256: str | None = None) -> dict[str, Any]:
    """Read all that a checkpoint holds, as `save` was given it (training resumes from this).

    A safetensors file gives `{"state_dict": …, "metadata": …}`; so does an index of several.

    Args:
        path: The file, or the index of several, `model.safetensors.index.json`.
        sha256: SHA-256 that it has to have, in hexadecimal; None for any.

    Raises:
        CheckpointError: The file is missing, empty, damaged, unsafe, no checkpoint, or another one
            than the hash says.
    """
    path = existing(path)
    shards = read_shards(path)
    if shards is not None:
        return _read_shards(shards, sha256)
    data = read_input(path, _LARGEST, CheckpointError, "give the checkpoint file")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise _changed(path)
    return _content(data, path)


def _content(data: bytes, path: Path) -> dict[str, Any]:
    """All that the bytes of a file hold."""
    if not begins_as_safetensors(data):
        return _read_pickle(data, path)
    metadata = metadata_of(header_of(data, path), path)
    try:
        state = safetensors.torch.load(data)
    except Exception as error:  # a header may lie about anything
        raise _damaged(path, error) from error
    return {"state_dict": state, METADATA_KEY: metadata}


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} has changed since this run began: let nothing write to it, and run again"
    )


def _read_shards(shards: Shards, sha256: str | None) -> dict[str, Any]:
    """The weights of a checkpoint in several files, each of which holds what the index says."""
    state: dict[str, Tensor] = {}
    hashes: list[tuple[str, str]] = []
    left = _LARGEST
    for name in shards.files:
        path = shards.path(name)
        data = read_input(path, left, CheckpointError, "give a smaller checkpoint")
        left -= len(data)
        hashes.append((name, hashlib.sha256(data).hexdigest()))
        own = _select(_content(data, existing(path)), False, str(path))
        _require_names(set(own), shards.names(name), path, shards.index)
        state |= own
    if sha256 is not None and shards.hash(hashes) != sha256:
        raise _changed(shards.index)
    return {"state_dict": state, METADATA_KEY: {}}


def _require_names(found: set[str], named: set[str], path: Path, index: Path) -> None:
    """Refuse a shard that holds other tensors than its index says."""
    differing = (("missing", named - found), ("unexpected", found - named))
    problems = [_listing(kind, sorted(names)) for kind, names in differing if names]
    if problems:
        raise CheckpointError(
            f"{path} holds other tensors than {index.name} says: {'; '.join(problems)}: download "
            "both again"
        )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a checkpoint says about itself, without its weights where the format allows.

    Returns:
        What was given to `save`; empty for a checkpoint that was written by another program.

    Raises:
        CheckpointError: The file is missing, empty, damaged, unsafe or no checkpoint.
    """
    path = existing(path)
    stated = stated_metadata(path)
    if stated is not None:
        return stated
    if read_shards(path) is not None:
        return {}  # the files of such checkpoints say nothing of themselves
    metadata = read_all(path).get(METADATA_KEY, {})
    return dict(metadata) if isinstance(metadata, Mapping) else {}


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
    """Check that `state` has exactly the model's names and shapes, and values that can be.

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
        _listing(
            "of another type",
            [
                f"{name} (is {_type(state[name])}, should be {_type(value)})"
                for name, value in expected.items()
                if name in state and _is_narrowed(state[name], value)
            ],
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        hint = _suggest(state)
        raise CheckpointError(
            f"{where} does not fit {_model_name(model)}: {'; '.join([*hint, *found])}"
        )
    # A float64 may be finite and leave float32.
    broken = [
        name for name, value in state.items() if not value.to(expected[name].dtype).isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"{where} holds NaN or infinity {_listing('in', broken)}: the training that made it "
            "diverged, or the file is damaged; use an earlier checkpoint"
        )
    negative = [n for n, value in state.items() if n.endswith(_VARIANCE) and (value < 0).any()]
    if negative:
        raise CheckpointError(
            f"{where} holds variances below zero {_listing('in', negative)}: the file is damaged, "
            "or its weights were changed; copy it again, or use an earlier checkpoint"
        )


def _read_pickle(data: bytes, path: Path) -> dict[str, Any]:
    if zipped.is_zip(data) and (damage := zipped.why_damaged(data, _LARGEST)):
        raise unreadable(path, damage)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            # Either the file can be read all the same, or an error below says more.
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes lead to has no end
        unsafe = _UNSAFE.search(str(error))
        if unsafe is None:
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} was refused: loading it asks for {shown(unsafe[1])}, which could run code; "
            "save only the state dict, or use safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict: it is no checkpoint"
        )
    return content


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # torch.load puts its reason after a page of advice.
    said = str(error)
    if "TorchScript" in said:
        return CheckpointError(
            f"{path} is no checkpoint but a TorchScript program: save the state dict of its module"
        )
    text = said.rpartition("WeightsUnpickler error:")[2].strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    return unreadable(path, reason)


def _select(content: dict[str, Any], ema: bool, where: str) -> dict[str, Tensor]:
    """Find the state dict among what a checkpoint holds."""
    first = EMA_KEYS if ema else STATE_KEYS
    for key in first:
        state = _state_in(content.get(key), _LEVELS)
        if state is not None:
            return state
    if not ema and _is_state(content):
        return content
    keys = ", ".join(shown(key) for key in list(content)[:10]) or "nothing"
    if ema:
        raise CheckpointError(
            f"{where} has no moving average of the weights ({' or '.join(EMA_KEYS)}), it holds "
            f"{keys}: leave ema out"
        )
    raise CheckpointError(
        f"{where} holds no state dict (under {', '.join(STATE_KEYS)}), but {keys}"
    )


def _state_in(candidate: object, levels: int) -> dict[str, Tensor] | None:
    """A state dict, or the one in it under a key of those; None if there is none."""
    if _is_state(candidate):
        return candidate
    if not isinstance(candidate, dict) or not levels:
        return None
    for key in STATE_KEYS:
        state = _state_in(candidate.get(key), levels - 1)
        if state is not None:
            return state
    return None


def _real(name: str, value: Tensor, where: str) -> Tensor:
    """The values of a tensor as plain numbers; complex ones as pairs."""
    if problem := _why_not_plain(value):
        raise CheckpointError(f"{where}: {shown(name)} is {problem}")
    if not value.is_complex():
        return value
    if value.dtype == torch.complex32:
        value = value.to(torch.complex64)
    return torch.view_as_real(value.resolve_conj())


def _why_not_plain(value: Tensor) -> str | None:
    """What kind of tensor it is that a network cannot take; None if it can."""
    if value.is_nested:
        return "a nested tensor: save it padded"
    if value.layout != torch.strided:
        return "a sparse tensor: save it dense, with .to_dense()"
    if value.is_quantized:
        return "a quantized tensor: save the float weights, from before the quantization"
    if value.device.type == "meta":
        return "a tensor without values, on the meta device: save the weights themselves"
    if value.dtype not in _NUMBERS:
        return f"of type {_type(value)}: save it as float32"
    return None


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
    return f"{kind} {', '.join(shown(name) for name in names[:limit])}{more}"


def _shape(value: Tensor) -> str:
    return "x".join(str(length) for length in value.shape) or "a scalar"


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _is_narrowed(value: Tensor, expected: Tensor) -> bool:
    """Whether whole numbers stand where the network has real ones, as quantized weights do."""
    return expected.is_floating_point() and not value.is_floating_point()


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
        if _shapes_of(variant, **options) == shapes:
            return [
                f"this is a checkpoint of {variant}, {options['num_classes']} classes: create that"
            ]
    return []


@functools.lru_cache(64)
def _shapes_of(variant: str, **options: int) -> dict[str, tuple[int, ...]]:
    """Those of a variant, which is made for that: who reads many files asks again and again."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        return _shapes(_create(variant, **options).state_dict().items())


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
    # A file may state any shape: what is made to compare has to stay small.
    if head.shape[0] > _MOST_CLASSES or first.shape[1] > _MOST_CHANNELS:
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
