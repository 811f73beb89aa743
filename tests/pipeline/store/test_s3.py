"""The store on a real S3 server, on the loopback address; needs the extra `s3-test`."""

from __future__ import annotations

import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import StoreError
from pipeline.scheduler import execute
from pipeline.steps.step import State
from pipeline.store import upkeep
from pipeline.store.shared import Shared
from tests.pipeline.store.toys import NAMES, Machine, digests, planned, require_shared, run

pytest.importorskip("s3fs")
server_module = pytest.importorskip("moto.server")
werkzeug_serving = pytest.importorskip("werkzeug.serving")

pytestmark = pytest.mark.filterwarnings("default")

KEYS = {"key": "visible-id", "secret": "topsecret"}

FAULTS = ("cut", "500", "truncated", "wrong", "slow")


def reset(endpoint: str) -> None:
    """Empty a server: what moto's servers hold belongs to the process."""
    asked = urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")
    urllib.request.urlopen(asked).close()


class Faulty:
    """A WSGI application in front of another, which answers some requests wrongly.

    Args:
        app: The other one.
        draw: Decides which.
        share: Of the requests of data.
    """

    def __init__(self, app: Any, draw: random.Random, share: float) -> None:
        self.app, self.draw, self.share = app, draw, share
        self.met: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.draw.random() >= self.share or environ["PATH_INFO"].startswith("/moto-api"):
            return self.app(environ, start_response)  # type: ignore[no-any-return]
        kind = self.draw.choice(FAULTS)
        self.met.append(kind)
        if kind == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        if kind == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if kind == "slow":
            time.sleep(0.2)
        data = b"".join(self.app(environ, start_response))
        if kind == "truncated":
            data = data[: len(data) // 2]  # of the length that was said already
        if kind == "wrong" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return [data]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, float], tuple[str, Faulty]]]:
    """Starts a server whose answers fail: seed and share in, endpoint and application out."""
    monkeypatch.setattr(execute, "plan", planned)
    started: list[tuple[Any, threading.Thread]] = []

    def start(seed: int, share: float) -> tuple[str, Faulty]:
        app = Faulty(
            server_module.DomainDispatcherApplication(server_module.create_backend_app),
            random.Random(seed),
            share,
        )
        serving = werkzeug_serving.make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        started.append((serving, thread))
        endpoint = f"http://127.0.0.1:{serving.server_port}"
        reset(endpoint)
        return endpoint, app

    yield start
    for serving, thread in started:
        serving.shutdown()
        thread.join()
        serving.server_close()


@pytest.fixture
def endpoint(faulty: Callable[[int, float], tuple[str, Faulty]]) -> str:
    """A server that answers as it should."""
    return faulty(0, 0.0)[0]


def opened(machine: Machine, endpoint: str, *, required: bool = True) -> Shared:
    # The driver shall not wait and ask again: what fails is to be seen.
    once = {"retries": {"max_attempts": 0}}
    options = {**KEYS, "endpoint_url": endpoint, "config_kwargs": once}
    return Shared.open(
        "s3://bucket/care",
        options,
        push=True,
        required=required,
        warn=machine.said.append,
        limit_s=30,
    )


def test_two_machines_share_an_s3_bucket(endpoint: str, tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "first"), Machine(tmp_path / "second")
    require_shared(first, second, lambda machine: opened(machine, endpoint))


def test_a_damaged_object_on_s3_is_not_used(endpoint: str, tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "first"), Machine(tmp_path / "second")
    run(first, opened(first, endpoint))
    store = opened(first, endpoint).entries
    assert store is not None
    for name in store.objects.listed("objects"):
        store.objects.write(name, b"other")
    run(second, opened(second, endpoint))
    assert second.built == list(NAMES)
    assert upkeep.verify(store).problems == ()


def test_twenty_random_faults_of_a_server_change_no_result_and_lose_nothing(
    faulty: Callable[[int, float], tuple[str, Faulty]], tmp_path: Path
) -> None:
    plain = Machine(tmp_path / "plain")
    run(plain, None)
    met: list[str] = []
    for seed in range(40):
        endpoint, app = faulty(seed, 0.15)
        for name in ("first", "second"):
            machine = Machine(tmp_path / f"{name}-{seed}")
            outcome = run(machine, opened(machine, endpoint, required=False))
            assert {result.state for result in outcome.results} == {State.DONE}
            assert digests(machine) == digests(plain)
            assert "topsecret" not in "".join(machine.said)
        # The server answers as it should: what was spoilt is mended by who comes next.
        app.share, met = 0.0, met + app.met
        for name in ("third", "fourth"):
            machine = Machine(tmp_path / f"{name}-{seed}")
            run(machine, opened(machine, endpoint))
            assert digests(machine) == digests(plain)
        assert machine.built == []
        if len(met) >= 20 and set(met) == set(FAULTS):
            break
    assert len(met) >= 20
    assert set(met) == set(FAULTS)


def test_a_server_that_is_gone_is_told_without_keys(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "first")
    with pytest.raises(StoreError, match="s3://bucket/care") as caught:
        opened(machine, "http://127.0.0.1:9")
    assert "topsecret" not in str(caught.value)
