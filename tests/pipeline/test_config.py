from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.core import machine
from pipeline.core.errors import ConfigError

ROOT = Path(__file__).parents[2]

MINIMAL = """\
name: trial
model:
  name: care_tiny
  checkpoint: embedded
data:
  validation: fashion-mnist
  calibration: fashion-mnist
targets:
  ort:
    precisions: [fp32]
"""


def load(folder: Path, text: str) -> config.Config:
    path = folder / "p.yaml"
    path.write_text(text)
    return config.load(path)


def test_minimal(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL)
    assert loaded.folder == Path("engines/trial")
    assert loaded.precisions("ort") == ("fp32",)
    assert loaded.precisions("trt") == ()
    assert loaded.target("trt") is None
    assert loaded.export.opset == 20
    assert loaded.gates("ort").max_top1_drop is None


def test_a_target_may_have_gates_of_its_own(tmp_path: Path) -> None:
    text = MINIMAL + "    gates: {min_agreement: 0.9}\nvalidation: {gates: {max_top1_drop: 0.1}}\n"
    loaded = load(tmp_path, text)
    assert loaded.gates("ort").min_agreement == 0.9
    assert loaded.gates("ort").max_top1_drop is None
    assert loaded.gates("trt").max_top1_drop == 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("checkpoint:", "chekpoint:", r"p\.yaml:4: model\.chekpoint: unknown key; did you mean ch"),
        ("checkpoint:", "chekpoint:", r"p\.yaml:2: model\.checkpoint: is missing"),
        ("  ort:", "  orto:", r"p\.yaml:9: targets\.orto: unknown key; did you mean ort\?"),
        ("[fp32]", "[fp31]", r"p\.yaml:10: targets\.ort\.precisions\.0: .*'fp32'.*not 'fp31'"),
        ("[fp32]", "fp32", r"p\.yaml:10: targets\.ort\.precisions: .*not 'fp32'"),
        ("[fp32]", "[]", r"p\.yaml:10: targets\.ort\.precisions: .*at least 1 item"),
        ("name: trial", "name: 'a/b'", r"p\.yaml:1: name: .*not 'a/b'"),
        ("name: trial", "name: trial\nexport: {opset: '20'}", r"export\.opset: .*not '20'"),
        ("name: trial", "name: trial\nexport: {batch: 0}", r"export\.batch: "),
        ("name: trial", "name: trial\nbench: {batches: 1}", r"bench\.batches: .*not 1"),
        (
            "checkpoint: embedded",
            "checkpoint: random\n  kwargs: {checkpoint_path: evil.pth}",
            r"p\.yaml:5: model\.kwargs: checkpoint_path cannot be an argument .*: weights come",
        ),
        (
            "checkpoint: embedded",
            "checkpoint: random\n  kwargs: {pretrained_cfg: {url: 'http://x'}}",
            r"p\.yaml:5: model\.kwargs: pretrained_cfg cannot be an argument",
        ),
        ("  ort:\n    precisions: [fp32]", "  {}", "targets is empty: name at least one of trt"),
        (
            "    precisions: [fp32]",
            "    precisions: [fp32]\n    treads: 2",
            r"targets\.ort\.treads: unknown key; did you mean threads\?",
        ),
    ],
)
def test_mistakes_name_line_key_and_remedy(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, MINIMAL.replace(old, new))


PREPROCESS = "{size: 32, crop: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"


