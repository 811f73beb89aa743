"""What is measured of a target, on which images, in which order, and what its key holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.config import BenchConfig
from pipeline.core import machine, timing
from pipeline.core.answers import Answers
from pipeline.core.errors import InputError
from pipeline.core.figures import Number, State, Throughput
from pipeline.core.network import Batch, Images, Logits, Network, Pixels
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.core.runner import DeviceState, Runner
from pipeline.core.timing import Protocol
from pipeline.stages import bench
from pipeline.stages.bench import BenchStep
from pipeline.stages.drawn import Drawn
from pipeline.stages.names import LOGITS, PIXELS
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.accuracy import Accuracy, ValidationFacts
from pipeline.steps.facts.bench import PYTORCH, BenchFacts, Measured, Memory, Sustained
from pipeline.targets.pytorch import TorchRunner

HALF = Preprocess(4, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SHADES = 7
DRAWN = Drawn(
    Pictures(np.full((SHADES, 4, 4, 3), np.arange(SHADES)[:, None, None, None], np.uint8), HALF)
)
"""As many distinct images as their shades."""


class Echo(Runner):
    """Answers at once, and keeps the batch sizes that it was given."""

    device = "echo"

    def __init__(self, seen: list[int], smallest: int = 1, largest: int | None = None) -> None:
        self.seen, self.smallest, self.largest = seen, smallest, largest

    def __call__(self, images: Images) -> Logits:
        self.seen.append(len(images))
        return np.zeros((len(images), 2), np.float32)

    def throughput(self, calls: int) -> list[Throughput]:
        return [Throughput(4, 1.0, None, 4000.0)]

    def device_state(self) -> DeviceState:
        return DeviceState(("heat",))


class TakesPixels(Echo):
    """Takes what it must not be normalized for, and keeps every batch."""

    takes = "pixels"

    def __init__(self, batches: list[Pixels]) -> None:
        super().__init__([])
        self.batches = batches

    def __call__(self, images: Batch) -> Logits:
        self.batches.append(images)
        return super().__call__(images)


class Dataset:
    def __len__(self) -> int:
        return 2


def _shaded(indices: Iterable[int]) -> Pictures:
    """Images as dark as their number."""
    shades = np.array(list(indices), np.uint8).reshape(-1, 1, 1, 1)
    return Pictures(np.broadcast_to(shades, (len(shades), 4, 4, 3)).copy(), HALF)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch

    source = SimpleNamespace(
        baseline=lambda threads: TorchRunner(torch.nn.Flatten(), threads),
        validation=Dataset(),
        pictures=lambda dataset, indices: _shaded(indices),
    )
    monkeypatch.setattr(machine, "load", lambda: 0.5)
    return SimpleNamespace(source=source, progress=lambda *arguments: None, config=None)


def measure(context: Any, runner: Runner, *, samples: int = 3, **settings: Any) -> Measured:
    config = BenchConfig(samples=samples, warmup=1, max_seconds=60, threads=1, **settings)
    context.config = SimpleNamespace(bench=config)
    return bench.measure(context, {"fp32": lambda: runner}, "Echo", DRAWN)


@pytest.mark.parametrize(("batches", "smallest"), [((8,), 8), ((4, 2), 2), ((1, 8), 1)])
def test_the_end_to_end_latency_says_of_which_batch_it_is(
    context: Any, batches: tuple[int, ...], smallest: int
) -> None:
    seen: list[int] = []
    measured = measure(context, Echo(seen), batches=batches)
    assert measured.end_to_end.batch == smallest == seen[-1]
    assert set(measured.end_to_end.latency) == {"fp32", "pytorch"}
    assert tuple(measured.batches) == batches
    assert measured.first_batch == batches[0]


def test_a_runner_that_takes_pixels_is_measured_with_pixels(context: Any) -> None:
    batches: list[Pixels] = []
    measured = measure(context, TakesPixels(batches), batches=(2, 1))
    assert {batch.dtype.name for batch in batches} == {"uint8"}
    assert {batch.shape for batch in batches} == {(2, 4, 4, 3), (1, 4, 4, 3)}
    assert set(measured.end_to_end.latency) == {"fp32", "pytorch"}


def test_what_is_measured_beside_latency(context: Any) -> None:
    measured = measure(context, Echo([]), batches=(1,))
    assert measured.throughput == {"fp32": (Throughput(4, 1.0, None, 4000.0),)}
    assert measured.device_state == {"fp32": DeviceState(("heat",))}
    assert measured.devices["fp32"] == "echo"
    assert measured.load_before == 0.5
    assert set(measured.cold_start_ms) == {"fp32"}
    latency = measured.batches[1]
    assert latency.baseline == "fp32"
    assert len(latency.samples_ms["pytorch"]) == 3


def test_pytorch_has_half_of_the_calls_where_something_else_is_measured(context: Any) -> None:
    measured = measure(context, Echo([]), samples=6, batches=(1,))
    calls = {name: len(samples) for name, samples in measured.samples_ms.items()}
    assert calls == {"fp32": 6, PYTORCH: 3}
    assert measured.distinct == 6
    alone = bench.measure(context, {}, "PyTorch", DRAWN)
    assert len(alone.samples_ms[PYTORCH]) == 6


def test_a_repeated_image_is_audited_for_every_runner(context: Any) -> None:
    measured = measure(context, Echo([]), batches=(1, 2))
    assert set(measured.repeated) == {"fp32", PYTORCH}
    assert measured.repeated["fp32"].calls == 3


@pytest.mark.parametrize("runner", [partial(Echo, smallest=2), partial(Echo, largest=2)])
def test_a_batch_that_a_runner_does_not_take_is_refused(context: Any, runner: Any) -> None:
    with pytest.raises(InputError, match=r"Echo fp32 takes batches of .*: change bench\.batches"):
        measure(context, runner([]), batches=(4, 1))


@pytest.mark.parametrize(("batches", "distinct"), [((1, 4), 3), ((2, 1), 6), ((8,), SHADES)])
def test_only_images_that_timed_calls_were_given_count_as_distinct(
    context: Any, batches: tuple[int, ...], distinct: int
) -> None:
    assert measure(context, Echo([]), batches=batches).distinct == distinct


def test_how_and_where_it_was_measured_is_told(context: Any) -> None:
    told: list[str] = []
    context.progress = lambda done, total, what: told.append(f"{done} of {total}: {what}")
    measured = measure(context, Echo([]), batches=(2,))
    assert measured.protocol == Protocol(warmup=1, samples=3, max_seconds=60, settled=0.03)
    assert measured.machine == machine.Machine.here()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", measured.date)
    assert measured.batches[2].phases["fp32"]["engine"].samples == 3
    assert measured.end_to_end.latency["fp32"].samples == 3
    assert told == [
        "0 of None: opening Echo fp32",
        "3 of 3: Echo, batch 2",
        "0 of None: Echo, audit of a repeated image",
        "0 of None: Echo, end to end",
        "0 of None: Echo, throughput",
    ]


class Keeping(Runner):
    """Writes down what it is given, whoever else does so: a letter and the images' shades."""

    takes = "pixels"
    device = "keeping"

    def __init__(self, letter: str, events: list[str]) -> None:
        self.letter, self.events = letter, events

    def __call__(self, images: Images) -> Logits:
        self.events.append(self.letter + "".join(f"{image.max():.0f}" for image in images))
        return np.zeros((len(images), 2), np.float32)

    def close(self) -> None:
        self.events.append(f"{self.letter} closed")


