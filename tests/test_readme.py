"""Commands, files and names that the README and the documents name exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli import main as pipeline_command
from pipeline.config import CalibrationConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

LINES = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line for line in LINES if "-m pipeline" in line or "-m care." in line]
MAKE = [line.split()[1] for line in LINES if line.startswith("make ")]

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
OF_DOCUMENTS = sorted(
    {
        re.split(r" {3,}", line.strip())[0]
        for document in DOCUMENTS
        for line in document.read_text().splitlines()
        if re.match(r" *(python|torchrun) .*-m (pipeline|care)\b", line)
    }
)


def command_of(module: str) -> click.Command:
    name = "pipeline.cli" if module == "pipeline" else module
    found = importlib.import_module(name).main
    assert isinstance(found, click.Command)
    return found


def test_the_readme_begins_with_the_two_commands() -> None:
    assert LINES[0].startswith("make run")
    assert LINES[1].startswith("make test")
    assert len(COMMANDS) >= 10


def test_each_command_of_the_list_says_what_it_answers() -> None:
    part = README.partition("Build, validate and measure:")[2].partition("What was built travels")[
        0
    ]
    lines = [line for line in part.splitlines() if line.startswith("    ")]
    assert len(lines) > 20
    assert [line for line in lines if not re.search(r" {2,}# \w", line)] == []


def test_ones_own_model_takes_eight_lines_of_yaml_and_ten_of_python() -> None:
    section = README.partition("## Your own network")[2].partition("### From a folder")[0]
    for language, most in (("yaml", 8), ("python", 10)):
        block = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
        assert block is not None
        assert len(block[1].splitlines()) <= most


def test_every_command_of_the_program_is_named() -> None:
    known = command_of("pipeline")
    assert isinstance(known, click.Group)
    named = {
        re.split(r"-m pipeline ", line)[1].split()[0] for line in COMMANDS if "pipeline " in line
    }
    assert set(known.commands) - named == set()


@pytest.mark.parametrize("line", [*COMMANDS, *OF_DOCUMENTS])
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line, comments=True)
    rest = words[words.index("-m") + 1 :]
    if rest[0] == "-m" or "torchrun" in words:
        rest = words[len(words) - words[::-1].index("-m") :]
    command, arguments = command_of(rest[0]), rest[1:]
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    # Parses options and their values without running anything.
    command.make_context("x", arguments, resilient_parsing=False)


@pytest.mark.parametrize("target", MAKE)
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCUMENTS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^):]+)\)", page.read_text())
    assert [link for link in links if not _leads_somewhere(page, link)] == []


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, place = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists():
        return False
    if not place:
        return True
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return place in [_anchor(heading) for heading in headings]


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading: letters and digits in lower case, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCUMENTS], ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    words = set(re.findall(r"`([\w./-]+)`", page.read_text()))
    files = {word for word in words if re.match(rf"({OURS}|docs|tests|benchmarks|configs)/", word)}
    assert [word for word in sorted(files) if not (ROOT / word).exists()] == []
    names = {word for word in words if re.fullmatch(rf"({OURS})(\.(?!yaml$|py$)\w+)+", word)}
    assert [word for word in sorted(names) if not _is_there(word)] == []


OURS = "care|pipeline|calibration"


def _is_there(name: str) -> bool:
    """Whether a dotted name is a module, something in one, or a key of the configuration."""
    first, *rest = name.split(".")
    place = ROOT / first
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place /= rest.pop(0)
    if not rest:
        return True
    if first == "calibration" and rest[0] in CalibrationConfig.model_fields:
        return True
    module = importlib.import_module(".".join(place.relative_to(ROOT).parts))
    return hasattr(module, rest[0])


CLASSES = {"beech": (200, 60, 40), "fir": (30, 160, 60), "oak": (40, 60, 190)}

SMALL = {
    "configs/finetune.yaml": str(ROOT / "configs" / "finetune.yaml"),
    "resnet18": "test_resnet",
    "pretrained": "ten.pth",
    "ort": "ort/fp32",
    "photo.jpg": "photos/fir/0.png",
}
"""What stands for the words of the README, so that its path takes seconds."""


def photographs(folder: Path) -> None:
    """Ten images of each of three colours."""
    generator = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.array(colour) + generator.integers(-30, 30, (40, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )


def run(line: str, *more: str) -> str:
    """Run a line of the README, in a folder that holds nothing but photographs and weights."""
    words = [SMALL.get(word, word) for word in shlex.split(line, comments=True)[1:]]
    if "--artifact" not in words:
        words = ["coreml/fp16" if word == "coreml" else word for word in words]
    if words[1] == "pipeline":
        result = CliRunner().invoke(pipeline_command, [*words[2:], *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout
    return run_module(words[1], *words[2:], *more)


def run_module(name: str, *arguments: str) -> str:
    """`python -m NAME`, in this process, which has loaded PyTorch; what it printed."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(name, run_name="__main__")
    assert not ended.value.code, said.getvalue()
    return said.getvalue()


@pytest.mark.slow
def test_from_a_folder_of_photographs_to_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = README.partition("### From a folder of photographs")[2].partition("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    assert len(lines) <= 6
    install, train, init, build, predict = lines
    assert install.startswith("pip install")
    photographs(tmp_path / "photos")
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save({"state_dict": weights}, tmp_path / "ten.pth")

    small = ("--image-size", "32", "--epochs", "3", "--workers", "0")
    said = run(train, *small)
    assert "starting from ten.pth; made anew for 3 classes: fc.weight, fc.bias" in said
    assert "6 of 30 images judge, those that training held out" in run(init)
    # Some calls are measured rather than seconds of them.
    configuration = tmp_path / "pipeline.yaml"
    brief = "bench:\n  samples: 3\n  max_seconds: 0.5\n"
    configuration.write_text(configuration.read_text().replace("bench:\n", brief))
    run(build, "--quiet")

    results = json.loads((tmp_path / "engines/test_resnet/results.json").read_text())
    found = {f"{one['target']}/{one['precision']}": one["accuracy"] for one in results["artifacts"]}
    assert set(found) == {"ort/fp32", "coreml/fp16"}
    for accuracy in found.values():
        assert accuracy["top1"]["samples"] == 6
        assert accuracy["agreement"]["value"] == 1.0
    answered = json.loads(run(predict, "--json"))
    assert {entry["label"] for entry in answered["scores"]} == set(CLASSES)
