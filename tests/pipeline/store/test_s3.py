"""The store on a real S3 server, on the loopback address; needs the extra `s3-test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import StoreError
from pipeline.scheduler import execute
from pipeline.store import upkeep
from pipeline.store.shared import Shared
from tests.pipeline.store.toys import NAMES, Machine, digests, planned, run

pytest.importorskip("s3fs")
server_module = pytest.importorskip("moto.server")

pytestmark = pytest.mark.filterwarnings("default")

KEYS = {"key": "visible-id", "secret": "topsecret"}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(execute, "plan", planned)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def opened(machine: Machine, endpoint: str, *, required: bool = True) -> Shared:
    options = {**KEYS, "endpoint_url": endpoint}
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
    run(first, opened(first, endpoint))
    assert first.built == list(NAMES)
    run(second, opened(second, endpoint))
    assert second.built == []
    assert digests(second) == digests(first)
    store = opened(second, endpoint).entries
    assert store is not None
    assert upkeep.verify(store).problems == ()
    assert upkeep.collect(store) == (0, 0)


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


def test_a_server_that_is_gone_is_told_without_keys(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "first")
    with pytest.raises(StoreError, match="s3://bucket/care") as caught:
        opened(machine, "http://127.0.0.1:9")
    assert "topsecret" not in str(caught.value)
