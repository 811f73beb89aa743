"""How accurate an artifact is: measured, emulated, or why it is neither."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.core.figures import Number, State, wilson
from pipeline.core.network import Images, Logits, Network
from pipeline.core.runner import Numerics, Runner
from pipeline.stages.build import BuildStep
from pipeline.stages.golden import GoldenStep
from pipeline.stages.names import GRAPH, LABELS, LOGITS, OWN_GRAPH, PIXELS
from pipeline.stages.validate import ReferenceStep, ValidateStep, accuracy, compare_sums, judge
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.accuracy import ReferenceFacts, ValidationFacts
from pipeline.steps.keys import versions
from pipeline.targets import pytorch

RIGHT = np.array([0, 1, 1, 0])
REFERENCE = np.array([[2.0, 1], [1, 2], [1, 2], [1, 2]], np.float32)


def test_shares_of_the_first_and_the_first_five() -> None:
    top1, top5 = accuracy(REFERENCE, RIGHT, State.MEASURED, "PyTorch", "")
    assert (top1.value, top5.value) == (0.75, 1.0)
    assert (top1.by, top1.samples, top1.state) == ("PyTorch", 4, State.MEASURED)
    assert top1.interval is not None
    assert top1.interval[0] < 0.75 < top1.interval[1]


def test_an_artifact_is_held_against_pytorch() -> None:
    logits = REFERENCE.copy()
    logits[1] = [4, 2]  # right before, wrong now
    found = judge(logits, REFERENCE, RIGHT, State.EMULATED, "executor", "no GPU")
    values = [found.agreement, found.flips, found.max_difference, found.top1_drop]
    assert [number.value for number in values if number] == [0.75, 1.0, 3.0, 0.25]
    assert found.top1.value == 0.5
    assert found.cosine is not None
    assert found.cosine.value == pytest.approx((3 + 8 / np.sqrt(20 * 5)) / 4)
    assert found.top1_drop is not None
    assert found.top1_drop.interval is not None
    for number in (*[n for n in values if n], found.top1, found.top5, found.cosine):
        assert (number.state, number.by, number.why) == (State.EMULATED, "executor", "no GPU")
    assert found.agreement is not None
    assert found.agreement.interval == wilson(3, 4)


class Toy(Runner):
    """Answers by the mean of each image, and keeps the sizes of its batches."""

    device = "the toy"

    def __init__(self, smallest: int = 1, largest: int | None = None, divides: int = 1) -> None:
        self.smallest, self.largest, self.divides = smallest, largest, divides
        self.seen: list[int] = []
        self.closed = False

    def __call__(self, images: Images) -> Logits:
        self.seen.append(len(images))
        mean = images.mean((1, 2, 3))
        return np.stack([mean, 0 * mean], axis=1)

    def numerics(self) -> Numerics:
        return Numerics(overflowed_values=7)

    def close(self) -> None:
        self.closed = True


class ToyTarget:
    """Runs or emulates artifacts by a `Toy`, or fails to."""

    name, title, forms = "toy", "Toy", ()
    takes_photos = False

    def hardware(self) -> dict[str, str]:
        return {}

    def __init__(self, runner: Runner | Exception | None, lacking: str | None) -> None:
        self.runner, self.lacking = runner, lacking
        self.graphs: list[Path | None] = []
        self.beside: Runner | Exception | None = None
        """What emulates beside a measurement."""

    def missing(self, artifact: Artifact) -> str | None:
        return self.lacking

    def versions(self) -> dict[str, str]:
        return {"toy": "1"}

    def open_to_judge(self, artifact: Artifact) -> Runner | None:
        assert self.lacking is None
        return self._answer()

    def emulate(self, artifact: Artifact, graph: Path | None) -> Runner | None:
        if self.lacking is None:
            if isinstance(self.beside, Exception):
                raise self.beside
            return self.beside
        self.graphs.append(graph)
        return self._answer()

    def _answer(self) -> Runner | None:
        if isinstance(self.runner, Exception):
            raise self.runner
        return self.runner


IMAGES = 5
SHADES = np.array([250, 20, 240, 30, 10], np.uint8)
"""Above 127 the toy says the first class, below the second."""
KNOWN = np.array([0, 1, 1, 1, 0])

NETWORK = Network(
    "toy",
    ("light", "dark"),
    (3, 2, 2),
    {
        "size": 2,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "channels": "rgb",
    },
)


class Steps:
    """Stands for the steps that validation is made from, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[Any, ...]] = []
        self.context = SimpleNamespace(
            folder=folder,
            artifacts={},
            log=print,
            code=SimpleNamespace(hashes=lambda modules, **more: {}),
            stated=SimpleNamespace(
                announce=lambda name, seal: None, require=lambda name, seal: None
            ),
            progress=lambda *told: self.told.append(told),
            config=SimpleNamespace(validation=SimpleNamespace(batch=2, shard=1000, metrics=None)),
            source=SimpleNamespace(
                referee=f"PyTorch {torch.__version__}, float32, CPU",
                reference=lambda: pytorch.TorchRunner(Flat()),
                range_of=lambda images: pytorch.range_of(Flat(), images),
                checkpoint_hash="c0ffee",
                network_inputs=lambda: {"settings name": "toy"},
                tools=lambda: {"torch": "2"},
            ),
        )
        pixels = np.broadcast_to(SHADES[:, None, None, None], (IMAGES, 2, 2, 3))
        files = {PIXELS: pixels, LABELS: KNOWN}
        self.samples = self.step("validate/samples", files)
        self.reference = self.step("validate/pytorch", {LOGITS: Toy()(normalized(pixels))})
        self.golden = GoldenStep(cast(Any, self.context), self.samples, self.reference)
        self.golden.run()

    def step(self, name: str, arrays: Mapping[str, Any], **more: Any) -> Any:
        def build(folder: Path) -> Mapping[str, Any]:
            for file, array in arrays.items():
                with (folder / file).open("wb") as stream:
                    np.save(stream, array)
            return {"network": NETWORK.to_dict()}

        made = artifact.make(
            self.folder / name, kind="x", name=name, key="k", made_from={}, tools={}, build=build
        )
        return SimpleNamespace(
            name=name, folder=made.folder, artifact=lambda: made, target="toy", **more
        )

    def validate(self, target: ToyTarget, *files: str, graph: bool = True) -> ValidateStep:
        forms = self.step("precision/toy", {GRAPH: np.zeros(1)}) if graph else None
        build = self.step(
            "toy/fp8",
            dict.fromkeys(("model.toy", *files), np.zeros(1)),
            precision="fp8",
            graph=forms,
            runtime=target,
        )
        build.own_graph = partial(BuildStep.own_graph, cast(Any, build))
        return ValidateStep(
            cast(Any, self.context), build, self.samples, self.reference, self.golden
        )


