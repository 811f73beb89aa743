from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from care import settings
from care.settings import TrainSettings, read
from pipeline.core.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def config(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_networks() -> None:
    recipe = TrainSettings()
    assert recipe.learning_rate(12 * 128) == 2.5e-3
    assert (recipe.opt, recipe.weight_decay, recipe.epochs, recipe.warmup_epochs) == (
        "adamw",
        0.05,
        300,
        20,
    )
    assert (recipe.warmup_lr, recipe.min_lr, recipe.sched) == (1e-6, 1e-5, "cosine")
    assert (recipe.drop_path, recipe.smoothing, recipe.mixup, recipe.cutmix) == (0.1, 0.1, 0.8, 1.0)
    assert (recipe.auto_augment, recipe.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (recipe.distillation, recipe.distillation_weight) == ("hard", 0.5)
    assert recipe.teacher.startswith("regnety_160")


def test_the_learning_rate_scales_with_the_batch_unless_given() -> None:
    assert TrainSettings().learning_rate(768) == 1.25e-3
    assert TrainSettings(lr=1e-3).learning_rate(768) == 1e-3


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = config(tmp_path, "epochs: 30\nwarmup_epochs: 1\nlr: 1e-3\nscale: [0.5, 1]\n")
    found = read(path, {"epochs": "40"})
    assert (found.epochs, found.lr, found.scale) == (40, 1e-3, (0.5, 1.0))


def test_an_optional_setting_is_switched_off_by_name() -> None:
    assert read(None, {"auto_augment": "none"}).auto_augment is None
    assert read(None, {"distillation": "none"}).distillation == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"train.yaml:1: unknown setting 'epoch'; did you mean epochs\?"),
        ("epochs: many", r"train.yaml:1: epochs: .*integer.*not 'many'"),
        ("epochs: 0", "epochs: .*greater than or equal to 1, not 0"),
        ("precision: fp8", "precision: .*'fp32', 'bf16' or 'fp16'"),
        ("- epochs", "train.yaml:1: a configuration is a mapping of keys"),
        ("epochs: [", r"train.yaml:1: no valid YAML"),
        ("epochs: 5", "warmup_epochs 20 leaves nothing of the 5 epochs"),
        ("batch_size: 31", "batch_size 31 must be even"),
        ("scale: [1.0, 0.5]", "the smaller first"),
        ("resume: true\noverwrite: true", "exclude each other"),
        ("quantize: ort/int9", r"quantize: there is ort/int8, ort/int7.*not 'ort/int9'"),
        ("quantize: ort/int7", "fine-tunes what was trained in float32: give init"),
        ("quantize: ort/int7\ninit: embedded\nprecision: bf16", "in float32 .*: not bf16"),
        ("distillation: none\nteacher_cache: x", "keeps what a teacher says"),
        ("quantize: ort/int7\ninit: embedded\ncompile: true", "leave compile out"),
        ("quantize: ort/int7\ninit: embedded\nsync_bn: true", "leave sync_bn out"),
        ("quantize: ort/int7\ninit: embedded\nbody_lr_factor: 0.5", "leave body_lr_factor out"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(config(tmp_path, text), {})
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--batch-size: .*not 'x'"):
        read(config(tmp_path, "seed: 1"), {"batch_size": "x"})
    with pytest.raises(
        ConfigError, match=r"unknown setting 'batchsize'; did you mean batch_size\?"
    ):
        read(None, {"batchsize": 3})


def test_freezing_takes_a_recipe_for_a_body_that_learns(tmp_path: Path) -> None:
    """As docs/training.md does, by the recipe for fine-tuning that we ship."""
    frozen = read(CONFIGS / "finetune.yaml", {"freeze": True, "init": "embedded"})
    assert (frozen.freeze, frozen.body_lr_factor) == (True, 1.0)
    assert read(CONFIGS / "finetune.yaml", {"init": "embedded"}).body_lr_factor == 0.1
    for text, flags in (
        ("freeze: true\ninit: embedded\nbody_lr_factor: 0.5", {}),
        ("init: embedded", {"freeze": True, "body_lr_factor": 0.5}),
    ):
        with pytest.raises(ConfigError, match="leave body_lr_factor out"):
            read(config(tmp_path, text), flags)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        read(tmp_path / "absent.yaml", {})


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert read(config(tmp_path, "# nothing\n"), {}) == TrainSettings()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train_*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_that_we_ship_are_valid(path: Path) -> None:
    assert read(path, {}).data


def test_the_identity_leaves_out_what_cannot_change_the_result() -> None:
    recipe = TrainSettings()
    same = recipe.model_copy(update={"workers": 2, "name": "x", "log_every": 3, "resume": True})
    assert same.identity() == recipe.identity()
    assert same.digest() == recipe.digest()
    assert recipe.model_copy(update={"lr": 1.0}).digest() != recipe.digest()
    # The same images a step may be shared out otherwise; how many they are is a fact of the run.
    shared = recipe.model_copy(update={"batch_size": 64, "accumulate": 2})
    assert shared.identity() == recipe.identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrr": 1}, r"--amend: unknown setting 'lrr'; did you mean lr\?"),
        ({"model": "care_s1"}, "--amend: model cannot change within a run"),
        ({"seed": 1}, "--amend: seed cannot change within a run"),
        ({"opt": "sgd"}, "--amend: opt cannot change within a run"),
        ({"lr": -1}, "--amend: --lr: .*greater than 0"),
    ],
)
def test_what_cannot_be_amended_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings().amended(changes)


