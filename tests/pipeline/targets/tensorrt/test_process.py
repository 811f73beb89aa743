"""The builder's process: what it can import, how it ends, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.core.errors import BuildError, UnavailableError, UnsupportedOperatorError
from pipeline.targets.tensorrt import api, process
from pipeline.targets.tensorrt.build import EngineJob, build_engine

Small = Callable[..., onnx.ModelProto]


@pytest.fixture
def job(tmp_path: Path, small: Small) -> EngineJob:
    graph = tmp_path / "graph.onnx"
    onnx.save(small(), graph)
    return EngineJob(graph, False, ("8.6",), (1, 8, 64), None, None)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the place of TensorRT-RTX: it runs when the builder imports that."""
    folder = tmp_path / "installed"
    for name in (api.RTX, f"{api.RTX}_libs", "numpy"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    monkeypatch.setattr(process, "_packages", lambda: str(folder))

    def put(program: str) -> None:
        (folder / api.RTX / "__init__.py").write_text(program)

    return put


PROBE = "import ctypes; print(ctypes.CDLL(None).personality(0x0040000) != -1)"


@pytest.fixture(scope="module")
def allowed() -> bool:
    """Whether this machine lets a process fix its addresses; containers may forbid it."""
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_addresses_are_fixed(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path, allowed: bool
) -> None:
    if not allowed:
        pytest.skip("this machine does not let a process fix its addresses")
    library("import ctypes; print(ctypes.CDLL(None).personality(0xFFFFFFFF)); raise OSError")
    lines: list[str] = []
    with pytest.raises(UnavailableError):
        process.build_apart(job, tmp_path, lines.append)
    assert int(lines[-1]) & 0x0040000


LOOK_AROUND = """
import json, sys
import tensorrt_rtx_libs
found = sorted(sys.modules)
try:
    import numpy
    found.append("numpy")
except ImportError:
    pass
print(json.dumps([found, sys.path]))
raise ImportError("that was all")
"""


def test_the_builder_imports_the_standard_library_and_tensorrt_alone(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path
) -> None:
    library(LOOK_AROUND)
    lines: list[str] = []
    (tmp_path / "ctypes.py").write_text("raise SystemExit('a stranger in the working directory')")
    with pytest.raises(UnavailableError, match="does not load: that was all; reinstall it"):
        process.build_apart(job, tmp_path, lines.append)
    modules, paths = json.loads(lines[-1])
    own = {"__main__", api.RTX, f"{api.RTX}_libs"}
    assert {name.partition(".")[0] for name in modules} - sys.stdlib_module_names == own
    assert not [path for path in paths if "site-packages" in path or not Path(path).is_absolute()]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGILL"])
def test_a_crash_is_a_fault_of_the_library(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path, name: str
) -> None:
    library(
        "import os, signal, sys\n"
        "print('double free', file=sys.stderr, flush=True)\n"
        f"os.kill(os.getpid(), signal.{name})\n"
    )
    words = (
        rf"internal fault of TensorRT-RTX .*: {name} while it built from .*graph\.onnx \(double"
        r" free\); that graph stays for a bug report, .* install another version"
    )
    with pytest.raises(BuildError, match=words):
        process.build_apart(job, tmp_path, print)


def test_an_unknown_signal_and_an_exit_code_are_told(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path
) -> None:
    library("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 3)")
    with pytest.raises(BuildError, match=r"internal fault .*: signal \d+ while .*\(no message\)"):
        process.build_apart(job, tmp_path, print)
    library("import os; os._exit(9)")
    with pytest.raises(BuildError, match=r"internal fault .*: exit code 9 while"):
        process.build_apart(job, tmp_path, print)


NOTICING = """
from types import SimpleNamespace
from unittest.mock import MagicMock

__version__ = "1.7"
OnnxParser, ComputeCapability, BuilderFlag = MagicMock(), MagicMock(), MagicMock()
NetworkDefinitionCreationFlag = SimpleNamespace()
names = "VERBOSE", "INFO", "WARNING", "ERROR"


class ILogger:
    Severity = SimpleNamespace(**{name: SimpleNamespace(name=name) for name in names})


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        network = MagicMock(num_inputs=1, num_outputs=1)
        network.get_input.return_value.shape = (1, 3, 8, 8)
        return network

    def create_builder_config(self):
        return MagicMock()

    def build_serialized_network(self, network, config):
        self.logger.log(ILogger.Severity.ERROR, REASON)
"""
"""A library that takes a graph, gives a reason, and builds nothing."""


@pytest.mark.parametrize(
    "reason",
    [
        "Error Code 1: Myelin (MyelinCheckException: kqv_gemm_split.cpp:1961: CHECK(0) failed)",
        "Error Code 2: Internal Error (Assertion !layers.empty() failed. )",
    ],
)
def test_a_check_of_the_library_that_failed_is_its_fault(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path, reason: str
) -> None:
    library(NOTICING.replace("REASON", repr(reason)))
    with pytest.raises(BuildError) as caught:
        process.build_apart(job, tmp_path, lambda line: None)
    said = str(caught.value)
    assert said.startswith(f"{process.INTERNAL_FAULT} 1.7: it cannot build {job.graph}: {reason}; ")
    assert "stays for a bug report" in said
    assert "python -m pipeline reduce" in said
    assert "install another version" in said
    assert "build the target ort" in said


def test_what_the_library_cannot_do_is_no_fault_of_it(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path
) -> None:
    reason = "Error Code 10: Internal Error (Could not find any implementation for node a.)"
    library(NOTICING.replace("REASON", repr(reason)))
    with pytest.raises(BuildError, match=r"^TensorRT-RTX 1\.7 cannot build .*node a\.\)$"):
        process.build_apart(job, tmp_path, lambda line: None)


def test_who_is_killed_is_not_at_fault(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path
) -> None:
    library("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(BuildError, match=r"ended from outside \(SIGKILL\).* memory") as caught:
        process.build_apart(job, tmp_path, print)
    assert "fault" not in str(caught.value)


def test_a_library_that_is_not_installed(
    job: EngineJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "RTX", "no_such_library")
    monkeypatch.setitem(api.INSTALL, "no_such_library", "pip install it")
    with pytest.raises(UnavailableError, match="no_such_library is not installed: pip install it"):
        process.build_apart(job, tmp_path, print)


def test_what_the_library_prints_is_for_the_log(
    job: EngineJob, library: Callable[[str], None], tmp_path: Path
) -> None:
    library(
        "import sys\n"
        "print('{')\n"
        "print('{\"memory\": 1}')\n"
        "sys.stdout.flush()\n"
        "sys.stdout.buffer.write(b'\\xff\\n')\n"
        "raise OSError('no')\n"
    )
    lines: list[str] = []
    with pytest.raises(UnavailableError, match="does not load: no"):
        process.build_apart(job, tmp_path, lines.append)
    assert lines == ["{", '{"memory": 1}', "\N{REPLACEMENT CHARACTER}"]


def test_a_graph_that_is_not_there(job: EngineJob, tmp_path: Path) -> None:
    job.graph.unlink()
    with pytest.raises(BuildError, match=r"cannot read .*graph\.onnx: No such file"):
        process.build_apart(job, tmp_path, print)


class TestReal:
    """With TensorRT-RTX itself."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    def test_facts_are_those_of_a_build_in_this_process(
        self, job: EngineJob, tmp_path: Path, allowed: bool
    ) -> None:
        known: list[dict[str, Any]] = []
        for name in ("apart", "here"):
            (tmp_path / name).mkdir()
        known.append(process.build_apart(job, tmp_path / "apart", lambda line: None))
        known.append(build_engine(api.load(api.RTX), job, tmp_path / "here", lambda line: None))
        assert known[0].pop("fixed_addresses") is allowed
        assert set(known[0]) == set(known[1])
        # Addresses and the name of the file are in these, or come from them.
        for name in ("engine_bytes", "engine_sha256", "memory", "log"):
            assert known[0].pop(name)
            assert known[1].pop(name)
        assert known[0] == known[1]
        apart, here = (tmp_path / name / "layers.json" for name in ("apart", "here"))
        assert apart.read_text() == here.read_text()

    def test_refusals_name_the_graph(self, job: EngineJob, tmp_path: Path, small: Small) -> None:
        turing = EngineJob(job.graph, False, ("7.5",), (1, 8, 64), None, None)
        with pytest.raises(BuildError, match=r"cannot build /.*/graph\.onnx: .*FP32 GEMM"):
            process.build_apart(turing, tmp_path, lambda line: None)
        model = small()
        next(node for node in model.graph.node if node.name == "gelu").op_type = "Det"
        onnx.save(model, job.graph)
        with pytest.raises(UnsupportedOperatorError, match=r"node 'gelu' \(Det\)"):
            process.build_apart(job, tmp_path, lambda line: None)
        job.graph.write_bytes(b"garbage")
        with pytest.raises(BuildError, match=rf"{job.graph}: the ONNX parser refuses it"):
            process.build_apart(job, tmp_path, lambda line: None)

    def test_nothing_is_written_outside_the_folder(
        self,
        job: EngineJob,
        tmp_path: Path,
        checkout: Callable[..., Path],
        build_in: Callable[..., dict[str, Any]],
    ) -> None:
        root, output = checkout(tmp_path / "checkout", compiled=False), tmp_path / "output"
        before = sorted(root.rglob("*"))
        home = tmp_path / "home"
        home.mkdir()
        build_in(root, job.graph, output, HOME=str(home), TMPDIR=str(home))
        assert sorted(root.rglob("*")) == before
        assert list(home.iterdir()) == []
        assert sorted(path.name for path in output.iterdir()) == ["layers.json", "model.engine"]