def with_lines(*lines: str) -> str:
    """The minimal configuration with further lines from line 11 on."""
    return MINIMAL + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export: {simplify_timeout_s: 10000000000000000}", "export.simplify_timeout_s: "),
        ("export: {batch: 1000000000}", "export.batch: "),
        ("export: {opset: 17}", "export.opset: "),
        ("calibration: {seed: -1}", "calibration.seed: .*greater than or equal to 0, not -1"),
        ("calibration: {images: 1000000000000}", "calibration.images: "),
        ("validation: {batch: 1000000000000}", "validation.batch: "),
        ("bench: {samples: 10000000000000}", "bench.samples: "),
        ("bench: {warmup: 1000000000}", "bench.warmup: "),
        ("bench: {threads: 1000000000}", "bench.threads: "),
        ("bench: {batches: [1, 1000000000]}", "bench.batches.1: "),
        ("bench: {batches: []}", "bench.batches: .*at least 1 item"),
        ("bench: {max_seconds: 1.0e+30}", "bench.max_seconds: "),
        ("bench: {max_seconds: .inf}", ".* is no number that can be used"),
        ("validation: {gates: {max_latency_ms: .nan}}", ".* is no number that can be used"),
        ("export: {simplify_timeout_s: 1" + 30 * "0" + "}", ".* is too large a number"),
    ],
)
def test_numbers_that_never_end_are_refused_with_their_line(
    tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"p\.yaml:12: {message}"):
        load(tmp_path, with_lines("", line))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: 32", "size: 1000000000", "size: is at most 9459 pixels"),
        ("size: 32", "size: 0", "size: is a positive number of pixels"),
        ("size: 32", "size: [32, 48]", "size: only square inputs are supported: give one number"),
        ("crop: 1.0", "crop: 1.0e-9", r"crop: is a share in \(0, 1\]"),
        ("mean: [0.5, 0.5, 0.5]", "mean: [123.7, 116.3, 103.5]", "mean: .*0 … 255, .*divide it by"),
        ("std: [0.5, 0.5, 0.5]", "std: [58.4, 57.1, 57.4]", "std: .*0 … 255, .*divide it by 255"),
        ("mean: [0.5, 0.5, 0.5]", "mean: [0.5, 0.5, -0.5]", "mean: is 0 or more"),
        ("std: [0.5, 0.5, 0.5]", "std: [0.5, 0.5, 0]", "std: is positive in every channel"),
        (
            "crop: 1.0",
            "crop: 1.0, interpolation: cubic",
            "interpolation: .*'bilinear'.*not 'cubic'",
        ),
    ],
)
def test_preprocessing_that_cannot_be_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (
        PREPROCESS.replace(old, new).replace("{", "\n  ").replace("}", "").replace(", m", "\n  m")
    )
    text = text.replace(", s", "\n  s").replace(", c", "\n  c").replace(", i", "\n  i")
    with pytest.raises(ConfigError, match=rf"p\.yaml:1[2-6]: preprocess\.{message}"):
        load(tmp_path, MINIMAL + f"preprocess:{text}\n")


def test_preprocessing_fits_its_channels_and_the_network(tmp_path: Path) -> None:
    gray = PREPROCESS.replace("crop", "channels: gray, crop")
    with pytest.raises(ConfigError, match=r"p\.yaml:11: preprocess: mean has 3 values, but gray"):
        load(tmp_path, with_lines(f"preprocess: {gray}"))
    one = MINIMAL.replace("embedded", "random\n  kwargs: {in_chans: 1}")
    with pytest.raises(
        ConfigError, match=r"p\.yaml:5: model\.kwargs\.in_chans: .* takes 1 channels"
    ):
        load(tmp_path, one + f"preprocess: {PREPROCESS}\n")
    single = gray.replace("[0.5, 0.5, 0.5]", "[0.5]")
    assert load(tmp_path, one + f"preprocess: {single}\n").model.kwargs == {"in_chans": 1}


def test_batches_that_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: 1e9)
    large = f"preprocess: {PREPROCESS.replace('32', '1000')}"  # 12 MB an image
    assert load(tmp_path, with_lines(large, "validation: {batch: 40}")).validation.batch == 40
    for line, key in (
        ("validation: {batch: 50}", "validation.batch"),
        ("validation: {batch: 1}\nbench: {batches: [1, 50]}", "bench.batches.1"),
        ("validation: {batch: 1}\nexport: {batch: 50}\nbench: {batches: [50]}", "export.batch"),
    ):
        with pytest.raises(
            ConfigError, match=rf"{key}: 50 images take 0\.6 GB, this process .* 1 GB"
        ):
            load(tmp_path, with_lines(large, line))


@pytest.mark.parametrize(
    "output", ["/dev/null", "/dev/full", "/proc/self/x", "/sys/x", "FILE", "FILE/x", 300 * "x"]
)
def test_outputs_that_cannot_be_made_are_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").touch()
    stated = output.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"p\.yaml:11: output: .*: choose another folder"):
        load(tmp_path, with_lines(f"output: {stated}"))