def test_amended_settings_differ_in_what_was_amended_alone() -> None:
    found = TrainSettings().amended({"lr": 1e-3, "clip_grad": 5, "precision": "bf16"})
    expected = {"lr": 1e-3, "clip_grad": 5.0, "precision": "bf16"}
    assert found == TrainSettings().model_copy(update=expected)


@settings.options
def _main(**flags: object) -> None:
    click.echo(sorted(settings.given(flags).items()))


command = click.command(cls=settings.SettingsCommand)(_main)


def test_every_setting_is_a_flag_with_help() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=200).output.split())
    for key, field in TrainSettings.model_fields.items():
        assert f"--{key.replace('_', '-')}" in text
        assert field.description
        assert " ".join(field.description.split()) in text
    for section in ("Model:", "Data:", "Augmentation:", "Optimization:", "Distillation:"):
        assert section in text


def test_only_flags_that_are_used_are_given() -> None:
    assert CliRunner().invoke(command, []).output.strip() == "[]"
    result = CliRunner().invoke(
        command,
        [
            "--epochs",
            "3",
            "--no-tensorboard",
            "--scale",
            "0.5",
            "1",
            "--model-kwargs",
            "init_value=0.1",
        ],
    )
    assert result.output.strip() == (
        "[('epochs', '3'), ('model_kwargs', {'init_value': 0.1}), "
        "('scale', ('0.5', '1')), ('tensorboard', False)]"
    )


def test_a_misspelt_flag_is_one_line_with_a_suggestion() -> None:
    result = CliRunner().invoke(command, ["--epoch", "3"])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert "--epochs" in result.output


def test_pairs_need_an_equals_sign() -> None:
    result = CliRunner().invoke(command, ["--model-kwargs", "init_value"])
    assert result.exit_code == 2
    assert "KEY=VALUE" in result.output


# The same kinds of odd files as in the pipeline's configuration: there is one reader.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: !!int abc", r"train\.yaml:1: 'abc' is no whole number"),
        ("lr: .nan", r"train\.yaml:1: \.nan is no number"),
        ("a: &a [*a]", r"train\.yaml:1: this value holds itself"),
        ("a: " + 5000 * "[", "nested deeper than 50 levels"),
        ("seed: -1", r"train\.yaml:1: seed: .*greater than or equal to 0"),
        ("threads: 1000000000", r"train\.yaml:1: threads: .*less than"),
        ("workers: 1000000000", r"train\.yaml:1: workers: .*less than"),
        ("batch_size: 1000000000", r"train\.yaml:1: batch_size: .*less than"),
        ("image_size: 1000000000", r"train\.yaml:1: image_size: .*less than"),
        ("epochs: 1000000000000", r"train\.yaml:1: epochs: .*less than"),
        (f"output: {300 * 'x'}", r"train\.yaml:1: output: this has a name of 300 bytes"),
        (f"name: {300 * 'x'}", r"train\.yaml:1: name: this has a name of 300 bytes"),
        ("model_kwargs: {depth: 100000}", r"train\.yaml:1: model_kwargs: depth is at most 1000"),
        ("extends: /dev/zero", r"train\.yaml:1: extends: /dev/zero does not end in"),
    ],
)
def test_odd_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(config(tmp_path, text), {})
    assert "\n" not in str(caught.value)


def test_a_file_may_extend_another_and_name_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA", "folder:/data/2025-02-30")
    monkeypatch.setenv("SEED", "7")
    (tmp_path / "base.yaml").write_text("data: ${DATA}\nseed: ${SEED}\nlr: 0.1\nepochs: x\n")
    with pytest.raises(ConfigError, match=r"base\.yaml:4: epochs: .*not 'x'"):
        read(config(tmp_path, "extends: base.yaml"), {})
    found = read(config(tmp_path, "extends: base.yaml\nepochs: 30\nlr: 0.2"), {})
    assert (found.data, found.seed, found.lr) == ("folder:/data/2025-02-30", 7, 0.2)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = read(config(tmp_path, "output: ~/runs"), {"init": "~/x.pth"})
    assert (found.output, found.init) == (Path("/home/me/runs"), "/home/me/x.pth")


def test_an_odd_value_of_a_network_argument_names_the_flag() -> None:
    result = CliRunner().invoke(command, ["--model-kwargs", "depth=!!int x"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --model-kwargs depth:1: 'x' is no whole number")
