"""A module of ours in a process of its own, and what comes back of its errors."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.errors import BuildError, UnavailableError
from pipeline.stages.own_process import run_worker


def worker(tmp_path: Any, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_worker.py").write_text(f"def main(arguments):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_worker"


def test_a_worker_is_a_process_with_arguments(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = worker(tmp_path, "open(arguments[0], 'w').write(arguments[1])", monkeypatch)
    run_worker(name, str(tmp_path / "out"), "done")
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ("UnavailableError", UnavailableError, "^no such thing$"),
        ("InputError", BuildError, "some_worker failed: no such thing"),
        ("RuntimeError", BuildError, "some_worker failed: RuntimeError: no such thing"),
    ],
)
def test_errors_of_a_worker_come_through(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, error: str, kind: type, words: str
) -> None:
    body = (
        "import builtins; from pipeline.core import errors; "
        f"raise {{**vars(builtins), **vars(errors)}}[{error!r}]('no such thing')"
    )
    with pytest.raises(kind, match=words):
        run_worker(worker(tmp_path, body, monkeypatch))
