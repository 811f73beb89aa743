"""Evaluations of a search, written down as they are made: a search that is killed goes on.

What is kept is known by the graph that was evaluated, its very bytes, so that a search that decides
otherwise this time looks at nothing that was meant for another graph.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibration.sensitivity import Outcome
from pipeline.core.errors import ArtifactError
from pipeline.core.plain import parse_json

MARK = "evaluations of CARE Deploy"
"""First line of the file."""


class Kept:
    """Outcomes by what was evaluated.

    Args:
        path: A file of lines; None to keep nothing. Its name has to stand for all else that decides
            an outcome, such as the images. A file of somebody else is neither read nor written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.known: dict[str, Outcome] = {}
        if path is not None and path.exists():
            self._read(path)

    @staticmethod
    def is_ours(path: Path) -> bool:
        """Whether a file holds evaluations of a search."""
        with path.open("rb") as stream:
            return stream.readline(100).rstrip(b"\n") == MARK.encode()

    def outcome(self, key: str, evaluate: Callable[[], Outcome]) -> Outcome:
        """What is known of a graph, or else what its evaluation gives, which is then kept.

        Args:
            key: Hash of the graph.
            evaluate: Evaluates it.
        """
        if key not in self.known:
            self.known[key] = evaluate()
            self._append({"key": key, **asdict(self.known[key])})
        return self.known[key]

    def _read(self, path: Path) -> None:
        try:
            first, *lines = path.read_text().splitlines()
        except (OSError, ValueError):
            first, lines = "", []
        if first != MARK:
            self.path = None
            return
        for line in lines:
            # The last line may have been cut off by what ended the search.
            with contextlib.suppress(
                ArtifactError, ValueError, TypeError, KeyError, AttributeError
            ):
                values: Any = parse_json(line.encode(), "an evaluation")
                key = values.pop("key")
                self.known[key] = Outcome(**{k: float(v) for k, v in values.items()})

    def _append(self, values: dict[str, object]) -> None:
        if self.path is None:
            return
        # What cannot be kept costs time later, and is no reason to end now.
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with self.path.open("a") as stream:
                # Each begins a line of its own, also after one that was cut off.
                stream.write(f"{MARK}\n" if is_new else "\n")
                stream.write(json.dumps(values))

    def forget(self) -> None:
        """Remove the file: the search is over."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()