@pytest.mark.parametrize("inside", ["", "/engines", "/../images", "/LINK"])
def test_results_do_not_lie_among_the_images(tmp_path: Path, inside: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "to-images").symlink_to(images)
    output = f"{images}{inside}"
    if inside == "/LINK":
        output = str(tmp_path / "to-images")
    text = MINIMAL.replace("calibration: fashion-mnist", f"calibration: 'folder:{images}'")
    with pytest.raises(ConfigError, match=r"p\.yaml:11: output: .* folder of data\.calibration"):
        load(tmp_path, text + f"output: {output}\n")
    assert load(tmp_path, text + f"output: {images}-engines\n").output == Path(f"{images}-engines")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("checkpoint: embedded", f"checkpoint: {300 * 'x'}", "model.checkpoint"),
        ("validation: fashion-mnist", f"validation: folder:{300 * 'x'}", "data.validation"),
        ("calibration: fashion-mnist", f"calibration: tar:{300 * 'x'}", "data.calibration"),
    ],
)
def test_names_that_no_file_can_have_are_refused(
    tmp_path: Path, old: str, new: str, key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"p\.yaml:\d: {key}: this has a name of 300 bytes"):
        load(tmp_path, MINIMAL.replace(old, new))


def test_the_home_folder_is_found_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = MINIMAL.replace("embedded", "~/x.pth").replace(
        "validation: fashion-mnist", "validation: folder:~/images\n  labels: ~/labels.txt"
    )
    loaded = load(tmp_path, text + "output: ~/engines\n")
    assert loaded.model.checkpoint == "/home/me/x.pth"
    assert loaded.data.validation == "folder:/home/me/images"
    assert loaded.data.labels == "/home/me/labels.txt"
    assert loaded.output == Path("/home/me/engines")


def test_a_variable_is_text_and_a_number_where_one_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CKPT": "5", "SIZE": "[", "B": "16", "S": "1.5", "Q": "true"}.items():
        monkeypatch.setenv(name, value)
    text = MINIMAL.replace("embedded", "${CKPT}") + "output: ${SIZE}\n"
    lines = (
        "validation: {batch: '${B}'}",
        "bench: {max_seconds: '${S}', batches: ['${B}'], threads: '${NONE:-}'}",
        "export: {batch: '${B}', simplify: '${Q}'}",
    )
    loaded = load(tmp_path, text + "\n".join(lines))
    assert loaded.model.checkpoint == "5"
    assert loaded.output == Path("[")
    assert (loaded.validation.batch, loaded.bench.max_seconds) == (16, 1.5)
    assert (loaded.bench.batches, loaded.bench.threads) == ((16,), None)
    assert (loaded.export.batch, loaded.export.simplify) == (16, True)
    monkeypatch.setenv("B", "many")
    with pytest.raises(ConfigError, match=r"p\.yaml:12: validation\.batch: .*not 'many'"):
        load(tmp_path, text + "\n".join(lines))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("depth: 1000000", "depth is at most 1000, not 1000000"),
        ("depths: [1, [2000]]", "depths is at most 1000"),
        ("embed_dim: 10000000", "embed_dim is at most 1048576"),
        ("features_only: true", "features_only cannot be an argument"),
    ],
)
def test_arguments_that_make_no_network_are_refused(
    tmp_path: Path, kwargs: str, message: str
) -> None:
    text = MINIMAL.replace("embedded", f"random\n  kwargs: {{{kwargs}}}")
    with pytest.raises(ConfigError, match=rf"p\.yaml:5: model\.kwargs: {message}"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "options",
    [
        "ort:\n    precisions: [fp32]\n    threads: 1000000000",
        "ort:\n    precisions: [fp32]\n    tune_seconds: 1.0e+30",
        "trt:\n    precisions: [fp16]\n    batches: [1, 2, 1000000000]",
        "trt:\n    precisions: [fp16]\n    workspace_mib: 1000000000",
        "coreml:\n    precisions: [fp16]\n    calibration_images: 10000000000",
    ],
)
def test_numbers_of_targets_are_refused_too(tmp_path: Path, options: str) -> None:
    text = MINIMAL.replace("ort:\n    precisions: [fp32]", options)
    with pytest.raises(ConfigError, match=r"p\.yaml:11: targets\.\w+\.\w+(\.2)?: .*less than"):
        load(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL.replace("checkpoint:", "checkpiont:") + "foo: 1\n")
    assert len(str(caught.value).splitlines()) == 3


