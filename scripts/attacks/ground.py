"""A small results' folder as a run leaves it, files of others beside it, and ways to change it.

Artifacts are made by the product's own functions, and none needs a network to be trained or a
converter to run: a graph of one node, and a package of two files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper
from PIL import Image

from pipeline.commands import check
from pipeline.commands.export import export_coreml_bench, export_triton
from pipeline.core.errors import ArtifactError, DataError, PipelineError
from pipeline.core.machine import Machine
from pipeline.core.network import Network
from pipeline.core.seals import sealed
from pipeline.report.model import FORMAT, Choice, GateReport, Run
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.library import Library
from pipeline.targets.ort.session import Settings

NAME = "attack"
GRAPH, PACKAGE = "model.onnx", "model.mlpackage"
NETWORK = Network("attack", ("cat", "dog", "emu"), (3, 8, 8), {"size": 8})
CHAIN: Mapping[str, tuple[str, ...]] = {
    "export": (),
    "onnx": ("export",),
    "precision/float32": ("onnx",),
    "ort/fp32": ("precision/float32", "export"),
    "coreml/fp16": (),
    "validate/samples": (),
    "validate/ort-fp32": ("ort/fp32", "validate/samples"),
    "bench/ort": ("ort/fp32", "validate/samples"),
}
KINDS = {"ort": "build", "validate": "validate", "bench": "bench"}

CONFIG = """\
name: attack
model: {name: care_tiny, checkpoint: embedded}
data: {validation: fashion-mnist, calibration: fashion-mnist}
targets:
  coreml: {precisions: [fp16]}