def test_runners_are_opened_together_measured_in_turn_and_closed(context: Any) -> None:
    events: list[str] = []
    openers = {letter: partial(Keeping, letter, events) for letter in "ab"}
    config = BenchConfig(samples=6, warmup=1, max_seconds=60, threads=1, batches=(1,))
    context.config = SimpleNamespace(bench=config)
    measured = bench.measure(context, openers, "Echo", DRAWN)
    letters = [event[0] for event in events]
    # A first call, a warm-up, two turns, the audit and the way from end to end, of each; then both
    # are closed.
    turns = [letter for i, letter in enumerate(letters) if i == 0 or letters[i - 1] != letter]
    assert "".join(turns) == 6 * "ab" + "a"
    assert events[-2:] == ["b closed", "a closed"]
    assert measured.batches[1].baseline == "a"
    assert set(measured.batches[1].ratio_to_pytorch) == {"a", "b"}
    assert (measured.throughput, measured.device_state) == ({}, {})
    # From end to end, the dataset's images take turns: shades 0 and 1.
    whole = [event for event in events if event.startswith("a") and not event.endswith("closed")]
    assert whole[-7:] == ["a0", "a1", "a0", "a1", "a0", "a1", "a0"]


def test_the_first_images_take_turns_from_end_to_end(context: Any) -> None:
    class Many(Dataset):
        def __len__(self) -> int:
            return 99

    context.source.validation = Many()
    prepare = bench._preparation(context, 20)
    shades = [image.max() for _ in range(2) for image in prepare().pixels]
    assert shades == [*range(32), *range(8)]


