"""Toy steps of two machines that share a store, and a store whose answers fail on demand."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from fsspec.implementations.memory import MemoryFileSystem

from pipeline.core.address import parse
from pipeline.scheduler.execute import Observer, Outcome, execute
from pipeline.scheduler.plan import Selection
from pipeline.stages.context import RunContext
from pipeline.steps.artifact import Artifact
from pipeline.steps.step import Step
from pipeline.store import upkeep
from pipeline.store.entries import Entries
from pipeline.store.objects import Objects
from pipeline.store.shared import Shared

NAMES = ("export", "ort/fp32", "bench/ort")
SIZE = 30_000


class Machine:
    """Stands for configuration and source of one clone, and for what the machine is."""

    def __init__(self, folder: Path, kind: str = "laptop") -> None:
        self.folder, self.kind = folder, kind
        self.hashes = self
        self.built: list[str] = []
        self.said: list[str] = []

    def save(self) -> None:
        """Stands for the cache of hashes."""


class ToyStep(Step):
    stage = "export"

    @property
    def machine(self) -> Machine:
        return cast(Machine, self.context.config)

    def inputs(self) -> Mapping[str, Any]:
        return {"setting": 1}

    def build(self, folder: Path) -> Mapping[str, Any]:
        self.machine.built.append(self.name)
        (folder / "part").mkdir()
        (folder / "part" / "big").write_bytes(random.Random(self.name).randbytes(SIZE))
        (folder / "small").write_text(self.name)
        return {"rows": [1, 2], "name": self.name}


class Timed(ToyStep):
    """Decides by timing: its key holds the kind of machine."""

    stage = "bench"

    def inputs(self) -> Mapping[str, Any]:
        return {"machine": self.machine.kind}


class Quiet(Observer):
    """An observer that remembers warnings."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def warn(self, text: str) -> None:
        self.machine.said.append(text)


def planned(context: RunContext) -> list[Step]:
    export = ToyStep(context, "export")
    build = ToyStep(context, "ort/fp32", [export], "ort")
    return [export, build, Timed(context, "bench/ort", [build], "ort")]


def context_of(machine: Machine) -> RunContext:
    anything: Any = machine
    quiet = Quiet(machine)
    return RunContext(
        config=anything, source=anything, log=machine.said.append, progress=quiet.progress
    )


def run(machine: Machine, store: Shared | None, selection: Selection | None = None) -> Outcome:
    machine.built.clear()
    return execute(context_of(machine), selection or Selection(), Quiet(machine), store)


def digests(machine: Machine) -> dict[str, str]:
    found = {}
    for name in NAMES:
        artifact = Artifact.read(machine.folder / name)
        artifact.verify()
        found[name] = artifact.digest
    return found


class Unsteady(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory that fails at chosen calls.

    Args:
        content: The files; several clients may share them.
    """

    cachable = False

    def __init__(self, content: dict[str, Any], faults: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.store, self.pseudo_dirs = content, [""]
        self.faults, self.calls, self.met = dict(faults or {}), 0, list[str]()

    def _fault(self) -> str:
        self.calls += 1
        kind = self.faults.pop(self.calls, "")
        if kind:
            self.met.append(kind)
        if kind == "cut":
            raise ConnectionResetError("the connection was cut, key=topsecret")
        if kind == "500":
            raise OSError("500 Internal Server Error for key=topsecret")
        if kind == "odd":
            raise KeyError("topsecret")
        if kind == "slow":
            time.sleep(0.02)
        if kind == "stuck":
            time.sleep(5)
        return kind

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fault()
        return super().info(path, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        kind = self._fault()
        stream: Any = super()._open(path, mode, **kwargs)
        if kind in ("truncated", "wrong"):
            self._spoil(stream, kind, mode)
        return stream

    def _spoil(self, stream: Any, kind: str, mode: str) -> None:
        """Let a stream move other bytes than it is told to."""
        name = "read" if mode == "rb" else "write"
        real = getattr(stream, name)

        def changed(data: bytes) -> bytes:
            if kind == "truncated" or not data:
                return data[: len(data) // 2]
            return data[:-1] + bytes([data[-1] ^ 1])

        if mode == "rb":
            done: list[bool] = []

            def read(size: int = -1) -> bytes:
                data = real(size)
                if done:
                    return data if kind == "wrong" else b""
                done.append(True)
                return changed(data)

            stream.read = read
        else:
            stream.write = lambda data: real(changed(data))


FAULTS = ("cut", "500", "odd", "truncated", "wrong", "slow")


def entries(files: MemoryFileSystem, limit_s: float = 30.0) -> Entries:
    address = parse("memory://host/store?key=topsecret")
    return Entries(Objects(address, limit_s, (files, "/store")))


def shared(
    machine: Machine,
    files: MemoryFileSystem,
    *,
    push: bool = True,
    required: bool = False,
    limit_s: float = 30.0,
) -> Shared:
    return Shared(entries(files, limit_s), push=push, required=required, warn=machine.said.append)


def require_shared(first: Machine, second: Machine, opened: Callable[[Machine], Shared]) -> None:
    """See that one machine builds, another takes it all, and the store is in order then."""
    run(first, opened(first))
    assert first.built == list(NAMES)
    run(second, opened(second))
    assert second.built == []
    assert digests(second) == digests(first)
    store = opened(second).entries
    assert store is not None
    assert upkeep.verify(store).problems == ()
    assert upkeep.collect(store) == (0, 0)
