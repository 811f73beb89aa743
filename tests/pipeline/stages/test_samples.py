from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.steps.artifact import Artifact

ROOT = Path(__file__).parents[3]

CONFIG = """\
name: trial
model: {name: care_tiny, checkpoint: embedded}
data: {validation: fashion-mnist, calibration: fashion-mnist}
targets: {ort: {precisions: [fp32]}}
validation: {images: 100}
"""
PIXELS = 100 * 64 * 64 * 3


def words(folder: Path, output: Path) -> list[str]:
    """Arguments that decode and preprocess the validation images."""
    config = folder / "pipeline.yaml"
    config.write_text(f"{CONFIG}output: {output}\n")
    return ["run", str(config), "--only", "validate", "--quiet"]


def assert_said_and_nothing_left(code: int, said: str, output: Path, reason: str) -> None:
    assert code == 2, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "validate/samples failed" in line]
    assert len(lines) == 1
    assert f"validate/samples: {reason}, or choose another output folder" in lines[0]
    validate = output / "trial" / "validate"
    assert [path.name for path in validate.iterdir() if path.name != "pytorch"] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for half of the samples."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={PIXELS // 2}", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    result = CliRunner().invoke(main, words(tmp_path, small_disk))
    assert_said_and_nothing_left(
        result.exit_code, result.stderr, small_disk, "No space left on device; free disk space"
    )
    assert os.statvfs(small_disk).f_bavail > 0


def test_files_that_may_not_grow_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (PIXELS // 2, PIXELS // 2))

    result = subprocess.run(
        [sys.executable, "-m", "pipeline", *words(tmp_path, tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        preexec_fn=limit,
    )
    assert_said_and_nothing_left(
        result.returncode, result.stderr, tmp_path, "File too large; allow larger files (ulimit -f)"
    )


def test_samples_are_images_in_numpys_format(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, words(tmp_path, tmp_path)).exit_code == 0
    made = Artifact.read(tmp_path / "trial/validate/samples")
    made.verify()
    pixels = np.load(made.path("pixels.npy"), mmap_mode="r")
    assert (pixels.shape, pixels.dtype) == ((100, 64, 64, 3), np.uint8)
    assert len(np.unique(pixels)) > 200
    assert np.load(made.path("labels.npy")).shape == (100,)