class Target:
    """Opens artifacts of a precision that runs here."""

    name, title = "toy", "Toy"

    def __init__(self, lacking: Mapping[str, str] | None = None) -> None:
        self.lacking = lacking or {}
        self.opened: list[tuple[str, int | None]] = []

    def missing(self, built: Artifact) -> str | None:
        return self.lacking.get(built.name)

    def open(self, built: Artifact, *, threads: int | None) -> Runner:
        self.opened.append((built.name, threads))
        return Echo([])

    def versions(self) -> dict[str, str]:
        return {"toy": "1"}

    def hardware(self) -> dict[str, Any]:
        return {"gpu": "none"}


NETWORK = Network(
    "toy",
    ("a", "b"),
    (3, 4, 4),
    {
        "size": 4,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "channels": "rgb",
    },
)


PEAK = Number(3e6, State.MEASURED, unit="bytes", by="echo")


def judged(folder: Path, name: str, samples: Any, builds: Iterable[Any], precision: str) -> Any:
    """Stands for the step that judged an artifact, or PyTorch: its logits are zeros."""
    sources = [samples, *(build for build in builds if build.precision == precision)]

    def build(new: Path) -> Mapping[str, Any]:
        np.save(new / LOGITS, np.zeros((3, 2), np.float32))
        top1 = Number(1.0, State.MEASURED, by="echo")
        return ValidationFacts("toy", precision, Accuracy(top1, top1)).to_facts()

    found = artifact.make(
        folder / name,
        kind="x",
        name=name,
        key="k",
        made_from={source.name: source.artifact().digest for source in sources},
        tools={},
        build=build,
    )
    return SimpleNamespace(name=name, folder=folder / name, artifact=lambda: found)


def made(folder: Path, name: str) -> Any:
    """Stands for a step with an artifact."""

    def build(new: Path) -> Mapping[str, Any]:
        with (new / PIXELS).open("wb") as stream:
            np.save(stream, np.full((3, 4, 4, 3), [[[[255]]], [[[9]]], [[[9]]]], np.uint8))
        return {"network": NETWORK.to_dict()}

    found = artifact.make(
        folder / name, kind="x", name=name, key="k", made_from={}, tools={}, build=build
    )
    precision = name.rpartition("/")[2]
    return SimpleNamespace(
        name=name, folder=folder / name, precision=precision, artifact=lambda: found
    )