class Flat(torch.nn.Module):
    """PyTorch's answer is the toy's."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, 0 * mean], dim=1)


def normalized(pixels: npt.NDArray[np.uint8]) -> Images:
    images: Images = np.moveaxis((pixels / np.float32(255) - 0.5) / 0.5, 3, 1).astype(np.float32)
    return images


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def built(step: ValidateStep, folder: Path) -> ValidationFacts:
    folder.mkdir()
    return ValidationFacts.from_facts(step.build(folder), "here")


def test_an_artifact_that_runs_here_is_measured(steps: Steps, tmp_path: Path) -> None:
    runner = Toy()
    found = built(steps.validate(ToyTarget(runner, None)), tmp_path / "new")
    assert (found.target, found.precision) == ("toy", "fp8")
    assert found.numerics == Numerics(overflowed_values=7)
    top1 = found.numbers.top1
    assert (top1.value, top1.state, top1.by, top1.why) == (0.6, State.MEASURED, "the toy", "")
    assert found.numbers.agreement is not None
    assert found.numbers.agreement.value == 1
    assert np.load(tmp_path / "new" / LOGITS).argmax(1).tolist() == [0, 1, 0, 1, 1]
    assert runner.closed
    assert steps.told == [(done, IMAGES, "Toy fp8") for done in (0, 2, 4)]


class Brighter(Toy):
    """Emulates the toy, a little off."""

    device = "the emulation"

    def __call__(self, images: Images) -> Logits:
        logits = super().__call__(images)
        logits[:, 0] += np.float32(0.86)  # of -0.84, -0.76 and -0.92 two cross zero
        return logits


def test_the_error_of_the_emulation_is_told(steps: Steps, tmp_path: Path) -> None:
    target = ToyTarget(Toy(), None)
    target.beside = Brighter(smallest=3)
    error = built(steps.validate(target), tmp_path / "new").emulation
    assert error is not None
    assert (error.images, error.by) == (IMAGES, "the emulation")
    # Measured, the images are of the classes 0 1 0 1 1; emulated, 0 0 0 0 1; right are 0 1 1 1 0.
    assert (error.measured.value, error.measured.state) == (0.6, State.MEASURED)
    assert (error.emulated.value, error.emulated.state) == (0.2, State.EMULATED)
    assert error.difference.value == pytest.approx(0.4)
    assert error.agreement.value == 0.6
    assert error.max_difference.value == pytest.approx(0.86)
    assert not error.is_proven, "of five images"
    assert target.beside.closed


class Threads(Brighter):
    """Notes the threads that PyTorch has at each call."""

    def __init__(self, **more: int) -> None:
        super().__init__(**more)
        self.threads: list[int] = []

    def __call__(self, images: Images) -> Logits:
        self.threads.append(torch.get_num_threads())
        return super().__call__(images)


def test_small_pictures_are_answered_for_with_one_thread(
    steps: Steps, tmp_path: Path, three_threads: None
) -> None:
    runner, beside = Threads(), Threads()
    target = ToyTarget(runner, None)
    target.beside = beside
    built(steps.validate(target), tmp_path / "new")
    assert set(runner.threads) == set(beside.threads) == {1}
    assert torch.get_num_threads() == 3


def test_what_divides_images_itself_has_all_threads_and_more_images(
    steps: Steps, tmp_path: Path, three_threads: None
) -> None:
    runner, beside = Threads(divides=2), Threads(divides=2)
    target = ToyTarget(runner, None)
    target.beside = beside
    built(steps.validate(target), tmp_path / "new")
    assert set(runner.threads) == set(beside.threads) == {3}
    assert runner.seen == [4, 1]


@pytest.mark.parametrize("beside", [None, UnsupportedOperatorError("no Foo")])
def test_what_was_measured_stands_without_an_emulation(
    beside: Exception | None, steps: Steps, tmp_path: Path
) -> None:
    target = ToyTarget(Toy(), None)
    target.beside = beside
    found = built(steps.validate(target), tmp_path / "new")
    assert found.emulation is None
    assert found.numbers.top1.state is State.MEASURED


class Narrow(Toy):
    """A toy that has a second reading, in which the first class is always right."""

    def __init__(self) -> None:
        super().__init__()
        self.second = First()

    def narrow_sums(self) -> Runner | None:
        return self.second


class First(Toy):
    """Answers with the first class, whatever the image is."""

    device = "the toy, narrow"

    def __call__(self, images: Images) -> Logits:
        logits = super().__call__(images)
        logits[:, 0] = np.abs(logits[:, 0])
        return logits


def test_the_second_reading_of_sums_is_told(steps: Steps, tmp_path: Path) -> None:
    runner = Narrow()
    found = built(steps.validate(ToyTarget(runner, "no such device")), tmp_path / "new")
    narrow = found.narrow_sums
    assert narrow is not None
    assert (narrow.images, narrow.agreement.by) == (IMAGES, "the toy, narrow")
    assert narrow.agreement_wide.value == 1
    assert narrow.agreement.value == np.mean(SHADES > 127)
    assert narrow.agreement.state is State.EMULATED
    assert runner.second.closed
    without = built(steps.validate(ToyTarget(Toy(), "no such device")), tmp_path / "other")
    assert without.narrow_sums is None


def test_what_is_emulated_alone_has_no_error_of_it(steps: Steps, tmp_path: Path) -> None:
    found = built(steps.validate(ToyTarget(Toy(), "no such device")), tmp_path / "new")
    assert found.emulation is None


@pytest.mark.parametrize(
    ("runner", "seen"),
    [
        (Toy(), [2, 2, 1]),
        (Toy(largest=1), [1] * 5),
        (Toy(smallest=4), [4, 4]),
        (Toy(2, 2), [2] * 3),
    ],
)
def test_images_come_in_batches_that_the_runner_takes(
    runner: Toy, seen: list[int], steps: Steps, tmp_path: Path
) -> None:
    found = built(steps.validate(ToyTarget(runner, None)), tmp_path / "new")
    assert runner.seen == seen
    assert found.numbers.top1.samples == IMAGES


class Killed(Toy):
    """Is killed at its third batch."""

    def __call__(self, images: Images) -> Logits:
        if len(self.seen) == 2:
            raise KeyboardInterrupt
        return super().__call__(images)


def test_a_validation_that_was_killed_goes_on(steps: Steps, tmp_path: Path) -> None:
    steps.context.config.validation.shard = 2
    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        steps.validate(ToyTarget(Killed(), None)).build(tmp_path / "killed")
    runner = Toy()
    found = built(steps.validate(ToyTarget(runner, None)), tmp_path / "new")
    assert runner.seen == [1], "four of five images were done"
    assert (found.numbers.top1.value, found.numbers.top1.samples) == (0.6, IMAGES)


@pytest.mark.parametrize(
    ("files", "graph", "expected"),
    [
        ((), True, "precision/toy/model.onnx"),
        ((OWN_GRAPH,), True, "toy/fp8/graph.onnx"),
        ((), False, None),
    ],
)
def test_what_cannot_run_here_is_emulated_by_its_graph(
    files: tuple[str, ...], graph: bool, expected: str | None, steps: Steps, tmp_path: Path
) -> None:
    target = ToyTarget(Toy(), "no such device")
    found = built(steps.validate(target, *files, graph=graph), tmp_path / "new")
    top1 = found.numbers.top1
    assert (top1.value, top1.state, top1.why) == (0.6, State.EMULATED, "no such device")
    assert target.graphs == [tmp_path / expected if expected else None]


def test_what_cannot_be_emulated_says_why(steps: Steps, tmp_path: Path) -> None:
    none = built(steps.validate(ToyTarget(None, "no such device")), tmp_path / "none")
    assert none.numbers.top1 == Number.not_measured("no such device")
    gap = UnsupportedOperatorError("no Foo")
    found = built(steps.validate(ToyTarget(gap, "no such device")), tmp_path / "gap")
    why = "no such device; and it cannot be emulated: no Foo"
    assert found.numbers.top1 == Number.not_measured(why)
    assert not (tmp_path / "gap" / LOGITS).exists()
    # Where it runs, that is no gap of an executor.
    (tmp_path / "new").mkdir()
    with pytest.raises(UnsupportedOperatorError, match="no Foo"):
        steps.validate(ToyTarget(gap, None)).build(tmp_path / "new")
    nothing = built(steps.validate(ToyTarget(None, None)), tmp_path / "nothing")
    assert nothing.numbers.top1 == Number.not_measured("there is no executor for it")


def test_what_decides_a_validation_is_in_its_key(steps: Steps) -> None:
    step = steps.validate(ToyTarget(Toy(), "no such device"))
    assert (step.stage, step.name, step.target) == ("validate", "validate/toy-fp8", "toy")
    assert step.inputs() == {
        "what this machine lacks": "no such device",
        "network": NETWORK.to_dict(),
        "settings validation": {"batch": 2},
    }
    assert step.tools() == {**versions("numpy", "torch"), "toy": "1"}
    made_from = ["toy/fp8", "validate/samples", "validate/pytorch", "validate/golden"]
    made_from.append("precision/toy")
    assert list(step.made_from()) == made_from
    without = steps.validate(ToyTarget(Toy(), None), graph=False)
    assert list(without.made_from()) == made_from[:4]


def test_pytorch_is_what_artifacts_are_held_against(steps: Steps, tmp_path: Path) -> None:
    step = ReferenceStep(cast(Any, steps.context), steps.samples)
    (tmp_path / "new").mkdir()
    found = ReferenceFacts.from_facts(step.build(tmp_path / "new"), "here")
    top1, top5 = found.numbers.top1, found.numbers.top5
    assert (top1.value, top1.samples, top5.value) == (0.6, IMAGES, 1.0)
    assert (top1.state, top1.why) == (State.MEASURED, "")
    assert top1.by == f"PyTorch {torch.__version__}, float32, CPU"
    assert np.allclose(np.load(tmp_path / "new" / LOGITS)[:, 0], SHADES / 127.5 - 1, atol=1e-6)
    assert step.made_from() == {
        "validate/samples": steps.samples.artifact().digest,
        "checkpoint": "c0ffee",
    }
    assert step.inputs() == {"settings name": "toy", "settings validation": {"batch": 2}}
    assert step.tools() == {"torch": "2"}
    assert (step.stage, step.name) == ("validate", "validate/pytorch")
    assert steps.told[0] == (0, IMAGES, f"PyTorch {torch.__version__}, float32, CPU")


def votes(right: int, total: int) -> np.ndarray:
    """Logits that have the class 0 for the first images, and 1 for the rest."""
    logits = np.zeros((total, 2), np.float32)
    logits[:right, 0] = logits[right:, 1] = 1
    return logits


@pytest.mark.parametrize(("right", "differ"), [(256, False), (254, False), (240, True)])
def test_two_readings_of_sums(right: int, differ: bool) -> None:
    reference = votes(256, 256)
    found = compare_sums(votes(right, 256), votes(256, 256), reference, "executor")
    assert (found.images, found.agreement_wide.value) == (256, 1)
    assert found.agreement.value == right / 256
    assert found.drop.value == (256 - right) / 256
    assert found.differ is differ
    assert (found.drop.state, found.drop.by, found.drop.samples) == (
        State.EMULATED,
        "executor",
        256,
    )


def test_narrow_sums_may_be_nearer() -> None:
    found = compare_sums(votes(256, 256), votes(200, 256), votes(256, 256), "executor")
    assert found.drop.value is not None
    assert found.drop.value < 0
    assert found.differ
