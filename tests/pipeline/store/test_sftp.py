"""The store on a real SFTP server, on the loopback address."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.core.errors import StoreError
from pipeline.scheduler import execute
from pipeline.store import upkeep
from pipeline.store.shared import Shared
from tests.pipeline.store.toys import NAMES, Machine, digests, planned, require_shared, run

pytest.importorskip("paramiko")

USER, PASSWORD = "somebody", "topsecret"


class Login(asyncssh.SSHServer):
    """Lets one user in, by password.

    Args:
        open_ones: Takes the connection, for who has to end it.
    """

    def __init__(self, open_ones: list[asyncssh.SSHServerConnection]) -> None:
        self.open_ones = open_ones

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.open_ones.append(conn)

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


class Files(asyncssh.SFTPServer):
    """Serves a folder, and counts what is written; ends its connection where it is told to."""

    written, ends_at = 0, 0

    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        Files.written += 1
        if Files.written == Files.ends_at:
            self.channel.get_connection().abort()
        return super().write(file_obj, offset, data)


class Server:
    """An SSH server in a thread of its own.

    Args:
        folder: What it serves.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.loop, self.port = folder, asyncio.new_event_loop(), 0
        self.open_ones: list[asyncssh.SSHServerConnection] = []
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.listener = self._do(self._listen())

    async def _listen(self) -> asyncssh.SSHAcceptor:
        listener = await asyncssh.create_server(
            lambda: Login(self.open_ones),
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=lambda channel: Files(channel, str(self.folder).encode()),
        )
        self.port = listener.get_port()
        return listener

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def hang_up(self) -> None:
        """End all connections."""

        async def ended() -> None:
            for each in self.open_ones:
                each.abort()
                await each.wait_closed()
            self.open_ones.clear()

        self._do(ended())

    def stop(self) -> None:
        async def stopped() -> None:
            self.listener.close()
            await self.listener.wait_closed()

        self.hang_up()

        self._do(stopped())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(execute, "plan", planned)
    monkeypatch.setattr(Files, "written", 0)
    monkeypatch.setattr(Files, "ends_at", 0)
    serving = Server(tmp_path / "served")
    yield serving
    serving.stop()


def opened(
    machine: Machine, server: Server, *, required: bool = True, password: str = PASSWORD
) -> Shared:
    address = f"sftp://{USER}:{password}@127.0.0.1:{server.port}/care"
    said = machine.said.append
    return Shared.open(address, push=True, required=required, warn=said, limit_s=30)


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Machine, Machine]:
    return Machine(tmp_path / "first"), Machine(tmp_path / "second")


def test_two_machines_share_a_folder_of_an_ssh_server(
    server: Server, machines: tuple[Machine, Machine]
) -> None:
    require_shared(*machines, lambda machine: opened(machine, server))


def test_what_is_damaged_there_is_built_here_and_put_in_order(
    server: Server, machines: tuple[Machine, Machine]
) -> None:
    first, second = machines
    run(first, opened(first, server))
    spoilt = sorted(path for path in (server.folder / "care/objects").rglob("*") if path.is_file())
    spoilt[0].write_bytes(b"other")
    run(second, opened(second, server))
    assert second.built
    assert any("damaged" in line for line in second.said)
    assert digests(second) == digests(first)
    store = opened(second, server).entries
    assert store is not None
    assert upkeep.verify(store).problems == ()


def test_a_connection_that_ends_in_the_middle_of_a_file_costs_no_result(
    server: Server, machines: tuple[Machine, Machine]
) -> None:
    first, second = machines
    Files.ends_at = 2
    run(first, opened(first, server, required=False))
    assert first.built == list(NAMES)
    assert any("cannot be written" in line for line in first.said)
    assert PASSWORD not in "".join(first.said)
    # What was half written lies aside, under no name that anybody reads.
    run(second, opened(second, server))
    assert digests(second) == digests(first)


def end_of(store: Shared, server: Server) -> None:
    """End a store's connection, and wait until its own thread has noticed."""
    assert store.entries is not None
    transport: Any = store.entries.objects.files.client.get_transport()
    server.hang_up()
    end = time.monotonic() + 30
    while transport.is_active() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_connection_that_ended_while_nobody_asked_is_made_anew(
    server: Server, machines: tuple[Machine, Machine]
) -> None:
    """A step may take hours, and what comes after it has to reach the store."""
    first, second = machines
    store = opened(first, server)
    end_of(store, server)
    run(first, store)
    end_of(store, server)
    run(second, opened(second, server))
    assert second.built == []
    assert not any("the store" in line for line in (*first.said, *second.said))


def test_the_driver_is_always_the_one_that_the_extra_brings(
    server: Server, machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others register themselves for this scheme as soon as they are installed."""
    # fsspec has a value of the module's name.
    registered = sys.modules["fsspec.registry"].__dict__["_registry"]
    monkeypatch.setitem(registered, "sftp", MemoryFileSystem)
    run(machines[0], opened(machines[0], server))
    assert (server.folder / "care/steps").is_dir()


def test_neither_user_nor_password_is_shown(
    server: Server, machines: tuple[Machine, Machine]
) -> None:
    with pytest.raises(StoreError, match=r"sftp://127\.0\.0\.1:\d+/care") as caught:
        opened(machines[0], server, password="not this one")
    assert "not this one" not in str(caught.value)
    assert USER not in str(caught.value)
