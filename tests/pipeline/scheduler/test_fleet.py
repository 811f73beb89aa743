"""Steps on workers of a real Dask scheduler, on the loopback address."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.commands.console import QuietConsole
from pipeline.core.address import parse
from pipeline.core.errors import ConfigError, PipelineError, UnavailableError
from pipeline.scheduler import execute, fleet, worker
from pipeline.scheduler.execute import Outcome
from pipeline.scheduler.orders import Answer
from pipeline.scheduler.plan import Selection, make_context, plan
from pipeline.steps.artifact import Artifact
from pipeline.steps.stated import Stated
from pipeline.steps.step import State
from pipeline.store import parcels
from pipeline.store.entries import Entries
from pipeline.store.objects import Objects
from pipeline.store.shared import Shared
from tests.pipeline.scheduler.fleet_toys import NAMES, steps_of

distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0
OPTIONS = ["--nthreads", "1", "--no-nanny", "--memory-limit", "0"]


@pytest.fixture(autouse=True)
def _toy_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "plan", steps_of)
    monkeypatch.setattr(fleet, "LOOK_S", 0.1)


class started:  # noqa: N801  used as a function
    """A process of Dask's, ended in the end."""

    def __init__(self, kind: str, *arguments: str, said: Path | None = None) -> None:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments]
        settings = {"PYTHONPATH": str(ROOT), "DASK_LOGGING__DISTRIBUTED": "error"}
        if said is not None:
            settings["TOY_SAID"] = str(said)
        self.process = subprocess.Popen(
            [*command, "--no-dashboard", "--host", "127.0.0.1"], env={**os.environ, **settings}
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler of its own, without workers."""
    with scheduled(tmp_path_factory.mktemp("scheduler")) as (address, _):
        yield address


@contextmanager
def scheduled(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    file = folder / "scheduler.json"
    with started("scheduler", "--port", "0", "--scheduler-file", str(file)) as process:
        end = time.monotonic() + PATIENCE_S
        while not (file.is_file() and file.stat().st_size):
            assert time.monotonic() < end, "the scheduler never came up"
            time.sleep(0.05)
        yield str(json.loads(file.read_text())["address"]), process


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that tells workers what to do."""
    return tmp_path_factory.mktemp("told") / "said.json"


@pytest.fixture(scope="module")
def workers(scheduler: str, told: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two workers; a test may kill one."""
    options = worker_options(tmp_path_factory.mktemp("workers"))
    with (
        started("worker", scheduler, *options, said=told),
        started("worker", scheduler, *options, said=told),
        distributed.Client(scheduler, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=PATIENCE_S)
        yield


def worker_options(place: Path) -> list[str]:
    options = [*OPTIONS, "--resources", "cpu=1 bench=1", "--local-directory", str(place)]
    return [*options, "--preload", "tests.pipeline.scheduler.fleet_worker"]


@pytest.fixture
def one_more(scheduler: str, workers: None, told: Path, tmp_path: Path) -> Iterator[None]:
    """A worker beside the others, of which a test may have killed one."""
    with distributed.Client(scheduler, set_as_default=False) as client:
        there = len(client.scheduler_info(n_workers=-1)["workers"])
        with started("worker", scheduler, *worker_options(tmp_path), said=told):
            client.wait_for_workers(there + 1, timeout=PATIENCE_S)
            yield


@pytest.fixture
def say(told: Path, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Tells workers what to do in this test."""

    def tell(**said: str) -> None:
        told.write_text(json.dumps({"marks": str(tmp_path), **said}))

    yield tell
    told.unlink(missing_ok=True)


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "plan", lambda context: steps_of(context)[:1])


def configured(folder: Path, scheduler: str | None = None, **more: Any) -> config.Config:
    values: dict[str, Any] = {
        "name": "mine",
        "output": str(folder),
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {"ort": {"precisions": ["fp32"]}},
    }
    if scheduler is not None:
        values["store"] = {"address": str(folder.parent / "store"), "push": True}
        values["fleet"] = {"scheduler": scheduler, "wait_s": 60.0}
    for section, change in more.items():
        values[section] = {**values.get(section, {}), **change}
    return config.from_mapping(values).config


def run(
    settings: config.Config,
    selection: Selection | None = None,
    lines: list[str] | None = None,
    warned: list[str] | None = None,
    store: Shared | None = None,
) -> Outcome:
    settings.folder.mkdir(parents=True, exist_ok=True)
    console = QuietConsole(sys.stderr)
    log = (lines if lines is not None else []).append
    context = make_context(settings, log, console.progress)
    chosen = selection or Selection()
    if settings.fleet is None:
        return execute.execute(context, chosen, console, store)
    warn = console.warn if warned is None else warned.append
    with fleet.connected(settings, context.source, warn) as running:
        return execute.execute(context, chosen, console, store, running)


def digests(settings: config.Config) -> dict[str, str]:
    found = {}
    for name in NAMES:
        artifact = Artifact.read(settings.folder / name)
        artifact.verify()
        found[name] = artifact.digest
    return found


def test_two_workers_make_what_a_plain_run_makes(
    scheduler: str, workers: None, say: Callable[..., None], tmp_path: Path
) -> None:
    """One of them is killed in the middle: nothing is lost, and the digests are the same."""
    plain = configured(tmp_path / "plain")
    run(plain)
    say(kills="meet0")
    settings = configured(tmp_path / "fleet", scheduler)
    lines: list[str] = []
    outcome = run(settings, lines=lines)
    found = {result.name: result.state for result in outcome.results}
    assert found == dict.fromkeys(NAMES, State.DONE)
    assert (tmp_path / "kills-meet0").exists(), "no worker was killed"
    assert digests(settings) == digests(plain)
    assert all("on worker" in result.why and "a note" in result.why for result in outcome.results)
    assert set(Stated(settings.folder).made_since) == set(NAMES)
    assert "meet1: a line" in lines
    assert {result.state for result in run(settings).results} == {State.UP_TO_DATE}


@pytest.mark.usefixtures("one_step", "workers")
def test_a_worker_takes_from_the_store_what_is_not_forced(scheduler: str, tmp_path: Path) -> None:
    first = configured(tmp_path / "first", scheduler)
    assert "taken from" not in run(first).results[0].why
    assert "taken from" not in run(first, Selection(force=True)).results[0].why
    second = run(configured(tmp_path / "second", scheduler))
    assert "taken from the store" in second.results[0].why


@pytest.mark.usefixtures("one_step", "workers")
def test_the_network_goes_through_the_store(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("weights.txt").write_text("weights")
    Path("labels.txt").write_text("a\nb\n")
    Path("fleet_nets.py").write_text("import fleet_part\n")
    Path("fleet_part.py").write_text("")
    (tmp_path / "photos").mkdir()
    settings = configured(
        tmp_path / "fleet",
        scheduler,
        model={"name": None, "module": "fleet_nets:make", "checkpoint": "weights.txt"},
        data={"validation": "folder:../photos", "labels": "labels.txt"},
    )
    result = run(settings).results[0]
    assert result.state is State.DONE, result.why
    assert Artifact.read(settings.folder / "first").facts["checkpoint"] == "weights"


@pytest.mark.usefixtures("one_step", "workers")
@pytest.mark.parametrize(
    ("said", "state", "why"),
    [
        ({"version": "2.14"}, State.FAILED, "from something else: torch 2.14 (here 2.15): install"),
        ({"kind": "server", "dies": "first"}, State.DONE, "a note"),
        ({"refuses": "first"}, State.FAILED, "(node): the runtime refused"),
        ({"odd": "first"}, State.FAILED, "an unforeseen fault: ZeroDivisionError: by nothing"),
        ({"full": "first"}, State.FAILED, "first: out of memory: MemoryError: 8 GiB"),
        ({"lies": "file"}, State.FAILED, "gave for first is not what its digest says"),
    ],
)
def test_what_a_worker_does(
    scheduler: str,
    say: Callable[..., None],
    tmp_path: Path,
    said: dict[str, str],
    state: State,
    why: str,
) -> None:
    say(**said)
    settings = configured(tmp_path / "fleet", scheduler)
    result = run(settings).results[0]
    assert result.state is state, result.why
    assert why in result.why.replace(f"({platform.node()})", "(node)")
    assert (settings.folder / "first").exists() == (state is State.DONE)


@pytest.mark.usefixtures("one_step", "workers")
def test_what_other_machines_made_stays_while_the_fleet_has_such(
    scheduler: str, say: Callable[..., None], tmp_path: Path
) -> None:
    """And is made on those that are there as soon as it has not."""
    settings = configured(tmp_path / "fleet", scheduler)
    say(kind="server")
    assert run(settings).results[0].state is State.DONE
    assert run(settings).results[0].state is State.UP_TO_DATE
    say(kind="phone")
    result = run(settings).results[0]
    assert "measured on a machine such as the fleet has none" in result.why
    assert Artifact.read(settings.folder / "first").facts["kind"] == "phone"
    assert "taken from" not in result.why
    plain = configured(tmp_path / "fleet")
    assert "changed: machine.kind" in run(plain).results[0].why


@pytest.mark.usefixtures("one_step", "workers")
def test_a_run_takes_nothing_from_the_store_that_a_machine_like_its_own_made(
    scheduler: str, say: Callable[..., None], tmp_path: Path
) -> None:
    """A worker may be of another class: it asks by its own key."""
    store = Shared(
        Entries(Objects(parse(str(tmp_path / "store")))),
        push=True,
        required=True,
        warn=lambda text: None,
    )
    run(configured(tmp_path / "plain"), store=store)
    say(kind="server")
    settings = configured(tmp_path / "fleet", scheduler)
    assert "on worker" in run(settings, store=store).results[0].why
    assert Artifact.read(settings.folder / "first").facts["kind"] == "server"


@pytest.mark.usefixtures("workers")
def test_two_fleets_on_one_store(scheduler: str, tmp_path: Path) -> None:
    """Both at once, of the same things: each finds what a plain run makes."""
    plain = configured(tmp_path / "plain")
    run(plain)
    both = [configured(tmp_path / name, scheduler) for name in ("one", "other")]
    with ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(run, both):
            assert {result.state for result in outcome.results} == {State.DONE}
    assert digests(both[0]) == digests(both[1]) == digests(plain)
    store = Objects(parse(str(tmp_path / "store")))
    for name in store.listed("objects"):
        assert hashlib.sha256(b"".join(store.pieces(name))).hexdigest() == name.rpartition("/")[2]


def wrong_second(tmp_path: Path, scheduler: str) -> Outcome:
    settings = configured(tmp_path / "fleet", scheduler)
    settings.folder.mkdir(parents=True, exist_ok=True)
    console = QuietConsole(sys.stderr)
    context = make_context(settings, lambda line: None, console.progress)
    with fleet.connected(settings, context.source, console.warn) as running:
        return execute.execute(context, Selection(), console, None, running, audited=1.0)


@pytest.mark.usefixtures("one_step", "one_more")
def test_an_audit_is_another_workers(
    scheduler: str, say: Callable[..., None], tmp_path: Path
) -> None:
    """Whose consistent wrong bytes no digest would find."""
    say(odd_one="first")
    result = wrong_second(tmp_path, scheduler).results[0]
    assert result.state is State.FAILED
    found = re.fullmatch(
        r"first is not what it was: worker (\S+) \(.*\) made ([0-9a-f]{64}), and worker (\S+) "
        r"\(.*\) ([0-9a-f]{64}), of the same inputs: .*",
        result.why,
    )
    assert found is not None, result.why
    assert found[1] != found[3]
    assert found[2] != found[4]


@pytest.mark.usefixtures("one_step", "workers")
def test_an_audit_that_finds_nothing(scheduler: str, tmp_path: Path) -> None:
    result = wrong_second(tmp_path, scheduler).results[0]
    assert result.state is State.DONE, result.why
    again = wrong_second(tmp_path, scheduler).results[0]
    assert again.state is State.UP_TO_DATE


@pytest.mark.usefixtures("one_step", "workers")
def test_a_store_that_takes_nothing_fails_the_step(scheduler: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = {"address": str(tmp_path / "file" / "store")}
    outcome = run(configured(tmp_path / "fleet", scheduler, store=blocked))
    assert re.search("on worker .* cannot be (read|written)", outcome.results[0].why)
    assert outcome.exit_code == 4


@pytest.mark.usefixtures("one_step")
def test_a_step_does_not_wait_for_ever(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "needs", lambda step, there: {"rtx": 1.0})
    warned: list[str] = []
    settings = configured(tmp_path / "fleet", scheduler, fleet={"wait_s": 0.3})
    outcome = run(settings, warned=warned)
    assert warned == [f"first waits for a worker with rtx=1: none is connected to {scheduler}"]
    assert "first waits for a worker with rtx=1, and none came within 0.3 s: start one" in (
        outcome.results[0].why
    )
    assert outcome.exit_code == 4


@pytest.mark.usefixtures("one_step")
def test_a_scheduler_that_goes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scheduled(tmp_path) as (address, process):
        settings = configured(tmp_path / "fleet", address)
        outcome = run(settings, warned=Killing(process))
    why = f"first: the scheduler {address} is gone: start it again, and run again"
    assert outcome.results[0].why == why
    assert outcome.exit_code == 4


class Killing(list[str]):
    """Ends a scheduler as soon as a step waits for it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def append(self, text: str) -> None:
        self.process.kill()


def test_an_unreachable_scheduler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "CONNECT_S", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="no Dask scheduler answers at tcp://127"):
            run(configured(tmp_path / "fleet", address))


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"store": {"push": False}}, ConfigError, "needs a store through which artifacts go"),
        ({"store": {"address": "memory://x/y"}}, ConfigError, "do not see a store in memory"),
        (
            {"data": {"validation": "tar:memory://x/y.tar"}},
            ConfigError,
            "do not see images in memory",
        ),
        ({"fleet": {"scheduler": "tcp://10.0.0.9:8786"}}, ConfigError, "use tls:// with the cert"),
        ({"fleet": {"scheduler": "tcp://gpu.lab:8786"}}, ConfigError, "or give --insecure"),
        (
            {"fleet": {"scheduler": "tls://127.0.0.1:1"}},
            UnavailableError,
            "needs certificates: set",
        ),
    ],
)
def test_what_no_fleet_can_work_with(
    tmp_path: Path, changes: dict[str, dict[str, Any]], error: type[PipelineError], why: str
) -> None:
    settings = configured(tmp_path / "fleet", "tcp://127.0.0.1:1", **changes)
    with pytest.raises(error, match=why):
        run(settings)


def test_certificates_that_are_missing_are_told(tmp_path: Path) -> None:
    import dask

    names = ("ca-file", "client.cert", "client.key")
    there = {f"distributed.comm.tls.{name}": str(tmp_path / "no.pem") for name in names}
    with dask.config.set(there), pytest.raises(UnavailableError, match="cannot be read: FileNot"):
        run(configured(tmp_path / "fleet", "tls://127.0.0.1:1"))


def test_a_way_that_is_not_encrypted_can_be_allowed(tmp_path: Path) -> None:
    there = {"scheduler": "tcp://10.0.0.9:8786", "insecure": True}
    fleet.require_sound_fleet(configured(tmp_path, "tcp://127.0.0.1:1", fleet=there))


def versions(**changes: str | None) -> dict[str, Any]:
    packages = {"python": "3.11.7.final.0", "care-deploy": "0.1.0", "dask": "1", "distributed": "1"}
    return {"packages": {**packages, **{k.replace("_", "-"): v for k, v in changes.items()}}}


def test_other_versions_of_what_they_talk_by_are_named() -> None:
    def found(scheduler: dict[str, Any], worker: dict[str, Any]) -> dict[str, Any]:
        return {"client": versions(), "scheduler": scheduler, "workers": {"tcp://a:1": worker}}

    fleet.require_same_versions(found(versions(), versions(python="3.11.9.final.0")))
    fleet.require_same_versions(found(versions(), versions(care_deploy=None)))
    with pytest.raises(UnavailableError, match=r"worker tcp://a:1 has dask 2 \(here 1\): install"):
        fleet.require_same_versions(found(versions(), versions(dask="2")))
    with pytest.raises(UnavailableError, match=r"the scheduler has python 3\.12 \(here 3\.11\)"):
        fleet.require_same_versions(found(versions(python="3.12.1.final.0"), versions()))


def test_artifacts_are_judged_where_their_hardware_is(tmp_path: Path) -> None:
    settings = configured(
        tmp_path,
        targets={"trt": {"precisions": ["fp16"]}, "coreml": {"precisions": ["fp16"]}},
    )
    context = make_context(settings, lambda line: None, QuietConsole(sys.stderr).progress)
    steps = {step.name: step for step in plan(context)}

    def needed(name: str, *there: str) -> str:
        return " ".join(sorted(fleet.needs(steps[name], there)))

    assert needed("validate/trt-fp16", "cpu", "rtx") == "rtx"
    assert needed("validate/trt-fp16", "cpu") == "cpu"
    assert needed("bench/trt", "cpu", "rtx") == "bench rtx"
    assert needed("bench/coreml", "cpu", "mac") == "bench mac"
    assert needed("bench/ort", "cpu", "rtx", "mac") == "bench cpu"
    assert needed("trt/fp16", "cpu", "rtx") == "rtx"
    assert needed("trt/fp16", "cpu") == "cpu"
    assert needed("coreml/fp16", "cpu", "rtx", "mac") == "cpu"
    assert needed("ort/fp32", "cpu", "rtx") == "bench cpu"
    assert needed("export", "cpu", "rtx", "mac") == "cpu"


def test_targets_say_what_an_audit_leaves_out(tmp_path: Path) -> None:
    settings = configured(
        tmp_path,
        targets={
            "trt": {"precisions": ["fp16"]},
            "coreml": {"precisions": ["fp16"]},
            "ort": {"precisions": ["fp32"]},
        },
    )
    context = make_context(settings, lambda line: None, QuietConsole(sys.stderr).progress)
    names = ("trt/fp16", "ort/fp32", "bench/trt", "coreml/fp16", "export", "precision/float16")
    found = {step.name: step.differs() for step in plan(context) if step.name in names}
    assert found == {
        "trt/fp16": "two builds of an engine differ",
        "ort/fp32": "chosen by timing",
        "bench/trt": "chosen by timing",
        "coreml/fp16": "",
        "export": "",
        "precision/float16": "",
    }


class Answering(Executor):
    """Stands for Dask: gives an answer, or raises."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(self.answer, str):
            future.set_result(self.answer)
        else:
            future.set_exception(self.answer)
        return future

    def get_executor(self, **kwargs: Any) -> Executor:
        return self

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {"tcp://a:1": {"resources": {"cpu": 1.0}}}}


def answered(tmp_path: Path, answer: str | Exception) -> str:
    """Why the first step failed, by what a worker said."""
    settings = configured(tmp_path / "fleet", "tcp://127.0.0.1:1")
    settings.folder.mkdir(parents=True)
    context = make_context(settings, lambda line: None, QuietConsole(sys.stderr).progress)
    dask: Any = Answering(answer)
    objects = Objects(parse(str(tmp_path / "store")))
    running = fleet.Fleet(dask, settings, context.source, objects, lambda text: None)
    console = QuietConsole(sys.stderr)
    outcome = execute.execute(context, Selection(), console, None, running)
    assert outcome.results[0].state is State.FAILED
    assert not (settings.folder / "first").exists()
    return outcome.results[0].why


@pytest.mark.usefixtures("one_step")
def test_a_step_of_which_dask_despairs_fails(tmp_path: Path) -> None:
    why = answered(tmp_path, RuntimeError("killed 4 workers"))
    assert why == "first: Dask gave it up: RuntimeError: killed 4 workers; see the worker's log"


@pytest.mark.usefixtures("one_step")
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("no JSON", "a worker's answer is no JSON"),
        ('{"worker": "box", "more": 1}', "a worker's answer: "),
        ('{"worker": "box"}', "worker box says nothing of first"),
    ],
)
def test_answers_are_doubted(tmp_path: Path, answer: str, why: str) -> None:
    assert answered(tmp_path, answer).startswith(why)


def test_what_was_made_from_something_else_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = configured(tmp_path / "plain")
    run(plain)
    monkeypatch.setattr(execute, "plan", lambda context: steps_of(context)[:1])
    objects = Objects(parse(str(tmp_path / "store")))
    made = parcels.send(objects, Artifact.read(plain.folder / "meet0"))
    why = answered(tmp_path, Answer("box", made).to_json())
    assert why == (
        "worker box made something else than first: its name, what it was made from, the seals of "
        "that differ"
    )


def test_no_limit_of_threads_of_dasks_nanny_reaches_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    found = worker._environment(nannied=True)
    assert "OMP_NUM_THREADS" not in found
    assert found["MKL_NUM_THREADS"] == "3", "the user's own"
    assert worker._environment(nannied=False)["OMP_NUM_THREADS"] == "1"
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
