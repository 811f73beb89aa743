from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from care import checkpoint, evaluate, finetune, job, train
from care.data import hold_out, open_dataset
from care.distributed import World
from care.factory import create_model
from care.learner import Learner
from care.losses import DistillationLoss
from care.settings import TrainSettings
from pipeline.core.described import describe
from pipeline.core.errors import CheckpointError, ConfigError, ModelError

Result = click.testing.Result
Train = Callable[..., Result]
TINY = "test_resnet.r160_in1k"
CARE_HEAD = ("head.fc.weight", "head.fc.bias", "dist_head.fc.weight", "dist_head.fc.bias")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8 noisy images each, told apart by their brightness."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, level in (("bright", 180), ("dark", 20), ("middle", 100)):
        (folder / name).mkdir()
        for number in range(8):
            pixels = generator.integers(level, level + 60, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Train:
    """Train for an epoch of one step with the arguments; the run is tmp_path/run."""

    def invoke(*more: str) -> Result:
        arguments = [
            *("--model", "care_tiny", "--data", f"folder:{images}", "--image-size", "32"),
            *("--batch-size", "18", "--workers", "0", "--epochs", "1", "--warmup-epochs", "0"),
            *("--lr", "1e-3", "--distillation", "none", "--hold-out", "0.25", "--name", "run"),
            *("--output", str(tmp_path), "--no-tensorboard", "--threads", "1", *more),
        ]
        return click.testing.CliRunner().invoke(train.main, arguments)

    return invoke


def trained(result: Result, tmp_path: Path) -> dict[str, torch.Tensor]:
    assert result.exit_code == 0, (result.output, result.exception)
    return checkpoint.read(tmp_path / "run" / "best.safetensors")


def saved(path: Path, name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(7)
    made = create_model(name, **kwargs)
    checkpoint.save(path, made.state_dict())
    return made


def begun(init: str, name: str, classes: int, **kwargs: Any) -> tuple[nn.Module, finetune.Start]:
    def create(count: int) -> nn.Module:
        return create_model(name, num_classes=count, **kwargs)

    model = create(classes)
    return model, finetune.begin(init, name, model, create, lambda: create(1000))


def same(model: nn.Module, other: nn.Module, without: tuple[str, ...]) -> bool:
    own, given = model.state_dict(), other.state_dict()
    return all(torch.equal(own[n], given[n]) for n in own if n not in without)


def test_a_head_of_another_size_is_made_anew_and_named(run: Train, tmp_path: Path) -> None:
    path = tmp_path / "ten.pth"
    other = saved(path, "care_tiny", num_classes=10)
    result = run("--init", str(path), "--freeze")
    state = trained(result, tmp_path)
    assert f"starting from {path}; made anew for 3 classes: head.fc.weight, head.fc.bias, " in (
        result.output
    )
    assert state["head.fc.weight"].shape[0] == 3
    body = {n: v for n, v in other.state_dict().items() if n not in CARE_HEAD}
    assert all(torch.equal(state[name], value) for name, value in body.items())
    learning = sum(state[name].numel() for name in CARE_HEAD)
    assert f"the body is frozen: {learning:,} parameters learn" in result.output


def test_the_embedded_weights_are_a_start(run: Train, tmp_path: Path) -> None:
    state = trained(run("--init", "embedded", "--freeze"), tmp_path)
    path = checkpoint.embedded()
    assert path is not None
    body = checkpoint.read(path)
    assert all(torch.equal(state[n], value) for n, value in body.items() if n not in CARE_HEAD)


def test_only_networks_that_the_package_carries_have_embedded_weights(run: Train) -> None:
    result = run("--init", "embedded", "--model", TINY)
    assert result.exit_code == 2
    assert f"the package carries no weights of {TINY}: name a checkpoint file" in result.stderr


def test_timms_weights_are_a_start(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    torch.manual_seed(5)
    published: nn.Module = timm.create_model(TINY)
    asked: list[Any] = []

    def create_pretrained(name: str, **kwargs: Any) -> nn.Module:
        asked.append((name, kwargs))
        return published

    monkeypatch.setattr(job, "create_pretrained", create_pretrained)
    settings = TrainSettings(
        model=TINY,
        init="pretrained",
        data=f"folder:{images}",
        image_size=32,
        hold_out=0.25,
        batch_size=18,
        workers=0,
        distillation="none",
    )
    made = job.prepare(settings, World(0, 1, torch.device("cpu")))
    assert asked == [(TINY, {})]
    assert made.start is not None
    assert made.start.remade == ("fc.weight", "fc.bias")
    assert made.start.origin == f"timm's weights {TINY} (apache-2.0)"
    assert same(made.learner.model, published, made.start.remade)


def test_without_a_way_to_timms_weights_one_line_says_so(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*rest: Any, **kwargs: Any) -> nn.Module:
        raise OSError("Network is unreachable\nand much more")

    monkeypatch.setattr(job, "create_pretrained", fail)
    result = run("--init", "pretrained", "--model", TINY)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: --init pretrained: timm's weights of {TINY} cannot be had (OSError: Network is "
        "unreachable): name a checkpoint file"
    )


def test_a_network_without_published_weights_says_so(run: Train) -> None:
    result = run("--init", "pretrained", "--model", "care_s0")
    assert result.exit_code == 2
    assert "care_s0 has no weights to download" in result.stderr


def test_a_head_of_the_same_size_is_taken_over(tmp_path: Path) -> None:
    other = saved(tmp_path / "x.safetensors", TINY, num_classes=3)
    model, start = begun(str(tmp_path / "x.safetensors"), TINY, 3)
    assert start.remade == ()
    assert start.words(3) == f"starting from {tmp_path / 'x.safetensors'}"
    assert same(model, other, ())


def test_a_published_body_without_a_head_is_a_start(tmp_path: Path) -> None:
    other = saved(tmp_path / "x.pt", TINY, num_classes=0)
    model, start = begun(str(tmp_path / "x.pt"), TINY, 3)
    assert start.remade == ("fc.weight", "fc.bias")
    assert all(torch.equal(model.state_dict()[n], v) for n, v in other.state_dict().items())


def test_other_layouts_are_read_with_another_head_too(tmp_path: Path) -> None:
    """Lightning's prefix, and torchvision's own names, which a filter of timm's reads."""
    made = create_model(TINY, num_classes=7)
    prefixed = {f"model.{name}": value for name, value in made.state_dict().items()}
    checkpoint.save(tmp_path / "x.pt", prefixed)
    model, start = begun(str(tmp_path / "x.pt"), TINY, 3)
    assert same(model, made, start.remade)

    vit = {"img_size": 32}
    original = create_model("deit_tiny_patch16_224", num_classes=7, **vit)
    published = {"model": original.state_dict()}
    torch.save(published, tmp_path / "y.pth")
    model, start = begun(str(tmp_path / "y.pth"), "deit_tiny_patch16_224", 3, **vit)
    assert start.remade == ("head.weight", "head.bias")
    assert same(model, original, start.remade)


def test_more_than_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The number of classes is no excuse for another width, or for a name that is missing."""
    path = tmp_path / "x.pt"
    state = saved(path, TINY, num_classes=10).state_dict()
    del state["conv1.0.weight"]
    state["bn1.weight"] = torch.ones(99)
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match="conv1") as caught:
        begun(str(path), TINY, 3)
    assert "missing conv1.0.weight" in str(caught.value)
    assert "bn1.weight (is 99" in str(caught.value)
    assert "fc." not in str(caught.value)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = saved(path, TINY, num_classes=10).state_dict()
    state["fc.weight"] = torch.ones(10, 99)
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match=r"fc.weight \(is 10x99"):
        begun(str(path), TINY, 3)


def test_a_shape_of_anybody_makes_nothing_large(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = saved(path, TINY, num_classes=10).state_dict()
    state["fc.weight"] = torch.empty(1).expand(10**9, 1)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        begun(str(path), TINY, 3)


def test_the_classes_of_a_head_are_those_of_its_weights() -> None:
    model = create_model("care_tiny", num_classes=3)
    other = create_model("care_tiny", num_classes=9).state_dict()
    assert finetune.head_classes(other, model) == 9
    assert finetune.head_classes({f"model.{k}": v for k, v in other.items()}, model) == 9
    assert finetune.head_classes({"stem.weight": torch.ones(4, 3, 3, 3)}, model) is None
    assert finetune.head_classes(nn.Linear(2, 3).state_dict(), nn.Linear(2, 3)) is None


def test_training_draws_the_same_numbers_whatever_it_starts_from(tmp_path: Path) -> None:
    saved(tmp_path / "x.pt", TINY, num_classes=10)
    drawn = []
    for init in (None, str(tmp_path / "x.pt")):
        torch.manual_seed(3)
        if init is None:
            create_model(TINY, num_classes=3)
        else:
            begun(init, TINY, 3)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def learner(model: nn.Module, **settings: Any) -> Learner:
    made = TrainSettings(**{"lr": 0.1, "warmup_epochs": 0, "mixup": 0, "cutmix": 0, **settings})
    return Learner(made, model, DistillationLoss(nn.CrossEntropyLoss()), 4, World(0, 1, CPU))


CPU = torch.device("cpu")
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_a_frozen_body_changes_in_nothing(tmp_path: Path) -> None:
    """Neither its weights, nor BatchNorm's statistics; and nothing in it is dropped at random."""
    model = create_model(TINY, num_classes=3, drop_path_rate=0.5)
    finetune.freeze_body(model)
    found = learner(model, ema_decay=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found.begin_training()
    found.learn(IMAGES, TARGETS, step=True)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"fc.weight", "fc.bias"}
    assert model.training
    assert torch.equal(model.forward_features(IMAGES), model.forward_features(IMAGES))  # type: ignore[operator]
    again = learner(model, ema_decay=0.9)
    again.restore(found.state())
    assert again.steps == 1


def test_what_is_not_frozen_trains_as_ever() -> None:
    found = learner(create_model(TINY, num_classes=3))
    found.model.eval()
    found.begin_training()
    assert all(module.training for module in found.model.modules())


def test_both_heads_of_a_frozen_network_learn() -> None:
    model = create_model("care_tiny", num_classes=3)
    finetune.freeze_body(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(CARE_HEAD)
    finetune.set_training(model)
    assert isinstance(model(torch.zeros(2, 3, 32, 32)), tuple)  # the pair, as in training


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_the_body_learns_by_a_share_of_the_rate(layer_decay: float | None, sched: str) -> None:
    model = create_model(TINY, num_classes=3)
    more: dict[str, Any] = {"layer_decay": layer_decay, "sched": sched}
    plain, slow = learner(model, **more), learner(model, body_lr_factor=0.1, **more)
    for steps in (0, 5):
        plain.go_to(steps)
        slow.go_to(steps)
        rates: dict[int, list[float]] = {}
        decays: dict[int, list[float]] = {}
        for found in (plain, slow):
            for group in found.optimizer.param_groups:
                for parameter in group["params"]:
                    rates.setdefault(id(parameter), []).append(group["lr"])
                    decays.setdefault(id(parameter), []).append(group["weight_decay"])
        for name, parameter in model.named_parameters():
            before, after = rates[id(parameter)]
            assert after == pytest.approx(before * (1.0 if name.startswith("fc.") else 0.1))
            assert len(set(decays[id(parameter)])) == 1
        assert slow.learning_rate == pytest.approx(plain.learning_rate)


def test_without_a_schedule_layers_have_their_share_of_the_rate() -> None:
    """timm's schedules alone multiply by it: without one, layer_decay did nothing."""
    found = learner(create_model(TINY, num_classes=3), layer_decay=0.5, sched="none")
    rates = {group["lr"] for group in found.optimizer.param_groups}
    assert max(rates) == 0.1
    assert min(rates) < 0.05


def test_a_network_that_states_no_head_is_not_frozen() -> None:
    with pytest.raises(ConfigError, match="does not say which its head is"):
        finetune.freeze_body(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": True}, "give init, its weights"),
        ({"freeze": True, "init": "x.pt", "body_lr_factor": 0.1}, "leave body_lr_factor out"),
        ({"body_lr_factor": 0.0}, "greater than 0"),
        ({"init": "a\0b"}, "this is no path"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSettings(**settings)


def test_a_checkpoint_says_which_images_were_held_out(
    run: Train, images: Path, tmp_path: Path
) -> None:
    trained(run("--seed", "5"), tmp_path)
    path = tmp_path / "run" / "best.safetensors"
    described = describe(path)
    assert described.labels == ("bright", "dark", "middle")
    assert described.preprocess is not None
    assert described.preprocess.size == 32
    assert described.hold_out is not None
    whole = open_dataset(f"folder:{images}", "train")
    assert described.hold_out.to_dict() == {"share": 0.25, "seed": 5, "identity": whole.identity()}
    kept = open_dataset(f"folder:{images}", "train")
    _, held_out = hold_out(kept, described.hold_out.share, described.hold_out.seed)
    assert len(held_out) == checkpoint.read_metadata(path)["validation_images"] == 6


def test_images_of_their_own_for_validation_are_not_held_out(
    run: Train, images: Path, tmp_path: Path
) -> None:
    trained(run("--validation", f"folder:{images}"), tmp_path)
    assert describe(tmp_path / "run" / "best.safetensors").hold_out is None


def test_a_run_from_a_checkpoint_goes_on(run: Train, tmp_path: Path) -> None:
    path = tmp_path / "ten.safetensors"
    saved(path, "care_tiny", num_classes=10)
    more = ["--init", str(path), "--body-lr-factor", "0.1"]
    assert run(*more).exit_code == 0
    result = run(*more, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert run("--init", "embedded", "--resume").exit_code == 2


def test_the_word_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("embedded"), TINY, num_classes=3)
    with pytest.raises(ModelError, match="carries no weights"):
        begun("embedded", TINY, 3)
    assert begun("./embedded", TINY, 3)[1].remade == ()


def test_an_evaluation_counts_what_was_held_out_alone(
    run: Train, images: Path, tmp_path: Path
) -> None:
    trained(run(), tmp_path)
    path = tmp_path / "run" / "best.safetensors"
    data = ["--data", f"folder:{images}", "--json"]
    judge = click.testing.CliRunner().invoke
    told = judge(evaluate.main, [str(path), *data])
    assert told.exit_code == 0, told.output
    assert "only the 6 images count that training held out, of 24" in told.output
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["images"] == 6
    assert found["top1"] == checkpoint.read_metadata(path)["validation_top1"]
    asked = judge(evaluate.main, [str(path), *data, "--split", "train"])
    assert json.loads(asked.stdout.splitlines()[-1])["images"] == 24


def test_published_weights_of_another_structure_are_refused() -> None:
    model = create_model(TINY, num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight would have another shape") as told:
        finetune.begin(
            *("pretrained", TINY, model, lambda count: create_model(TINY, num_classes=count)),
            lambda: create_model(TINY, in_chans=1),
        )
    assert "fc." not in str(told.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