output: engines
"""

TRITON_NEEDS = ("export", "onnx", "precision/float32", "ort/fp32")
"""What `export triton` takes labels and model from, and all that these were made from."""
COREML_NEEDS = ("coreml/fp16",)

ROOT = Path(__file__).parents[2]
EXIT_CODES = (0, 1, 2, 3, 4)
"""What a command may end with; 70 is a fault of the program."""


@dataclass(frozen=True)
class Ground:
    """A working folder.

    Attributes:
        folder: Where commands run.
        results: The results' folder.
        kept: A copy of it, as it was.
        canaries: What lay beside it, see `seen`.
    """

    folder: Path
    results: Path
    kept: Path
    canaries: Mapping[str, str]

    def reset(self) -> None:
        """Put everything back as it was."""
        shutil.rmtree(self.results)
        shutil.copytree(self.kept, self.results)
        for made in ("models", "bench"):
            shutil.rmtree(self.folder / made, ignore_errors=True)

    def require_canaries(self) -> None:
        """Fail if something outside of the results and the exports changed, came or went."""
        now = seen(self.folder)
        different = {
            name for name in {*self.canaries, *now} if self.canaries.get(name) != now.get(name)
        }
        assert not different, f"changed outside of the output folder: {sorted(different)[:3]}"


def make(folder: Path) -> Ground:
    """Lay out a working folder.

    Args:
        folder: Where; empty.
    """
    results = folder / "engines" / NAME
    for name in CHAIN:
        _make(results, name)
    _report(results)
    for canary in ("notes.txt", "canary/deep/letter.txt", "engines/other/model.onnx"):
        (folder / canary).parent.mkdir(parents=True, exist_ok=True)
        (folder / canary).write_text(f"canary {canary}")
    (folder / "canary" / "link").symlink_to("deep")
    (folder / "pipeline.yaml").write_text(CONFIG)
    kept = folder / "kept"
    shutil.copytree(results, kept)
    ground = Ground(folder, results, kept, seen(folder))
    in_process(ground, frozenset())  # what is whole is taken, else the attack would prove nothing
    ground.reset()
    return ground


def _make(results: Path, name: str) -> Artifact:
    def build(place: Path) -> Mapping[str, Any]:
        if name.startswith("coreml"):
            data = place / PACKAGE / "Data/com.apple.CoreML"
            (data / "weights").mkdir(parents=True)
            (data / "model.mlmodel").write_bytes(b"a program")
            (data / "weights/weight.bin").write_bytes(bytes(range(64)))
        elif name.startswith(("validate", "bench")):
            (place / "logits.npy").write_bytes(name.encode() * 3)
        else:
            (place / GRAPH).write_bytes(_graph(name))
        target, _, precision = name.partition("/")
        facts: dict[str, Any] = {
            "target": target,
            "precision": precision,
            "network": NETWORK.to_dict(),
        }
        facts["session"] = Settings().to_dict()
        return {**facts, "top1": {"value": 0.9, "state": "measured", "by": "x", "why": ""}}

    sources = [Artifact.read(results / source) for source in CHAIN[name]]
    digests = {source.name: source.digest for source in sources}
    return artifact.make(
        results / name,
        kind=KINDS.get(name.partition("/")[0], "export"),
        name=name,
        key=hashlib.sha256(name.encode()).hexdigest(),
        made_from=digests or {"checkpoint": "c" * 64},
        seals={source.name: source.seal for source in sources},
        tools={"onnx": "1"},
        build=build,
        inputs={"settings export.opset": 20},
        code={"pipeline/stages/export.py": "d" * 64},
    )


def _graph(name: str) -> bytes:
    shape: list[str | int] = ["batch", 3, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["image"], ["logits"])],
        name,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape[:2], 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def _report(results: Path) -> None:
    run = Run(
        format=FORMAT,
        name=NAME,
        config="pipeline.yaml",
        folder=str(results),
        date="2026-01-02 03:04",
        exit_code=0,
        steps=(),
        not_selected=(),
        gates=GateReport(),
        problems=(),
        seals={name: each.seal for name, each in Library(results).artifacts.items()},
        machine=Machine("CPU", 2),
        versions={"onnx": "1"},
        export=None,
        simplified=None,
        forms={},
        calibration=None,
        reference=None,
        artifacts=(),
        bench={},
        choice={"ort": Choice("fp32"), "coreml": Choice("fp16")},
        published=(),
    )
    (results / RESULTS_FILE).write_text(sealed(run.to_dict()))


def seen(folder: Path) -> dict[str, str]:
    """What lies in a working folder, but for results and exports: kinds, contents, dates, modes."""
    found = {}
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder).as_posix()
        if inside == ".":
            folders[:] = [name for name in folders if name not in ("kept", "models", "bench")]
        if inside == "engines" and NAME in folders:
            folders.remove(NAME)
        for name in (*folders, *names):
            path = Path(root, name)
            status = path.lstat()
            content = f"{stat.S_IFMT(status.st_mode)}"
            if stat.S_ISREG(status.st_mode):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                content = f"{digest} {status.st_mtime_ns} {status.st_mode:o}"
            found[path.relative_to(folder).as_posix()] = content
    return found


Use = Callable[[Ground, frozenset[str]], None]
"""Uses what lies there; raises PipelineError if it is refused. It is told which artifacts were
changed: what takes these in without a word is at fault."""


def in_process(ground: Ground, changed: frozenset[str]) -> None:
    """What `check` and both exports do."""
    exports: dict[str, tuple[tuple[str, ...], Callable[[], object]]] = {
        "triton": (TRITON_NEEDS, lambda: _triton(ground)),
        "coreml-bench": (COREML_NEEDS, lambda: _coreml(ground)),
    }
    for name, (needs, export) in exports.items():
        refused: PipelineError | None = None
        try:
            export()
        except PipelineError as error:
            refused = error
        assert refused or changed.isdisjoint(needs), f"export {name} took what was changed"
        if refused:
            _require_readable(str(refused))
    problems = [found.problem for found in check.findings(ground.results) if found.problem]
    for problem in problems:
        _require_readable(problem)
    if problems:
        raise ArtifactError(problems[0])


def _require_readable(message: str) -> None:
    lines = message.split("\n")
    assert all(line.isprintable() for line in lines), f"not printable: {message[:80]!a}"
    assert len(message) < 4000, f"a message of {len(message)} characters"


def _triton(ground: Ground) -> None:
    output, models = ground.results.parent, ground.folder / "models"
    export_triton(output, NAME, models, target="ort", precision=None)


def _coreml(ground: Ground) -> None:
    folder = ground.folder / "bench"
    export_coreml_bench(ground.results.parent, NAME, folder, target="coreml", precision=None)


def by_command(ground: Ground, changed: frozenset[str]) -> None:
    """The same by real commands."""
    commands = {
        "triton": ("export", "triton", NAME, "--repository", "models"),
        "coreml-bench": ("export", "coreml-bench", NAME, "--folder", "bench"),
    }
    needs = {"triton": TRITON_NEEDS, "coreml-bench": COREML_NEEDS}
    for name, arguments in commands.items():
        refused = command(ground.folder, *arguments)
        assert refused or changed.isdisjoint(needs[name]), f"export {name} took what was changed"
    if problem := command(ground.folder, "check", NAME):
        raise ArtifactError(problem)


LOOKED_AT = """\
name: trial
model: {name: timm/test_resnet, checkpoint: %s}
data: {validation: '%s', calibration: 'folder:images'}
targets: {ort: {precisions: [fp32]}}
output: engines
"""
"""A configuration with a checkpoint and validation images to fill in."""


def lay_out(folder: Path) -> None:
    """Lay out what a configuration needs beside what is odd: an image of each of four classes."""
    for label in ("ant", "bee", "cat", "dog"):
        place = folder / "images" / label
        place.mkdir(parents=True)
        Image.new("RGB", (40, 40), (9, 99, 199)).save(place / "1.png")
    (folder / "notes.txt").write_text("a canary")


def look_at(folder: Path, text: str | bytes) -> None:
    """Let the real command look at a configuration and all that it names, without a run.

    Args:
        folder: As `lay_out` left it, and with what is odd; nothing in it may change.
        text: The configuration.

    Raises:
        DataError: The command refused it.
    """
    path = folder / "odd.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    before = seen(folder)
    said = command(folder, "run", path.name, "--dry-run")
    assert seen(folder) == before, "a look changed something"
    if said:
        raise DataError(said)


def command(folder: Path, *arguments: str) -> str:
    """Run a command of the product; returns the last line of what it says, "" if it ends well.

    Raises:
        AssertionError: It ended with a traceback or an exit code that it must not have.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
    )
    said = (result.stderr or result.stdout).decode(errors="replace").strip()
    assert b"Traceback" not in result.stderr + result.stdout, said[-400:]
    assert result.returncode in EXIT_CODES, f"exit code {result.returncode}: {said[-400:]}"
    return (said.splitlines() or ["refused"])[-1] if result.returncode else ""


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**30, 1e308, -0.5, float("nan"), float("inf")),
    *("", "x", " ", "measured", "emulated", "x" * 5000, "\x1b[2J", "a\nb", "\u202e", "\ud800"),
    *("[red]", "../../etc/passwd", "/etc/passwd", "0" * 64, [], {}, [None], [[1]], {"": 1}),
    *({"seal": "x"}, {"sha256": 1}, ["onnx"], "%NESTED%", "%DIGITS%"),
)


