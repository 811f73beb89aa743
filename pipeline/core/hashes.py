"""Hashes of input files, remembered between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.core.files import file_hash, write_atomically


class HashCache:
    """SHA-256 of input files, remembered as long as size, date and inode stay the same.

    A touched file is hashed again; its hash stays what it was, so nothing is built again.

    Args:
        path: Where the hashes are kept; a missing file only costs time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = {}
        try:
            loaded = json.loads(path.read_text())
        except (OSError, ValueError):
            loaded = {}
        if isinstance(loaded, dict):
            self.known = loaded
        self.changed = False

    @staticmethod
    def is_cache(path: Path) -> bool:
        """Whether a file is such a cache."""
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(loaded, dict) and all(
            isinstance(entry, list) and len(entry) == 4 for entry in loaded.values()
        )

    def hash(self, file: Path) -> str:
        """SHA-256 of a file, in hexadecimal."""
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self.known.get(str(file))
        if not (isinstance(entry, list) and len(entry) == 4 and entry[:3] == stamp):
            entry = self.known[str(file)] = [*stamp, file_hash(file)]
            self.changed = True
        return str(entry[3])

    def save(self) -> None:
        """Write down what was learned.

        Raises:
            ArtifactError: The file is somebody else's, or cannot be written.
        """
        if self.changed:
            write_atomically(self.path, json.dumps(self.known), self.is_cache)
            self.changed = False
