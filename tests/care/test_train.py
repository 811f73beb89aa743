from __future__ import annotations

import csv
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from care import checkpoint, train
from care.distributed import World
from care.evaluate import read_trained
from care.factory import create_model
from care.losses import Teacher
from care.runs import RunFolder
from tests.care.processes import run_apart
from tests.care.small import as_options

ROOT = Path(__file__).parents[2]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--auto-augment", "none", "--random-erasing", "0"]
STILL = ["--hflip", "0", "--scale", "1", "1", "--ratio", "1", "1", "--color-jitter", "0"]
AUGMENTED = ["--mixup", "0.8", "--cutmix", "1", "--random-erasing", "0.5"]

Result = click.testing.Result
Train = Callable[..., Result]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 noisy images each: bright and dark."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, level in (("bright", 150), ("dark", 50)):
        (folder / name).mkdir()
        for number in range(24):
            pixels = generator.integers(level, level + 60, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def arguments(images: Path, output: Path, *more: str) -> list[str]:
    structure = [] if {"--model", "--model-kwargs"} & {*more} else as_options()
    return [
        *("--model", "care_tiny", "--data", f"folder:{images}", "--image-size", "32"),
        *("--batch-size", "8", "--workers", "0", "--epochs", "2", "--warmup-epochs", "0"),
        *("--lr", "1e-3", "--distillation", "none", "--hold-out", "0.25", "--output", str(output)),
        *("--log-every", "1", "--no-tensorboard", "--ema-decay", "0.9", "--threads", "1"),
        *structure,
        *more,
    ]


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Train:
    """Train with the arguments and return how it went; the run is tmp_path/care_tiny."""

    def invoke(*more: str, output: Path = tmp_path) -> Result:
        runner = click.testing.CliRunner()
        return runner.invoke(train.main, arguments(images, output, *more), catch_exceptions=True)

    return invoke


def whole(images: Path, folder: Path, *more: str) -> Path:
    result = click.testing.CliRunner().invoke(train.main, arguments(images, folder, *more))
    assert result.exit_code == 0, result.output
    return folder / "care_tiny"


@pytest.fixture(scope="module")
def plain_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(images, tmp_path_factory.mktemp("plain"), *PLAIN, "--epochs", "1")


@pytest.fixture(scope="module")
def augmented_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run(*AUGMENTED)` leaves: to read."""
    return whole(images, tmp_path_factory.mktemp("augmented"), *AUGMENTED)


@pytest.fixture
def trained(plain_run: Path, tmp_path: Path) -> Path:
    """What `run(*PLAIN, "--epochs", "1")` leaves, without training anew; tmp_path/care_tiny."""
    return Path(shutil.copytree(plain_run, tmp_path / "care_tiny"))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a run has learnt: weights, average and the optimizer's state."""
    saved = checkpoint.read_all(folder / "last.pt")
    moments = {
        f"{number}.{name}": value
        for number, state in saved["optimizer"]["state"].items()
        for name, value in state.items()
    }
    averaged = {f"ema.{name}": value for name, value in saved["model_ema"].items()}
    return {**saved["model"], **averaged, **moments}


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_mistake(result: Result, *words: str) -> None:
    """One line on standard error that has the words, exit status 2, no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    last = result.stderr.rstrip("\n")
    assert last.startswith("error: "), last
    assert "\n" not in last
    for word in words:
        assert word in last


def test_a_run_learns_and_writes_its_folder(run: Train, tmp_path: Path) -> None:
    exported = tmp_path / "exported.safetensors"
    result = run(*PLAIN, "--epochs", "3", "--export", str(exported))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "care_tiny"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("settings.yaml", "last.pt", "step-00000004.pt", "step-00000008.pt", ".lock"),
        *("best.safetensors", "log.csv", "metrics.jsonl", "summary.html"),
    }
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    steps = events(folder, "step")
    assert [event["step"] for event in steps] == list(range(1, 13))  # 36 images, 4 steps of 8
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert exported.read_bytes() == (folder / "best.safetensors").read_bytes()

    stated = checkpoint.read_metadata(exported)
    assert stated["labels"] == ["bright", "dark"]
    assert stated["validation_top1"] == max(
        max(float(row["val_top1"]), float(row["ema_top1"])) for row in rows
    )
    assert stated["preprocess"]["size"] == 32
    assert read_trained(exported).num_classes == 2


def test_tensorboard_events_are_written(run: Train, tmp_path: Path) -> None:
    assert run(*PLAIN, "--tensorboard", "--epochs", "1").exit_code == 0
    assert any((tmp_path / "care_tiny").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "more",
    [
        ["--precision", "bf16", "--clip-grad", "1"],
        ["--precision", "fp16", "--clip-grad", "0.1", "--clip-mode", "agc"],
        ["--layer-decay", "0.8", "--repeated-augmentation", "2", "--channels-last"],
        ["--mix-off-epoch", "1", "--epochs", "2"],
        ["--opt", "lamb", "--sched", "poly", "--grad-checkpointing", "--accumulate", "2"],
    ],
    ids=lambda more: more[1],
)
def test_options_work_together(run: Train, more: list[str]) -> None:
    result = run(*AUGMENTED, "--epochs", "1", *more)
    assert result.exit_code == 0, (result.output, result.exception)


def test_accumulated_batches_learn_like_one_large_batch(run: Train, tmp_path: Path) -> None:
    """With a network whose images do not see each other, unlike BatchNorm's."""
    vit = ["--model", "test_vit", "--model-kwargs", "img_size=32", "--drop-path", "0"]
    for name, more in (
        ("large", ["--batch-size", "8"]),
        ("small", ["--batch-size", "2", "--accumulate", "4"]),
    ):
        result = run(*PLAIN, *STILL, *vit, *more, "--name", name)
        assert result.exit_code == 0, (result.output, result.exception)
    large, small = ([e["loss"] for e in events(tmp_path / n, "step")] for n in ("large", "small"))
    np.testing.assert_allclose(small, large, rtol=1e-4)


def test_a_teacher_is_followed(run: Train, tmp_path: Path) -> None:
    teacher = create_model("care_tiny", num_classes=2)
    path = tmp_path / "teacher.safetensors"
    checkpoint.save(path, teacher.state_dict())
    taught = ["--teacher", "care_tiny", "--teacher-checkpoint", str(path), "--epochs", "1"]
    for kind in ("hard", "soft"):
        result = run(*PLAIN, *taught, "--distillation", kind, "--name", kind)
        assert result.exit_code == 0, (result.output, result.exception)
    losses = [events(tmp_path / kind, "step")[0]["loss"] for kind in ("hard", "soft")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_second_run_reads_what_the_teacher_said(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "teacher.safetensors"
    checkpoint.save(path, create_model("care_tiny", num_classes=2).state_dict())
    flags = [*AUGMENTED, "--teacher", "care_tiny", "--teacher-checkpoint", str(path)]
    flags += ["--distillation", kind, "--epochs", "1", "--accumulate", "2", "--batch-size", "4"]
    cache = ["--teacher-cache", str(tmp_path / "answers")]
    assert run(*flags, "--name", "plain").exit_code == 0
    assert run(*flags, *cache, "--name", "first").exit_code == 0
    monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("it was asked again"))
    result = run(*flags, *cache, "--name", "second")
    assert result.exit_code == 0, (result.output, result.exception)
    losses = [
        [event["loss"] for event in events(tmp_path / name, "step")]
        for name in ("plain", "first", "second")
    ]
    assert losses[0] == losses[1] == losses[2]
    # Another seed shows it other images.
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        run(*flags, *cache, "--name", "third", "--seed", "7")


def test_a_teacher_of_other_classes_is_refused(run: Train, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    checkpoint.save(path, create_model("care_tiny", num_classes=3).state_dict())
    result = run(
        "--distillation", "hard", "--teacher", "care_tiny", "--teacher-checkpoint", str(path)
    )  # fmt: skip
    assert_mistake(result, "teacher.safetensors", "head.fc.weight")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a run be interrupted by Ctrl-C, out of the blue, in the step after `steps` whole ones."""
    original = train.Course._step

    def interrupted(course: train.Course, *rest: Any) -> None:
        original(course, *rest)
        if course.learner.steps == steps + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Course, "_step", interrupted)


def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augmented_run: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        assert run(*AUGMENTED, output=tmp_path / "parts").exit_code == 130
    result = run(*AUGMENTED, "--resume", output=tmp_path / "parts")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "going on after epoch 1" in result.output

    whole, parts = augmented_run, tmp_path / "parts/care_tiny"
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    steps = [(e["step"], e["loss"], e["lr"]) for e in events(whole, "step")]
    assert steps == [(e["step"], e["loss"], e["lr"]) for e in events(parts, "step")]
    assert len((parts / "log.csv").read_text().splitlines()) == 3


def test_a_run_that_was_ended_while_it_was_judged_is_judged_first(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augmented_run: Path
) -> None:

    def interrupted(job: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", interrupted)
        assert run(*AUGMENTED, output=tmp_path / "parts").exit_code == 130
    assert events(tmp_path / "parts/care_tiny", "epoch") == []
    assert run(*AUGMENTED, "--resume", output=tmp_path / "parts").exit_code == 0
    whole, parts = augmented_run, tmp_path / "parts/care_tiny"
    expected, found = weights(whole), weights(parts)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    scores = [[(e["epoch"], e["val_loss"]) for e in events(f, "epoch")] for f in (whole, parts)]
    assert scores[0] == scores[1]


def test_statistics_are_averaged_before_they_are_saved(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one process would be all that is left when the run is killed while it is judged."""
    order: list[str] = []
    for owner, name in ((World, "average_statistics"), (RunFolder, "save_last")):
        original = getattr(owner, name)

        def noted(
            *arguments: Any, name: str = name, original: Callable[..., None] = original
        ) -> None:
            order.append(name)
            original(*arguments)

        monkeypatch.setattr(owner, name, noted)
    assert run(*PLAIN, "--epochs", "1", "--save-minutes", "0").exit_code == 0
    assert order == ["average_statistics", "save_last", "save_last"]


def at_step(monkeypatch: pytest.MonkeyPatch, steps: int, act: Callable[[], object]) -> None:
    """Do something right after so many steps of a run."""
    original = train.Course._step

    def acting(course: train.Course, *rest: Any) -> None:
        original(course, *rest)
        if course.learner.steps == steps:
            act()

    monkeypatch.setattr(train.Course, "_step", acting)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_in_the_middle_of_an_epoch_loses_nothing(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    number = getattr(signal, name)
    # Shells let SIGINT be ignored by what runs in the background, and nohup does so with SIGHUP.
    plain = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, plain)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        try:
            assert run(*PLAIN, "--save-minutes", "0").exit_code == code
        finally:
            signal.signal(number, before)
    assert checkpoint.read_all(tmp_path / "care_tiny/last.pt")["steps"] == 3
    result = run(*PLAIN, "--epochs", "2", "--resume")
    assert "going on after epoch 0 and 3 steps" in result.output
    assert [e["step"] for e in events(tmp_path / "care_tiny", "step")] == list(range(1, 9))


def test_the_end_of_a_slot_saves_and_goes_on(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert run(*PLAIN, "--epochs", "1", "--keep", "9", "--save-minutes", "0").exit_code == 0
    assert {path.name for path in (tmp_path / "care_tiny").glob("*.pt")} == {
        "step-00000003.pt",
        "last.pt",
    }


def test_a_folder_in_use_is_refused(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    monkeypatch.setattr("care.runs._LOCK_SECONDS", 0.05)
    before = digest(trained)
    with filelock.FileLock(tmp_path / "care_tiny/.lock"):
        for more in ("--resume", "--overwrite"):
            assert_mistake(run(*PLAIN, "--epochs", "1", more), "another process trains in")
    assert digest(trained) == before


def test_torchrun_starting_anew_goes_on_whatever_was_asked_for(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    """`--overwrite` used to wipe the run at each restart."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run(*PLAIN, "--epochs", "1", "--overwrite")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "going on after epoch 1" in result.output


def test_a_run_is_amended_and_that_is_recorded(run: Train, tmp_path: Path) -> None:
    folder = tmp_path / "care_tiny"
    assert run(*PLAIN, "--amend", "lr=1e-4").exit_code == 2
    result = run(*PLAIN, "--sched", "none", "--epochs", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    again = (*PLAIN, "--sched", "none", "--epochs", "1", "--resume")
    assert_mistake(run(*again, "--amend", "seed=1"), "seed cannot change within a run")
    result = run(*again, "--amend", "lr=1e-4", "--amend", "epochs=2")
    assert result.exit_code == 0, (result.output, result.exception)
    assert [event["lr"] for event in events(folder, "step")] == [1e-3] * 4 + [1e-4] * 4
    recorded = [json.loads(line) for line in (folder / "amendments.jsonl").read_text().splitlines()]
    assert recorded == [{"step": 4, "changes": {"lr": 1e-4, "epochs": 2}}]
    # Who goes on with the command of the beginning does what was amended.
    assert "2 epochs of" in run(*again).output
    assert run(*again, "--amend", "lr=1e-4").exit_code == 0
    assert (folder / "amendments.jsonl").read_text().count("\n") == 1


def test_the_same_images_a_step_may_be_shared_out_otherwise(
    run: Train, tmp_path: Path, trained: Path
) -> None:
    more = (*PLAIN, "--epochs", "1", "--resume", "--batch-size", "2")
    assert_mistake(run(*more), "total batch was 8, is 2")
    assert run(*more, "--accumulate", "4").exit_code == 0


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let some steps see an image that is not finite."""
    original = train.Course._step

    def step(course: train.Course, *rest: Any) -> None:
        plain = course.job.finish.mean
        if course.learner.steps in steps:
            course.job.finish.mean = plain * float("nan")
        original(course, *rest)
        course.job.finish.mean = plain

    monkeypatch.setattr(train.Course, "_step", step)


def test_a_step_that_is_not_finite_is_left_out_and_named(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {2, 5})
    result = run(*PLAIN)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "the loss became nan" in result.output
    assert "step 3, process 0 (" in result.output
    assert "and 5 more): the step is left out" in result.output
    skipped = events(tmp_path / "care_tiny", "skipped")
    assert [event["step"] for event in skipped] == [3, 6]
    assert len(skipped[0]["images"]) == 8
    assert events(tmp_path / "care_tiny", "epoch")[-1]["skipped"] == 2
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "care_tiny").values())


def test_too_many_of_them_in_a_row_end_the_run(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {1, 3, 4})
    assert run(*PLAIN, "--skip-limit", "3").exit_code == 0
    result = run(*PLAIN, "--skip-limit", "2", "--overwrite")
    assert_mistake_at_end(result, "2 steps in a row", "step 5", "--amend lr=")


def assert_mistake_at_end(result: Result, *words: str) -> None:
    """As `assert_mistake`, after what the run itself said."""
    assert result.exit_code == 2, (result.output, result.exception)
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


def test_unreadable_images_are_left_out_where_that_is_asked_for(
    run: Train, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(images, folder)
    for path in sorted((folder / "dark").iterdir())[:3]:
        path.write_bytes(path.read_bytes()[:60])
    more = (*PLAIN, "--data", f"folder:{folder}", "--validation", f"folder:{images}")
    result = run(*more, "--epochs", "1", "--corrupt", "skip")
    assert result.exit_code == 0, (result.output, result.exception)
    count = events(tmp_path / "care_tiny", "epoch")[0]["unreadable"]
    assert count == 3
    assert result.stderr.count("another image took its place") == count
    assert "dark/00.png is a truncated or corrupt image" in result.stderr


def test_a_full_disk_ends_a_run_or_does_not(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("care.history.write_sealed", full)
    result = run(*PLAIN, "--epochs", "1")
    assert_mistake_at_end(result, "last.pt cannot be written: the disk is full")
    result = run(*PLAIN, "--epochs", "1", "--overwrite", "--unsaved", "continue")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "the disk is full" in result.output
    assert "training goes on" in result.output


def test_the_summary_draws_what_was_measured(run: Train, tmp_path: Path) -> None:
    assert run(*PLAIN).exit_code == 0
    page = (tmp_path / "care_tiny/summary.html").read_text()
    for title in ("Loss", "Top-1", "Learning rate", "Norm of the gradient", "Waiting for images"):
        assert title in page
    assert "8 steps, 2 epochs; 0 steps left out" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    step = events(tmp_path / "care_tiny", "step")[-1]
    assert 0 <= step["data_wait"] <= 1
    assert step["gradient_norm"] > 0


def test_boards_that_are_not_installed_are_named(run: Train) -> None:
    for name in ("wandb", "mlflow"):
        if importlib.util.find_spec(name):
            pytest.skip(f"{name} is installed")
        result = run(*PLAIN, f"--{name}", "--overwrite")
        assert result.exit_code == 4
        assert f"--{name} needs a library that is not installed" in result.stderr


class Told:
    """Stands in for wandb and mlflow: notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def note(*arguments: Any, **named: Any) -> Told:
            self.calls.append((name, named or arguments))
            return self

        return note


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_boards_are_told_steps_and_epochs(
    run: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told = Told()
    monkeypatch.setitem(sys.modules, name, told)
    result = run(*PLAIN, "--epochs", "1", f"--{name}")
    assert result.exit_code == 0, (result.output, result.exception)
    names = [call for call, _ in told.calls]
    assert names[0] == {"wandb": "init", "mlflow": "start_run"}[name]
    assert names.count({"wandb": "log", "mlflow": "log_metrics"}[name]) == 5  # 4 steps, 1 epoch
    assert names[-1] == {"wandb": "finish", "mlflow": "end_run"}[name]


def test_a_finished_run_resumes_to_nothing_and_can_be_exported(
    run: Train, tmp_path: Path, trained: Path
) -> None:
    before = weights(trained)
    target = tmp_path / "new/folder/best.safetensors"
    result = run(*PLAIN, "--epochs", "1", "--resume", "--export", str(target))
    assert result.exit_code == 0, (result.output, result.exception)
    assert target.is_file()
    after = weights(trained)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_resume_without_a_run_starts_and_says_so(run: Train, tmp_path: Path) -> None:
    result = run(*PLAIN, "--epochs", "1", "--resume")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "nothing to go on from" in result.output


def test_an_existing_run_is_protected(
    run: Train, images: Path, tmp_path: Path, trained: Path
) -> None:
    folder = trained
    before = digest(folder)
    assert_mistake(run(*PLAIN, "--epochs", "1"), str(folder), "--resume", "--overwrite")
    assert_mistake(run(*PLAIN, "--epochs", "2", "--resume"), "different run", "epochs was 1, is 2")
    assert_mistake(
        run(*PLAIN, "--epochs", "1", "--model", "care_s0", "--name", "care_tiny", "--resume"),
        "model was 'care_tiny', is 'care_s0'",
    )
    assert digest(folder) == before
    assert run(*PLAIN, "--epochs", "1", "--seed", "7", "--overwrite").exit_code == 0
    assert digest(folder) != before


def test_other_images_are_another_run(run: Train, tmp_path: Path, trained: Path) -> None:
    last = tmp_path / "care_tiny/last.pt"
    saved = checkpoint.read_all(last)
    facts = {**saved.pop("metadata")["facts"], "training images": 12345}
    checkpoint.save(last, saved, {"facts": facts})
    assert_mistake(run(*PLAIN, "--epochs", "1", "--resume"), "training images was 12345, is 36")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run: Train, tmp_path: Path, augmented_run: Path
) -> None:
    """Ten flipped bits in exponents, which torch.load reads without a word."""
    folder = Path(shutil.copytree(augmented_run, tmp_path / "care_tiny"))
    expected = weights(folder)
    last = folder / "last.pt"
    data = bytearray(last.read_bytes())
    start = data.index(saved_weight(folder))
    for number in range(10):
        data[start + 4 * number + 3] ^= 0x40
    last.write_bytes(bytes(data))
    torch.load(last, weights_only=True)
    result = run(*AUGMENTED, "--resume")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "last.pt is damaged" in result.output
    assert "going on from step-00000004.pt" in result.output
    found = weights(folder)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def saved_weight(folder: Path) -> bytes:
    value = checkpoint.read_all(folder / "last.pt")["model"]["head.fc.weight"]
    return bytes(value.contiguous().numpy().tobytes())


def test_without_a_whole_checkpoint_nothing_is_resumed(
    run: Train, tmp_path: Path, trained: Path
) -> None:
    last = tmp_path / "care_tiny/last.pt"
    last.write_bytes(last.read_bytes()[:10_000])
    before = digest(trained)
    assert_mistake(run(*PLAIN, "--epochs", "1", "--resume"), "last.pt is damaged", "--overwrite")
    assert digest(trained) == before


def test_what_a_killed_save_left_is_swept(run: Train, tmp_path: Path, trained: Path) -> None:
    left = tmp_path / "care_tiny/.last.pt.12345.tmp"
    other = tmp_path / "care_tiny/.thesis.txt.tmp"
    for path in (left, other):
        path.write_text("half")
    assert run(*PLAIN, "--epochs", "1", "--resume").exit_code == 0
    assert not left.exists()
    assert other.exists()


def test_a_folder_that_is_no_run_is_left_alone(run: Train, tmp_path: Path) -> None:
    (tmp_path / "care_tiny").mkdir()
    (tmp_path / "care_tiny/thesis.txt").write_text("precious")
    assert_mistake(run(*PLAIN, "--overwrite"), "is no run")
    assert (tmp_path / "care_tiny/thesis.txt").read_text() == "precious"


def test_settings_of_another_program_make_no_run(run: Train, tmp_path: Path) -> None:
    (tmp_path / "care_tiny").mkdir()
    (tmp_path / "care_tiny/settings.yaml").write_text("theme: dark\n")
    (tmp_path / "care_tiny/last.pt").write_text("precious")
    before = digest(tmp_path / "care_tiny")
    assert_mistake(run(*PLAIN, "--epochs", "1", "--overwrite"), "is no run")
    assert digest(tmp_path / "care_tiny") == before


def test_overwriting_a_run_leaves_the_files_of_others(run: Train, tmp_path: Path) -> None:
    assert run(*PLAIN, "--epochs", "2").exit_code == 0
    folder = tmp_path / "care_tiny"
    (folder / "figures").mkdir()
    for name in ("thesis.txt", "figures/best.safetensors"):
        (folder / name).write_text("precious")
    assert run(*PLAIN, "--epochs", "1", "--overwrite").exit_code == 0
    for name in ("thesis.txt", "figures/best.safetensors"):
        assert (folder / name).read_text() == "precious"
    assert len((folder / "log.csv").read_text().splitlines()) == 2


def test_weights_are_not_exported_over_a_file_of_another_kind(run: Train, tmp_path: Path) -> None:
    target = tmp_path / "thesis.txt"
    target.write_text("precious")
    more = (*PLAIN, "--epochs", "1", "--export", str(target))
    assert_mistake(run(*more), "thesis.txt exists and was not exported")
    assert not (tmp_path / "care_tiny").exists()
    assert target.read_text() == "precious"
    target.unlink()
    for _ in range(2):
        assert run(*more, "--overwrite").exit_code == 0
    assert "model" in checkpoint.read_metadata(target)


@pytest.mark.parametrize("pair", ["pretrained=true", "checkpoint_path=x.pth", "foo=1"])
def test_arguments_that_no_checkpoint_may_state_are_refused(run: Train, pair: str) -> None:
    assert_mistake(run(*PLAIN, "--model-kwargs", pair), "--model-kwargs", pair.split("=")[0])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "care_so"], ["unknown model 'care_so'", "did you mean care_s"]),
        (["--model-kwargs", "depth=3"], ["care_tiny does not take", "depth"]),
        (["--opt", "adamm"], ["unknown optimizer 'adamm'", "did you mean adam"]),
        (["--sched", "plateau"], ["schedule 'plateau' cannot be used"]),
        (["--image-size", "40"], ["40x40", "multiples of 32"]),
        (["--data", "folder:/nowhere"], ["/nowhere"]),
        (["--data", ""], ["give --data"]),
        (["--batch-size", "64"], ["36 training images", "lower batch_size"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--init", "/nowhere.pt"], ["no checkpoint at /nowhere.pt"]),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) and "--" in value[0] else "",
)
def test_mistakes_are_one_line(run: Train, more: list[str], words: list[str]) -> None:
    assert_mistake(run(*PLAIN, *more), *words)


def test_a_learning_rate_beyond_reason_ends_the_run(run: Train) -> None:
    result = run(*PLAIN, "--lr", "1e30")
    assert_mistake_at_end(result, "the loss became", "lower the learning rate")


def test_mistakes_write_nothing(run: Train, tmp_path: Path) -> None:
    assert_mistake(run("--model", "care_so"))
    assert_mistake(run("--batch-size", "64"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_variant_is_refused(run: Train, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, create_model("care_s0", num_classes=2).state_dict())
    assert_mistake(run("--init", str(path)), "other.safetensors", "care_s0")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_is_named(run: Train, tmp_path: Path, workers: str) -> None:
    folder = tmp_path / "broken"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32)).save(folder / name / f"{number}.png")
    for number in range(8):
        path = folder / "a" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])
    result = run(*PLAIN, "--data", f"folder:{folder}", "--workers", workers)
    assert_mistake(result, "a/", "truncated or corrupt image", "replace or remove it")


def test_validation_images_must_have_the_same_classes(run: Train, tmp_path: Path) -> None:
    for name in ("x", "y", "z"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "val" / name / "0.png")
    assert_mistake(run("--validation", f"folder:{tmp_path / 'val'}"), "3 classes")


def test_the_order_of_saving_survives_a_kill_between_files(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the log of an epoch and its last.pt: done again, logged once."""
    original = RunFolder.save_last

    def killed(self: RunFolder, *rest: Any) -> None:
        if self.last.exists():
            raise KeyboardInterrupt
        original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_last", killed)
        assert run(*PLAIN).exit_code == 130
    assert run(*PLAIN, "--resume").exit_code == 0
    assert [e["epoch"] for e in events(tmp_path / "care_tiny", "epoch")] == [1, 2]
    assert len((tmp_path / "care_tiny/log.csv").read_text().splitlines()) == 3


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def learn(rank: int, port: int, flags: list[str]) -> None:
    """One of two processes, as torchrun starts them."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train.main(flags, standalone_mode=False)


def test_two_processes_learn_like_one(images: Path, run: Train, tmp_path: Path) -> None:
    """Eight steps of two processes follow the same loss curve as one with the same batch.

    `test_a_run_goes_on_with_other_numbers_of_processes` starts them by torchrun itself.
    """
    same = [*PLAIN, *STILL, "--epochs", "2", "--drop-path", "0", "--sync-bn"]
    alone = run(*same, output=tmp_path / "one")
    assert alone.exit_code == 0, alone.output
    two = [*arguments(images, tmp_path / "two", *same), "--batch-size", "4"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_apart(learn, [(rank, port, two) for rank in range(2)]) == [0, 0]
    curves = [
        [event["loss"] for event in events(tmp_path / name / "care_tiny", "step")]
        for name in ("one", "two")
    ]
    assert len(curves[0]) == 8
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
    found, expected = (events(tmp_path / n / "care_tiny", "epoch")[-1] for n in ("two", "one"))
    assert found["val_top1"] == pytest.approx(expected["val_top1"])


STOPPING = """
import os, signal, sys
from care import train

stop = int(sys.argv.pop(1))
original = train.Course._step

def step(course, batches):
    original(course, batches)
    if course.learner.steps == stop:
        os.kill(os.getpid(), signal.SIGTERM)

train.Course._step = step
train.main()
"""
"""A training that gets SIGTERM after a step."""


@pytest.mark.soak
def test_a_run_goes_on_with_other_numbers_of_processes(images: Path, tmp_path: Path) -> None:
    """Two, one and two processes follow the curve of one alone, to the tolerance of the docs."""
    script = tmp_path / "stopping.py"
    script.write_text(STOPPING)
    same = [*PLAIN, *STILL, "--epochs", "5", "--drop-path", "0", "--sync-bn", "--resume"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two, one = [*launcher, "--standalone"], [sys.executable]

    def started(start: list[str], stop: int, batch: str, name: str) -> int:
        flags = arguments(images, tmp_path / name, *same, "--batch-size", batch)
        command = [*start, str(script), str(stop), *flags]
        result = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert (result.returncode == 0) is (stop > 20), result.stderr
        return len(events(tmp_path / name / "care_tiny", "step"))

    assert started(one, 99, "8", "alone") == 20
    reached = [started(two, 6, "4", "shared"), started(one, 12, "8", "shared")]
    assert 6 <= reached[0] < reached[1] < 20
    assert started(two, 99, "4", "shared") == 20
    alone, shared = (
        [event["loss"] for event in events(tmp_path / name / "care_tiny", "step")]
        for name in ("alone", "shared")
    )
    np.testing.assert_allclose(shared, alone, rtol=1e-3)