@pytest.fixture
def make_step(context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the step of a target with the precisions fp32 and int8."""

    def make(target: Target) -> BenchStep:
        monkeypatch.setattr(bench, "TARGETS", {"toy": target})
        config = BenchConfig(samples=3, warmup=1, max_seconds=60, threads=1, batches=(2,))
        context.config, context.folder = SimpleNamespace(bench=config), tmp_path
        context.source.network_inputs = lambda: {"settings name": "toy"}
        context.source.tools = lambda: {"torch": "2"}
        context.source.checkpoint_hash = "c0ffee"
        builds = [made(tmp_path, name) for name in ("toy/fp32", "toy/int8")]
        monkeypatch.setattr(bench, "memory_of", lambda *arguments: Memory(PEAK))
        samples = made(tmp_path, "validate/samples")
        names = {PYTORCH: "pytorch", "fp32": "toy-fp32", "int8": "toy-int8"}
        judges = {
            name: judged(tmp_path, f"validate/{name_of}", samples, builds, name)
            for name, name_of in names.items()
        }
        return BenchStep(context, "toy", cast(Any, builds), samples, cast(Any, judges))

    return make


def test_what_runs_here_is_measured_and_the_rest_says_why_not(
    make_step: Any, tmp_path: Path
) -> None:
    target = Target({"toy/int8": "no such device"})
    step = make_step(target)
    facts = step.build(tmp_path)
    found = BenchFacts.from_facts({k: v for k, v in facts.items() if k != "measured_on"}, "here")
    assert found.target == "toy"
    assert found.latency["int8"] == Number.not_measured("no such device", unit="ms")
    fp32 = found.latency["fp32"]
    assert (fp32.state, fp32.unit, fp32.by, fp32.samples) == (State.MEASURED, "ms", "echo", 3)
    assert target.opened == [("toy/fp32", 1)]
    assert found.measured is not None
    assert set(found.measured.devices) == {"fp32", "pytorch"}
    assert facts["measured_on"] == {**machine.cpu_class(), "gpu": "none"}


def test_nothing_is_measured_where_nothing_runs(make_step: Any, tmp_path: Path) -> None:
    target = Target({"toy/fp32": "no GPU", "toy/int8": "no GPU"})
    facts = make_step(target).build(tmp_path)
    assert BenchFacts.from_facts(facts, "here").measured is None
    assert target.opened == []


def test_distinct_samples_are_measured_and_their_answers_compared(
    make_step: Any, tmp_path: Path
) -> None:
    facts = BenchFacts.from_facts(make_step(Target()).build(tmp_path), "here")
    assert facts.measured is not None
    assert facts.measured.distinct == 3
    assert set(facts.measured.answers) == {"fp32", "int8", "pytorch"}
    for name in ("fp32", "int8"):  # zeros, as they were judged
        found = facts.measured.answers[name]
        assert (found.calls, found.wrong, found.largest_error) == (3, 0, 0.0)
    # The network flattens images: nothing of the kind was judged.
    assert facts.measured.answers[PYTORCH].wrong == 3
    assert "are not those of the validation" in facts.measured.doubt(PYTORCH)
    assert facts.measured.memory["int8"] == Memory(PEAK)


def test_without_a_validation_a_precision_is_measured_all_the_same(
    make_step: Any, tmp_path: Path
) -> None:
    step = make_step(Target())
    assert step.do_without([step.judges["int8"]])
    assert list(step.made_from())[-3:] == ["validate/pytorch", "validate/toy-fp32", "checkpoint"]
    facts = BenchFacts.from_facts(step.build(tmp_path), "here")
    assert facts.measured is not None
    assert facts.latency["int8"].value is not None
    assert facts.measured.answers["int8"].why_not == "validate/toy-int8 is not there"
    assert facts.measured.answers["fp32"].calls == 3
    assert step.notes == []


def test_what_was_not_built_is_left_out_and_this_is_noted(make_step: Any, tmp_path: Path) -> None:
    step = make_step(Target())
    assert step.do_without([step.builds[1]])
    assert step.notes == ["measured without toy/int8"]
    facts = BenchFacts.from_facts(step.build(tmp_path), "here")
    assert set(facts.latency) == {"fp32"}


def test_without_images_or_anything_built_nothing_is_measured(make_step: Any) -> None:
    step = make_step(Target())
    assert not step.do_without([step.samples])
    assert not step.do_without(step.builds)
    assert step.notes == []


def test_what_runs_elsewhere_depends_on_nobody_who_judged_it(make_step: Any) -> None:
    step = make_step(Target({"toy/fp32": "no GPU", "toy/int8": "no GPU"}))
    names = ["toy/fp32", "toy/int8", "validate/samples"]
    assert list(step.made_from()) == [*names, "checkpoint"]
    assert list(step.seals()) == names


def test_rivals_are_there_while_it_is_measured_and_not_before(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def rivals(count: int) -> Iterator[None]:
        events.append(f"{count} rivals")
        yield
        events.append("no rivals")

    def load() -> float:
        events.append("load")
        return 0.0

    monkeypatch.setattr(bench, "contended", rivals)
    monkeypatch.setattr(machine, "load", load)
    config = BenchConfig(samples=3, warmup=1, max_seconds=60, threads=1)
    context.config = SimpleNamespace(bench=config)
    keeping = {"a": lambda: Keeping("a", events)}
    measured = bench.measure(context, keeping, "Echo", DRAWN, rivals=2)
    assert events[:2] == ["load", "2 rivals"]
    assert events[-2:] == ["a closed", "no rivals"]
    assert measured.rivals == 2


def test_artifacts_are_called_without_a_rest_where_that_is_asked_for(context: Any) -> None:
    told: list[str] = []
    context.progress = lambda done, total, what: told.append(what)
    config = BenchConfig(samples=3, warmup=1, max_seconds=60, threads=1)
    context.config = SimpleNamespace(bench=config)
    echo = {"fp32": lambda: Echo([])}
    measured = bench.measure(context, echo, "Echo", DRAWN, endurance_s=1e-9)
    assert set(measured.sustained) == {"fp32"}  # PyTorch is nothing to ship
    found = measured.sustained["fp32"]
    assert found.latency.samples == 1
    assert found.answers.why_not == "nothing judged it"
    assert bench.measure(context, echo, "Echo", DRAWN).sustained == {}
    alone = bench.measure(context, {}, "PyTorch", DRAWN, endurance_s=1e-9)
    assert set(alone.sustained) == {PYTORCH}


def lasting(*samples: float, load: float = 0.0, wrong: int = 0) -> Sustained:
    found = timing.Endurance(samples, 2.0)
    return bench.endurance(found, 4, Answers(5, wrong, 0.5), load, cpus=2)


def test_drift_is_the_last_tenth_against_the_first() -> None:
    found = lasting(*(1.0 + 0.01 * (i // 30) for i in range(300)))
    assert found.tenths_ms == pytest.approx([1.0 + 0.01 * i for i in range(10)])
    assert found.drift is not None
    assert found.drift.value == pytest.approx(1.09)
    assert (found.images_per_s, found.doubt) == (600.0, "")
    assert lasting(*[1.0] * 300, load=1.0).doubt == "", "of two CPUs others may have one"
    assert found.words == (
        "2 s without a rest: 600.0 images/s; median 1.000 ms in the first tenth, 1.090 in the "
        "last: 1.090 of it (1.090 to 1.090), slower; valid"
    )
    assert "no drift shown; valid" in lasting(*[1.0] * 300).words


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (lasting(*[1.0] * 299), "299 calls, and 300 are needed"),
        (lasting(*[1.0] * 300, load=1.01), "other processes kept 1.0 of 2 CPUs busy"),
        (lasting(*[1.0] * 300, wrong=2), "2 of 5 answers of timed calls are not those of"),
    ],
)
def test_a_drift_that_is_not_to_be_trusted_says_why(found: Sustained, why: str) -> None:
    assert found.drift is not None
    assert f"invalid: {why}" in found.words


def test_a_few_calls_have_no_tenths() -> None:
    found = lasting(*[1.0] * 9)
    assert (found.drift, found.tenths_ms) == (None, ())
    assert found.words.endswith("drift invalid: 9 calls, and 300 are needed")


def test_what_decides_a_measurement_is_in_its_key(make_step: Any) -> None:
    step = make_step(Target({"toy/int8": "no such device"}))
    assert (step.stage, step.name, step.target) == ("bench", "bench/toy", "toy")
    assert step.inputs() == {
        "settings name": "toy",
        "settings bench": step.context.config.bench.model_dump(mode="json"),
        "machine": {**machine.cpu_class(), "gpu": "none"},
        "what this machine lacks for": {"toy/fp32": None, "toy/int8": "no such device"},
    }
    # The precision that does not run here is compared with nothing.
    names = ["toy/fp32", "toy/int8", "validate/samples", "validate/pytorch", "validate/toy-fp32"]
    assert list(step.made_from()) == [*names, "checkpoint"]
    assert list(step.seals()) == names
    assert step.made_from()["checkpoint"] == "c0ffee"
    assert step.tools() == {"torch": "2", "toy": "1"}
