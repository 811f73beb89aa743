"""Evaluations of a search, written down as they are made: a search that is killed goes on.

What is kept is known by the graph that was evaluated, its very bytes, so that a search that decides
otherwise this time looks at nothing that was meant for another graph. Beside outcomes of graphs,
measured comparisons of several of them are kept here, each whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError
from pipeline.core.plain import parse_json

if TYPE_CHECKING:
    from calibration.sensitivity import Outcome

MARK = "evaluations of CARE Deploy"
"""First line of the file."""


class Kept:
    """Outcomes, and other plain values, by what was evaluated.

    Args:
        path: A file of lines; None to keep nothing. Its name has to stand for all else that decides
            an outcome, such as the images. A file of somebody else is neither read nor written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, dict[str, Any]] = {}
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
        # A plan loads this module and evaluates nothing.
        from calibration.sensitivity import Outcome

        known = self.get(key)
        if known is not None:
            # Anybody may have edited the file; what is no outcome is made anew.
            with contextlib.suppress(ValueError, TypeError):
                return Outcome(**{name: float(value) for name, value in known.items()})
        found = evaluate()
        self.put(key, asdict(found))
        return found

    def get(self, key: str) -> Mapping[str, Any] | None:
        """Plain values that were kept, as the file has them; None where there are none.

        Args:
            key: Hash of all that decides them.
        """
        return self._values.get(key)

    def put(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep plain values, in a line of their own.

        Args:
            key: Hash of all that decides them.
            values: What JSON can hold.
        """
        self._values[key] = dict(values)
        self._append({"key": key, **values})

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
                self._values[values.pop("key")] = values

    def _append(self, values: Mapping[str, Any]) -> None:
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
