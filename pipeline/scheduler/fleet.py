"""Steps on other machines: a run hands them to Dask's executor and takes back what was made.

Queue, heartbeats and retries are Dask's. What a step needs goes into the store by digest, what it
made comes out of it by digest, and nothing is taken that was made from something else.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config import Config, FleetConfig
from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    DamagedError,
    PipelineError,
    UnavailableError,
)
from pipeline.core.plain import parse_json
from pipeline.core.words import in_short
from pipeline.scheduler.orders import Answer, Order, config_for_workers, network_files
from pipeline.scheduler.places import CPU, FleetPlaces, MachineFacts
from pipeline.scheduler.plan import ASKED_FOR, open_store, with_requirements
from pipeline.scheduler.processes import Made
from pipeline.scheduler.side_by_side import Begun, Running
from pipeline.scheduler.worker import told_machine, work
from pipeline.source import Source
from pipeline.stages.build import BuildStep
from pipeline.stages.shards import ShardStep
from pipeline.stages.target_step import TargetStep
from pipeline.steps.artifact import Artifact
from pipeline.steps.step import Place, Step
from pipeline.store import parcels
from pipeline.store.objects import Objects
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from distributed import Client

BENCH = "bench"
INSTALL = "pip install 'care-deploy[dask]'"
CERTIFICATES = "distributed.comm.tls.{ca-file, client.cert, client.key} of Dask's settings"
CONNECT_S = 15.0
"""How long a scheduler may take for its first answer."""

LOOK_S = 2.0
"""How often the workers are looked at while nothing ends."""

RETRIES = 1
"""How often Dask tries a step again whose process died, but not its worker."""

SAME = ("care-deploy", "dask", "distributed")
"""Packages of which run, scheduler and workers need the same version, to understand each other."""


def needs(step: Step, there: Collection[str]) -> dict[str, float]:
    """What a worker has to have to run a step.

    Args:
        step: The step.
        there: What the fleet has.
    """
    place = hardware(step, there)
    return {place: 1, BENCH: 1} if step.measures else {place: 1}


def hardware(step: Step, there: Collection[str]) -> str:
    """On what a step runs: a resource.

    Artifacts are judged and measured on their hardware, if the fleet has any of it, and elsewhere
    emulated; they are built where their target says that it is best done, if the fleet has that.

    Args:
        step: The step.
        there: What the fleet has.
    """
    if isinstance(step, ShardStep):
        step = step.whole
    wanted = CPU
    if isinstance(step, TargetStep) and step.stage in ("validate", "bench"):
        wanted = step.runtime.resource
    if isinstance(step, BuildStep):
        wanted = step.runtime.builds_on
    return wanted if wanted in there else CPU


class Fleet(Running):
    """Steps that run on workers at this moment.

    Args:
        client: Connected to Dask's scheduler.
        config: The configuration.
        source: Its network.
        objects: The store.
        warn: Is told what a step waits for.
    """

    def __init__(
        self,
        client: Client,
        config: Config,
        source: Source,
        objects: Objects,
        warn: Callable[[str], object],
    ) -> None:
        assert config.fleet is not None
        assert config.store is not None
        super().__init__()
        self.client, self.objects, self.warn = client, objects, warn
        self.stated = config.fleet
        self.config, self.source = config_for_workers(config), source
        self.timeout_s = config.store.timeout_s
        self.there = set(self.stated.resources or _resources(_workers(client)))
        self._waiting: dict[Future[Any], float] = {}
        self._executors: dict[tuple[str, ...], Executor] = {}
        self._files: dict[str, parcels.Parcel] | None = None
        self._sent: dict[str, parcels.Parcel] = {}
        self._makers: dict[str, Answer] = {}
        self._machines: dict[str, MachineFacts] | None = None
        self.elsewhere = FleetPlaces(lambda step: hardware(step, self.there), self.machines)

    def machines(self, step: Step) -> list[MachineFacts]:
        """What those workers tell of their machines that a step may run on; asked once a run."""
        if self._machines is None:
            names = [name for name in TARGETS if self.source.config.target(name)]
            told = self.client.run(told_machine, names, on_error="ignore")
            self._machines = {address: _facts(text) for address, text in told.items()}
        wanted = needs(step, self.there)
        return [
            self._machines[address]
            for address, stated in _workers(self.client).items()
            if address in self._machines and wanted.keys() <= stated.keys()
        ]

    def has_room(self, step: Step) -> bool:
        """See `Running`: what has to wait waits at Dask's, also for a worker's `bench`."""
        return True

    def _submit(self, begun: Begun) -> None:
        order = self._order(begun)
        wanted = needs(begun.step, self.there)
        future = self._executor(wanted).submit(work, order.to_json())
        self._begun[future] = begun

    def _executor(self, wanted: Mapping[str, float]) -> Executor:
        key = tuple(sorted(wanted))
        if key not in self._executors:
            self._executors[key] = self.client.get_executor(
                resources=dict(wanted), pure=False, retries=RETRIES
            )
        return self._executors[key]

    def made_on(self, step: Step) -> str:
        """See `Running`."""
        maker = self._makers.get(step.name)
        return "the store" if maker is None else f"worker {maker.worker}"

    def again(self, step: Step) -> Callable[[], tuple[str, str]]:
        """See `Running`: on another worker that has what it needs; on the same if there is none."""
        wanted, maker = needs(step, self.there), self._makers.get(step.name)
        others = [
            address
            for address, stated in _workers(self.client).items()
            if wanted.keys() <= stated.keys() and (maker is None or address != maker.address)
        ]
        order = replace(self._order(Begun(step, ASKED_FOR, (), 0.0)), again=True)
        limits: dict[str, Any] = {"workers": others} if others else {}
        executor = self.client.get_executor(resources=wanted, pure=False, retries=RETRIES, **limits)
        future = executor.submit(work, order.to_json())

        def answer() -> tuple[str, str]:
            found = self._answered(step, future)
            if (failure := found.failure()) is not None:
                raise failure
            return f"worker {found.worker}", found.digest

        return answer

    def _answered(self, step: Step, future: Future[Any]) -> Answer:
        """What a worker answered.

        Raises:
            PipelineError: It answered nothing.
        """
        try:
            return Answer.from_json(str(future.result()))
        except PipelineError:
            raise
        except CancelledError:
            lost = f"{step.name}: the scheduler {self.stated.scheduler} is gone"
            raise UnavailableError(f"{lost}: start it again, and run again") from None
        except Exception as error:
            # Dask's own failures, such as a worker that died too often.
            failed = f"{step.name}: Dask gave it up: {in_short(error)}"
            raise BuildError(f"{failed}; see the worker's log") from error

    def _order(self, begun: Begun) -> Order:
        step = begun.step
        needed = with_requirements([step]) - {step}
        shards = [shard for shard in step.shards() if shard.folder.exists()]
        ordered = sorted([*needed, *shards], key=lambda each: each.name)
        return Order(
            step=step.name,
            config=self.config,
            store=self.objects.address.bare,
            timeout_s=self.timeout_s,
            files=self._network(),
            artifacts={each.name: self._send(each) for each in ordered if each.folder.exists()},
            missing=begun.missing,
            anew=begun.why == ASKED_FOR,
            parts=step.parts(),
        )

    def _network(self) -> dict[str, parcels.Parcel]:
        """What the network is made from, given to the store once a run."""
        if self._files is None:
            self._files = {
                place: parcels.send_file(self.objects, path, digest)
                for place, path, digest in network_files(self.source)
            }
        return self._files

    def _send(self, step: Step) -> parcels.Parcel:
        """An artifact, given to the store once a run."""
        artifact = step.artifact()
        if artifact.seal not in self._sent:
            self._sent[artifact.seal] = parcels.send(self.objects, artifact)
        return self._sent[artifact.seal]

    def next(self) -> tuple[Begun, Made]:
        """See `Running`; a step that nobody can run ends as well."""
        while True:
            done, _ = wait(self._begun, timeout=LOOK_S, return_when=FIRST_COMPLETED)
            if done:
                future = next(iter(done))
                begun = self._begun.pop(future)
                self._waiting.pop(future, None)
                return begun, self._made(begun, future)
            if (late := self._late()) is not None:
                return late

    def _late(self) -> tuple[Begun, Made] | None:
        """A step for which no worker came in time."""
        try:
            workers = _workers(self.client)
        except (OSError, RuntimeError):  # the connection is lost: Dask tries to get it back
            workers = {}
        now = time.monotonic()
        for future, begun in list(self._begun.items()):
            wanted = needs(begun.step, self.there)
            if any(wanted.keys() <= set(each) for each in workers.values()):
                self._waiting.pop(future, None)
                continue
            text = f"{begun.step.name} waits for a worker with {_written(wanted)}"
            if future not in self._waiting:
                self._waiting[future] = now
                self.warn(f"{text}: none is connected to {self.stated.scheduler}")
            if now - self._waiting[future] > self.stated.wait_s:
                del self._begun[future], self._waiting[future]
                future.cancel()
                advice = "start one: python -m pipeline worker prints how"
                text = f"{text}, and none came within {self.stated.wait_s:g} s: {advice}"
                return begun, Made((), UnavailableError(text))
        return None

    def _made(self, begun: Begun, future: Future[Any]) -> Made:
        """What a worker answered, with its artifact in the place."""
        try:
            answer = self._answered(begun.step, future)
            self._makers[begun.step.name] = answer
            begun.step.context.log(f"{begun.step.name}: ran on worker {answer.worker}")
            for line in answer.log:
                begun.step.context.log(line)
            failure = answer.failure()
            if failure is None:
                self._take(begun.step, answer)
            return Made((f"on worker {answer.worker}", *answer.notes), failure, given=True)
        except PipelineError as error:
            return Made((), error)

    def _take(self, step: Step, answer: Answer) -> None:
        """Put into its place what a worker made, if it is what it says, from what it was given.

        Raises:
            BuildError: It is something else.
            StoreError: The store does not answer.
        """

        def check(made: Artifact) -> None:
            with step.seen_from(Place(made.inputs or {}, made.tools)):
                same = {
                    "its name": (made.name, made.kind) == (step.name, step.stage),
                    "what it was made from": dict(made.made_from) == step.made_from(),
                    "the seals of that": dict(made.seals) == step.seals(),
                    "the code": dict(made.code) == step.code(),
                }
            wrong = [what for what, fits in same.items() if not fits]
            if wrong:
                raise BuildError(
                    f"worker {answer.worker} made something else than {step.name}: "
                    f"{', '.join(wrong)} differ"
                )

        def announce(seal: str) -> None:
            step.context.stated.announce(step.name, seal)

        if answer.made is None:
            raise BuildError(f"worker {answer.worker} says nothing of {step.name}: it is outdated")
        try:
            parcels.receive(self.objects, answer.made, step.folder, check, announce)
        except DamagedError as error:
            raise BuildError(
                f"what worker {answer.worker} gave for {step.name} is not what its digest says: "
                f"{error}"
            ) from error


def _workers(client: Client) -> dict[str, dict[str, float]]:
    """What every worker states to have, by its address."""
    found = client.scheduler_info(n_workers=-1)["workers"]
    return {address: dict(each.get("resources") or {}) for address, each in found.items()}


def _resources(workers: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    return {name for stated in workers.values() for name in stated}


def _facts(text: str) -> MachineFacts:
    """What a worker told of its machine; nothing where that cannot be read."""
    try:
        facts = parse_json(text, "a worker's machine")
    except ArtifactError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _written(wanted: Mapping[str, float]) -> str:
    return " and ".join(f"{name}=1" for name in wanted)


@contextmanager
def connected(config: Config, source: Source, warn: Callable[[str], object]) -> Iterator[Fleet]:
    """The fleet that a configuration names.

    Args:
        config: The configuration.
        source: Its network.
        warn: Is told what a step waits for.

    Raises:
        ConfigError: There is no store that workers can reach, or the way there is not encrypted.
        UnavailableError: The scheduler does not answer, or dask.distributed is not installed.
    """
    require_sound_fleet(config)
    assert config.fleet is not None
    assert config.store is not None
    needed = config.model_copy(update={"store": config.store.model_copy(update={"required": True})})
    store = open_store(needed, warn)
    assert store is not None
    assert store.entries is not None, "a store that is required is open, or an error"
    with _client(config.fleet) as client:
        yield Fleet(client, config, source, store.entries.objects, warn)


def require_sound_fleet(config: Config) -> None:
    """Refuse what no fleet can work with; nothing is asked for it.

    Raises:
        ConfigError: See `connected`.
    """
    fleet, store = config.fleet, config.store
    assert fleet is not None
    if store is None or not store.push:
        raise ConfigError(
            "a scheduler needs a store through which artifacts go: add store: {address: …, push: "
            "true} to the configuration"
        )
    if store.address.get_secret_value().startswith("memory:"):
        raise ConfigError("store: workers do not see a store in memory: name a folder or s3://…")
    for uri in (config.data.validation, config.data.calibration):
        if (uri or "").partition(":")[2].startswith("memory:"):
            raise ConfigError("data: workers do not see images in memory: name a path or s3://…")
    parts = urlsplit(fleet.scheduler)
    if parts.scheme == "tcp" and not fleet.insecure and not _is_local(parts.hostname or ""):
        raise ConfigError(
            f"{fleet.scheduler} is another machine, and tcp:// is not encrypted: who is on the "
            "way can run code there; use tls:// with the certificates of Dask's settings "
            "(distributed.comm.tls), or give --insecure"
        )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _client(fleet: FleetConfig) -> Iterator[Client]:
    try:
        from distributed import Client
    except ImportError:
        raise UnavailableError(f"--scheduler needs dask.distributed: {INSTALL}") from None
    security = _security(fleet.scheduler)
    try:
        client = Client(fleet.scheduler, timeout=CONNECT_S, set_as_default=False, security=security)
    except OSError as error:
        raise UnavailableError(
            f"no Dask scheduler answers at {fleet.scheduler} ({in_short(error)}): start one with "
            "`dask scheduler`, and look at address, port and certificates"
        ) from error
    try:
        versions: Any = client.get_versions(packages=["care-deploy"])
        require_same_versions(versions)
        yield client
    finally:
        client.close(timeout=CONNECT_S)


def _security(address: str) -> Any:
    """Dask's own settings of TLS.

    Raises:
        UnavailableError: They name no certificates that can be read, and the address needs them.
    """
    from distributed.security import Security

    security = Security()
    try:
        context = security.get_connection_args("client").get("ssl_context")
    except OSError as error:  # errors of TLS are such, too
        raise UnavailableError(f"{CERTIFICATES} cannot be read: {in_short(error)}") from error
    if address.startswith("tls://") and context is None:
        raise UnavailableError(f"{address} needs certificates: set {CERTIFICATES}")
    return security


def require_same_versions(found: Mapping[str, Any]) -> None:
    """Refuse other versions of what run, scheduler and workers talk by.

    Raises:
        UnavailableError: Names them.
    """
    here = _versions_of(found["client"])
    others = {"the scheduler": found["scheduler"]}
    others |= {f"worker {name}": each for name, each in found["workers"].items()}
    for who, each in others.items():
        there = _versions_of(each)
        wrong = [
            f"{name} {there[name]} (here {here[name]})"
            for name in here
            if there.get(name) and here[name] and there[name] != here[name]
        ]
        if wrong:
            raise UnavailableError(
                f"{who} has {', '.join(wrong)}: install the same there, "
                "pip install -c constraints.txt 'care-deploy[dask]'"
            )


def _versions_of(each: Mapping[str, Any]) -> dict[str, str | None]:
    packages = each["packages"]
    python = str(packages["python"]).split(".")
    if len(python) < 2:
        raise ArtifactError("Dask tells no version of Python")
    return {"python": ".".join(python[:2]), **{name: packages.get(name) for name in SAME}}
