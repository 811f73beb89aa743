from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config
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
        (
            "checkpoint: embedded",
            "checkpoint: random\n  kwargs: {num_classes: 3}",
            r"p\.yaml:5: model\.kwargs: num_classes cannot be an argument: it follows",
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


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL.replace("name: care_tiny", "nam: care_tiny") + "foo: 1\n")
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
    heavy = ("torch", "onnx", "onnxruntime", "coremltools", "tensorrt_rtx", "timm", "care")
    program = (
        "import sys; from pathlib import Path; from pipeline import config; "
        f"config.load(Path('pipeline.yaml')); print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"