def changed_json(rng: random.Random, text: str, *, sign: bool) -> str:
    """JSON with some values or keys replaced, doubled, added or left out.

    Args:
        rng: Chooses.
        text: The whole, with its seal.
        sign: Give it the seal that fits.
    """
    values = json.loads(text)
    seal = values.pop("seal", "")
    for _ in range(rng.randint(1, 3)):
        _change_one(rng, values)
    new = json.dumps(values, indent=1) + "\n"
    new = new.replace('"%NESTED%"', "[" * 3000 + "]" * 3000).replace('"%DIGITS%"', "9" * 5000)
    tail = hashlib.sha256(new.encode()).hexdigest() if sign else seal
    if not new.endswith("\n}\n"):
        return new
    return new.removesuffix("\n}\n") + f',\n "seal": "{tail}"\n}}\n'


def sign(path: Path, change: Callable[[Any], object]) -> None:
    """Change the values of a sealed file, and give it the seal that fits."""
    values = json.loads(path.read_text())
    del values["seal"]
    change(values)
    path.write_text(sealed(values))


def _change_one(rng: random.Random, values: Any) -> None:
    parent, key = values, None
    while isinstance(parent, dict | list) and parent:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if not isinstance(parent[key], dict | list) or not parent[key] or rng.random() < 0.3:
            break
        parent = parent[key]
    if key is None:
        return
    kind = rng.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(rng.choice(("more", "", "\x1b[2J", "../x", "seals")))] = _odd(rng)
    elif kind == 2 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    else:
        parent[key] = _odd(rng)


def _odd(rng: random.Random) -> Any:
    """An odd value; a copy, because the next change may be inside of it."""
    return copy.deepcopy(rng.choice(ODD_VALUES))


def changed_bytes(rng: random.Random, whole: bytes) -> bytes:
    """Bytes with some replaced, added, left out, doubled or cut off."""
    data = bytearray(whole)
    kind = rng.randrange(8)
    if kind == 0:
        del data[rng.randrange(len(data) + 1) :]
    elif kind == 1:
        place = rng.randrange(len(data) + 1)
        data[place:place] = rng.randbytes(rng.randint(1, 9))
    elif kind == 2:
        data = bytearray(rng.choice((b"", b"\0", b"{}", b"[]", b"null", rng.randbytes(99))))
    elif kind == 3 and data:
        start = rng.randrange(len(data))
        del data[start : start + rng.randint(1, 9)]
    elif data:
        for _ in range(rng.choice((1, 1, 1, 5))):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(data) if bytes(data) != whole else whole + b" "


def put_odd(rng: random.Random, place: Path) -> str:
    """Put something that is no regular file, or nobody's, at a path; returns what."""
    kind = rng.choice(
        ("link", "linked folder", "broken link", "itself", "pipe", "socket", "folder")
    )
    remove(place)
    if kind == "link":
        place.symlink_to(rng.choice(("/etc/hostname", "/dev/zero", "/proc/self/mem")))
    elif kind == "linked folder":
        place.symlink_to(rng.choice(("/etc", "/", "../..", ".")))
    elif kind == "broken link":
        place.symlink_to("nowhere")
    elif kind == "itself":
        place.symlink_to(place.name)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        _socket(place)
    else:
        place.mkdir()
    return kind


def remove(place: Path) -> None:
    """Remove whatever lies at a path; nothing is followed."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _socket(place: Path) -> None:
    before = Path.cwd()
    os.chdir(place.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one, suppress(OSError):
            one.bind(place.name)
    finally:
        os.chdir(before)
