"""What is used in a `with` block and closed at its end."""

from __future__ import annotations

from typing import Self


class Closing:
    """A context manager that gives itself and ends with `close`."""

    def close(self) -> None:
        """Free what is held. Can be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