def test_impossible_combinations_are_refused_before_anything_runs(tmp_path: Path) -> None:
    text = MINIMAL + '  trt:\n    precisions: [fp8]\n    compute_capabilities: ["8.6"]\n'
    with pytest.raises(ConfigError, match=r"p\.yaml:12: targets\.trt: .*8\.6"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "name",
    ["pipeline.yaml", *(f"configs/{p.name}" for p in sorted(ROOT.glob("configs/imagenet*")))],
)
def test_committed_configurations_are_valid(name: str) -> None:
    loaded = config.load(ROOT / name)
    assert {t for t in ("trt", "ort", "coreml") if loaded.target(t)} == {"trt", "ort", "coreml"}


def test_imagenet_configurations_differ_only_in_model_checkpoint_and_name() -> None:
    dumps = [
        config.load(ROOT / f"configs/imagenet_{name}.yaml").model_dump(exclude={"name", "model"})
        for name in ("s0", "s1", "s2", "mlla_t")
    ]
    assert all(dump == dumps[0] for dump in dumps)


def test_schema_covers_every_target() -> None:
    schema = config.schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(config.Config.model_fields)
    assert {"TrtSection", "OrtSection", "CoremlSection"} <= set(schema["$defs"])
    assert schema["$defs"]["TrtSection"]["additionalProperties"] is False


def test_reading_a_configuration_imports_no_runtime() -> None:
    heavy = ["torch", "onnx", "onnxruntime", "coremltools", "tensorrt_rtx", "timm", "care"]
    heavy.append("pipeline.targets.coreai")  # which that configuration does not build for
    program = (
        "import sys; from pathlib import Path; from pipeline import config; "
        f"config.load(Path('pipeline.yaml')); print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "store",
    [
        {"address": "s9://user:topsecret@bucket/x"},
        {"address": 5, "options": "topsecret"},
        {"address": "s3://user:topsecret@bucket/x", "options": {"secret": ["topsecret"]}},
        {"address": "s3://user:topsecret@bucket/x", "pusch": True},
    ],
)
def test_no_message_shows_a_secret_of_the_store(store: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="store") as caught:
        config.from_mapping({**SECRET_FREE, "store": store})
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize("address", ["s3://me:topsecret@b/x.tar", "s3://b/x.tar?key=topsecret"])
def test_no_message_shows_a_secret_of_the_data(address: str) -> None:
    for key in ("validation", "calibration"):
        data = {**SECRET_FREE["data"], key: f"wds:{address}"}
        with pytest.raises(ConfigError, match="holds no password and no query") as caught:
            config.from_mapping({**SECRET_FREE, "data": data})
        assert "topsecret" not in str(caught.value)


def test_a_configuration_shows_no_secret_of_its_store() -> None:
    address = "s3://user:topsecret@bucket/x?token=topsecret"
    store = {"address": address, "options": {"secret": "topsecret"}}
    read = config.from_mapping({**SECRET_FREE, "store": store}).config
    assert read.store is not None
    assert read.store.address.get_secret_value() == address
    assert (read.store.push, read.store.required) == (False, False)
    assert "topsecret" not in repr(read) + read.model_dump_json() + str(read.model_dump())


SECRET_FREE: dict[str, Any] = {
    "name": "mine",
    "model": {"name": "care_tiny", "checkpoint": "embedded"},
    "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
    "targets": {"ort": {"precisions": ["fp32"]}},
}


def test_every_key_has_a_description() -> None:
    schema = config.schema()
    sections = {"Config": schema, **schema["$defs"]}
    without = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
        if not {"description", "$ref"} & set(value)  # a section has its own
    ]
    assert all(section.get("description") for section in sections.values())
    assert without == []


def test_a_repair_needs_calibration_images(tmp_path: Path) -> None:
    targets = "  trt:\n    precisions: [fp32, fp16]\n    repair: true\n"
    loaded = load(tmp_path, MINIMAL + targets)
    assert loaded.calibrated == ("trt/fp16",)
    plain = load(tmp_path, MINIMAL + targets.replace("true", "false"))
    assert plain.calibrated == ()
    with pytest.raises(ConfigError, match=r"targets\.trt\.repair"):
        load(tmp_path, MINIMAL + targets.replace("true", "often"))


def test_the_error_of_a_repair_is_the_forms_own_where_it_is_not_stated(tmp_path: Path) -> None:
    text = MINIMAL + "calibration: {max_error: %s}\n"
    assert load(tmp_path, text % "0.01").calibration.max_error == 0.01
    assert load(tmp_path, MINIMAL).calibration.max_error is None
    for wrong in ("0", "1.5", "-1"):
        with pytest.raises(ConfigError, match=r"calibration\.max_error"):
            load(tmp_path, text % wrong)
