"""Ranges kept on disk, valid for exactly one graph, set of images, preprocessing and method.

key = CacheKey.of(model, hashes, network.preprocess, method, scheme)
table, note = cached(path, key, lambda: make_table(observe(model, images), …))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from calibration.ranges import PERCENTILE, Method, Scheme
from calibration.table import Table
from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.files import digest_of, file_hash, refuse_foreign_file, write_atomically

KIND = "calibration ranges"
FORMAT = 1

_MEANINGS = {
    "graph": "another graph",
    "images": "other calibration images",
    "preprocess": "another preprocessing",
    "method": "another method",
}


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the ranges.

    Attributes:
        graph: SHA-256 of the graph's file.
        images: SHA-256 over the hashes of the calibration images, in order.
        preprocess: SHA-256 over the preprocessing specification.
        method: Method and scheme, readable.
    """

    graph: str
    images: str
    preprocess: str
    method: str

    @classmethod
    def of(
        cls,
        model: Path,
        hashes: Sequence[str],
        preprocess: Mapping[str, Any],
        method: Method,
        scheme: Scheme,
        percentile: float = PERCENTILE,
        tensors: Sequence[str] | None = None,
    ) -> CacheKey:
        """The key of a calibration.

        Args:
            model: File of the float32 graph.
            hashes: SHA-256 of every calibration image.
            preprocess: Plain values of the preprocessing specification.
            method: How ranges are chosen.
            scheme: What they are chosen for.
            percentile: Percent of values that the percentile method keeps.
            tensors: Which tensors; None for all.
        """
        parts = [str(method), str(scheme.dtype), "symmetric" if scheme.symmetric else "asymmetric"]
        parts += ["narrow"] if scheme.narrow else []
        parts += [f"{percentile:g} %"] if method is Method.PERCENTILE else []
        parts += [f"tensors {digest_of(sorted(tensors))[:16]}"] if tensors is not None else []
        return cls(
            file_hash(model), digest_of(list(hashes)), digest_of(dict(preprocess)), ", ".join(parts)
        )


def write(path: Path, key: CacheKey, table: Table) -> None:
    """Write ranges, atomically.

    Raises:
        ArtifactError: The file is somebody else's, or the folder cannot be written.
    """
    plain = {"kind": KIND, "format": FORMAT, "key": asdict(key), **table.to_dict()}
    write_atomically(path, json.dumps(plain, indent=1) + "\n", _is_ours)


def read(path: Path, key: CacheKey) -> Table:
    """Read ranges that were made for exactly this key.

    Raises:
        ArtifactError: There are none; they were made from something else, which the message names;
            they come from another program or version; or the file is damaged.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"there are no ranges at {path}: calibrate first") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: calibrate again") from error
    if not isinstance(plain, dict) or plain.get("kind") != KIND:
        raise ArtifactError(
            f"{path} holds something other than calibration ranges: calibrate again"
        )
    if plain.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {plain.get('format')}, this version reads {FORMAT}: calibrate again"
        )
    try:
        made_from = CacheKey(**plain["key"])
        table = Table.from_dict(plain)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: calibrate again") from error
    except DataError as error:
        raise ArtifactError(f"{path} is damaged ({error}): calibrate again") from error
    _compare(path, made_from, key)
    return table


def _is_ours(path: Path) -> bool:
    """Whether a file holds ranges, of whatever format and made from whatever."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and plain.get("kind") == KIND


def _compare(path: Path, made_from: CacheKey, key: CacheKey) -> None:
    different = [f.name for f in fields(key) if getattr(made_from, f.name) != getattr(key, f.name)]
    if not different:
        return
    reasons = " and ".join(_MEANINGS[name] for name in different)
    if different == ["method"]:
        reasons += f" ({made_from.method}, not {key.method})"
    raise ArtifactError(f"{path} was made from {reasons}: calibrate again")


def cached(path: Path, key: CacheKey, make: Callable[[], Table]) -> tuple[Table, str]:
    """Ranges from the cache, or made anew and written there.

    Args:
        path: The cache.
        key: What the ranges are for.
        make: Makes them.

    Returns:
        The ranges, and where they come from: a line for the log file that, where the cache was
        not used, says why.

    Raises:
        ArtifactError: The file is somebody else's, or cannot be written. Whatever `make` raises
            passes through.
    """
    refuse_foreign_file(path, _is_ours)
    try:
        return read(path, key), f"ranges reused from {path}"
    except ArtifactError as error:
        note = f"calibrated: {error}"
    table = make()
    write(path, key, table)
    return table, note
