"""Engines through the command line: damage, other machines, a GPU that answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.core.files import file_hash
from pipeline.core.seals import sealed
from pipeline.steps.artifact import MANIFEST
from pipeline.targets.tensorrt import api, builder
from pipeline.targets.tensorrt.api import Library
from pipeline.targets.tensorrt.device import Gpu
from pipeline.targets.tensorrt.nvml import GpuState

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytestmark = [
    # torch.onnx reads deprecated attributes of its own and of copyreg.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROOT = Path(__file__).parents[4]
FLOAT16 = "precision/float16/model.onnx"

CONFIG = """\
name: trial
model: {name: MODEL, checkpoint: WEIGHTS}
data: {validation: fashion-mnist, calibration: fashion-mnist}
export: {simplify: false}
targets:
  trt: {precisions: [fp16], compute_capabilities: ["8.6", "8.9"]}
validation: {images: 10}
bench: {batches: [1, 4], samples: 5, warmup: 1, max_seconds: 2}
output: OUTPUT
"""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def configured(folder: Path, model: str = "care_tiny", weights: str = "embedded") -> Path:
    path = folder / "pipeline.yaml"
    text = CONFIG.replace("MODEL", model).replace("WEIGHTS", weights)
    path.write_text(text.replace("OUTPUT", str(folder / "engines")))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("run")
    begin(folder / "engines" / "trial")
    result = invoke("run", str(configured(folder)), "--quiet")
    assert result.exit_code == 0, result.output
    return folder / "engines" / "trial"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[str, Path]:
    """A configuration, and the folder of its engine: a copy to damage."""
    shutil.copytree(finished.parent, tmp_path / "engines")
    return str(configured(tmp_path)), tmp_path / "engines" / "trial" / "trt" / "fp16"


Built = Callable[..., dict[str, Any]]


def is_built(usual: str, build: Callable[[], dict[str, Any]]) -> bool:
    """Whether a build gives the usual engine.

    In some process layouts the library's threads make one build in dozens differ, see
    docs/targets.md; what depends on its surroundings differs every time.
    """
    return any(build()["engine_sha256"] == usual for _ in range(3))


@pytest.fixture(scope="module")
def usual(finished: Path, tmp_path_factory: pytest.TempPathFactory, build_in: Built) -> str:
    """Hash of an engine with a dynamic batch, where a second build gives the same bytes."""
    folder = tmp_path_factory.mktemp("usual")
    first, second = (
        build_in(ROOT, finished / FLOAT16, folder / name)["engine_sha256"]
        for name in ("first", "second")
    )
    if first != second:
        pytest.skip("two builds in one process layout differ on this machine: nothing is claimed")
    return str(first)


def test_who_asks_and_from_where_does_not_change_an_engine(
    finished: Path, tmp_path: Path, usual: str, build_in: Built, checkout: Callable[..., Path]
) -> None:
    """Environments and paths of different lengths; the path of TensorRT-RTX stays."""
    for n in (3, 150):
        root = checkout(tmp_path / ("r" * n), compiled=True)
        graph = root / "model.onnx"
        shutil.copy(finished / FLOAT16, graph)
        place, padding = tmp_path / ("o" * n), "x" * n * 300
        build = partial(build_in, root, graph, place, PADDING=padding)
        assert is_built(usual, build)


MOUNT = 'mount --bind "$0" /proc/stat && exec "$@"'


@pytest.fixture(scope="module")
def mounting() -> tuple[str, ...]:
    """Starts a command for which its first argument lies over /proc/stat."""
    for options in (("--mount",), ("--mount", "--map-root-user")):
        before = ("unshare", *options, "sh", "-c", MOUNT)
        if (
            shutil.which("unshare")
            and not subprocess.run(
                [*before, "/dev/null", "true"], capture_output=True, check=False
            ).returncode
        ):
            return before
    pytest.skip("this machine lets nobody mount")


def test_what_the_system_counts_does_not_change_an_engine(
    finished: Path, tmp_path: Path, usual: str, build_in: Built, mounting: tuple[str, ...]
) -> None:
    """The line of interrupts is as long as the machine has sources of them."""
    lines = Path("/proc/stat").read_text()
    for n in (400, 2000, 9000):
        other = tmp_path / "stat"
        other.write_text(re.sub(r"(?m)^intr .*$", "intr 1" + " 0" * (n // 2), lines))
        before = (*mounting, str(other))
        build = partial(build_in, ROOT, finished / FLOAT16, tmp_path / "output", before=before)
        assert is_built(usual, build)


def truncate(folder: Path) -> None:
    engine = folder / "model.engine"
    engine.write_bytes(engine.read_bytes()[:1000])


def flip_a_bit(folder: Path) -> None:
    engine = folder / "model.engine"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


def put_another_file(folder: Path) -> None:
    """A file of another kind, with a manifest that says that it belongs there."""
    engine, manifest = folder / "model.engine", folder / MANIFEST
    engine.write_bytes(b"GIF89a" * 1000)
    plain = json.loads(manifest.read_text())
    plain["files"]["model.engine"] = {"size": 6000, "sha256": file_hash(engine)}
    del plain["seal"]
    manifest.write_text(sealed(plain))


def take_the_sidecar(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "model.engine has 1000 bytes where"),
        (flip_a_bit, "model.engine has changed since it was written"),
        (put_another_file, "was made from another trt/fp16 than lies here"),
        (take_the_sidecar, "artifact.json is missing"),
    ],
)
def test_check_names_damaged_engines(
    copied: tuple[str, Path], damage: Callable[[Path], None], words: str
) -> None:
    _, folder = copied
    damage(folder)
    result = invoke("check", "trial", "--output", str(folder.parents[2]))
    assert result.exit_code == 1
    assert words in result.output
    assert "rebuild what is damaged with: python -m pipeline run" in result.output


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "has 1000 bytes where"),
        (flip_a_bit, "has changed since it was written"),
        (take_the_sidecar, "holds no artifact.json"),
    ],
)
def test_bench_refuses_damaged_engines(
    copied: tuple[str, Path],
    gpu: Callable[..., Gpu],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    config, folder = copied
    gpu()
    damage(folder)
    result = invoke("bench", "--target", "trt", "--config", config)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"capability": "12.0"}, "add '12.0' to compute_capabilities and build again"),
        ({"capability": "9.0"}, "use full TensorRT on this machine"),
        ({"driver_cuda": (12, 4)}, "install a newer NVIDIA driver"),
    ],
)
def test_bench_on_the_wrong_machine_says_what_to_do(
    copied: tuple[str, Path], gpu: Callable[..., Gpu], machine: dict[str, Any], words: str
) -> None:
    config, _ = copied
    gpu(**machine)
    result = invoke("bench", "--target", "trt", "--config", config)
    assert result.exit_code == 4
    assert "error: not measured: " in result.output
    assert words in result.output


def test_bench_without_a_driver(copied: tuple[str, Path], no_gpu: None) -> None:
    config, _ = copied
    result = invoke("bench", "--target", "trt", "--config", config)
    assert result.exit_code == 4
    assert "no NVIDIA driver is installed on this machine; run it on one with" in result.output


def test_bench_of_an_engine_of_another_version(
    copied: tuple[str, Path], gpu: Callable[..., Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = copied
    gpu()
    monkeypatch.setattr(api, "installed", lambda name: "1.9.0.1")
    result = invoke("bench", "--target", "trt", "--config", config)
    assert result.exit_code == 4
    assert "installed is 1.9.0.1: build it again, or install that version" in result.output


def test_impossible_combinations_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = configured(tmp_path)
    path.write_text(path.read_text().replace("[fp16]", "[fp16, fp8]"))
    result = invoke("run", str(path))
    assert result.exit_code == 2
    assert (
        f"{path}:6: targets.trt: trt: fp8 cannot be built for compute capability 8.6: float8"
        in (result.output)
    )
    assert not (tmp_path / "engines").exists()


def test_a_fixed_batch_goes_through_every_stage(
    tmp_path: Path, no_gpu: None, embedded_results: Path
) -> None:
    path = configured(tmp_path)
    # A graph of any batch, as the exporter writes it whatever the batch: see test_export.py.
    graph = embedded_results / "export" / "model.onnx"
    text = path.read_text().replace("{simplify: false}", "{simplify: false, batch: 4}")
    text = text.replace("{name: care_tiny, checkpoint: embedded}", f"{{onnx: {graph}}}")
    assert str(graph) in text
    path.write_text(text.replace("[fp16]", "[int8]"))
    result = invoke("run", str(path))
    assert result.exit_code == 2
    assert (
        f"{path}:4: export.batch fixes the batch to 4, and bench.batches asks for [1, 4]: set"
        in (result.output)
    )
    text = path.read_text().replace("batches: [1, 4]", "batches: [4]")
    path.write_text(text.replace("\nvalidation:", "\ncalibration: {images: 8}\nvalidation:"))
    result = invoke("run", str(path), "--quiet")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "engines/trial"
    built = json.loads((folder / "trt/int8" / MANIFEST).read_text())["facts"]
    assert built["batches"] == {"min": 4, "opt": 4, "max": 4}
    validated = json.loads((folder / "validate/trt-int8" / MANIFEST).read_text())["facts"]
    assert validated["numbers"]["top1"]["samples"] == 10  # two batches of 4, and one of 2 filled up


@pytest.fixture
def unsupported() -> Iterator[str]:
    """Name of a network with an operator that TensorRT does not have."""
    import timm
    import torch
    from timm.models import _registry
    from torch import nn

    class Determinants(nn.Module):
        num_classes = 10
        default_cfg: dict[str, Any] = {  # noqa: RUF012
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        }

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(3, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(torch.linalg.det(self.pool(x)))
            return logits

    def determinants(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return Determinants(**kwargs)

    _registry._model_entrypoints["determinants"] = determinants
    assert timm.is_model("determinants")
    yield "determinants"
    del _registry._model_entrypoints["determinants"]


def test_a_run_names_an_unsupported_operator(tmp_path: Path, unsupported: str) -> None:
    result = invoke("run", str(configured(tmp_path, unsupported, "random")), "--only", "export",
                    "--only", "simplify", "--only", "precision", "--only", "build")  # fmt: skip
    assert result.exit_code == 3, result.output
    assert "(Det): TensorRT does not support this operator" in result.output
    assert "export the model without it, or build the target ort" in result.output


@pytest.fixture
def answering(
    gpu: Callable[..., Gpu],
    cuda: Any,
    fake_library: Callable[..., Library],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """A GPU with a CUDA that works, and a library that accepts every engine."""
    gpu()
    library = fake_library(cuda, api.RTX, (3, 64, 64), 10)
    monkeypatch.setattr(builder, "_LOGGERS", {})
    monkeypatch.setattr(api, "load", lambda name: library)
    states = iter(
        GpuState(clock, 9000, 60, 200.0, throttled, "580.1")
        for clock, throttled in ((2500, ()), (1800, ("SwPowerCap",)))
    )
    monkeypatch.setattr("pipeline.targets.tensorrt.nvml.read", lambda bus: next(states, "no more"))
    return cuda


def test_bench_on_a_gpu(copied: tuple[str, Path], answering: Any) -> None:
    config, folder = copied
    result = invoke("bench", "--target", "trt", "--config", config)
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout.splitlines()[-1])
    assert set(plain["batches"]["1"]["phases"]["fp16"]) == {"engine", "copies", "call"}
    assert set(plain["end_to_end"]["latency"]) == {"fp16", "pytorch"}
    assert [row["batch"] for row in plain["throughput"]["fp16"]] == [1, 2, 4]
    assert all(row["images_per_s"] > 0 for row in plain["throughput"]["fp16"])
    state = plain["device_state"]["fp16"]
    assert state["throttled"] == ["SwPowerCap"]
    assert set(state["more"]["first_call_ms"]) == {"batch 1", "batch 2", "batch 4"}
    assert state["more"]["gpu_memory_bytes"] > 0
    assert [(s["when"], s["sm_clock"]) for s in state["more"]["sensors"]] == [
        ("before", 2500),
        ("after", 1800),
    ]
    assert "fp16: the device was throttled: SwPowerCap" in result.stdout
    assert list(folder.parent.glob("fp16-*-sm89.cache")), "what was compiled is kept"
    assert answering.is_free()


@pytest.mark.parametrize("batches", [("8",), ("1", "8")])
def test_a_batch_outside_the_profile(
    copied: tuple[str, Path], answering: Any, batches: tuple[str, ...]
) -> None:
    config, _ = copied
    options = [word for batch in batches for word in ("--batch", batch)]
    result = invoke("bench", "--target", "trt", "--config", config, *options)
    assert result.exit_code == 2
    assert "batches of 1 to 4, not 8" in result.output
    assert answering.is_free()


def test_validation_on_a_gpu_takes_the_whole_set(copied: tuple[str, Path], answering: Any) -> None:
    config, folder = copied
    result = invoke("run", config, "--only", "validate", "--quiet")
    assert result.exit_code == 0, result.output
    facts = json.loads((folder.parents[1] / "validate/trt-fp16" / MANIFEST).read_text())["facts"]
    assert facts["numbers"]["top1"]["state"] == "measured"
    assert facts["numbers"]["top1"]["samples"] == 10  # by batches of at most 4
    assert answering.is_free()


def test_a_gpu_with_too_little_memory(
    copied: tuple[str, Path], answering: Any, out_of_memory: Any
) -> None:
    config, _ = copied
    answering.fail["empty gpu"] = (0, out_of_memory)
    result = invoke("bench", "--target", "trt", "--config", config)
    assert result.exit_code == 4
    assert "the GPU has too little free memory; close what else runs on it" in result.output
    assert answering.is_free()
