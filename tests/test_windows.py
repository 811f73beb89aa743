"""RTX boxes run Windows: what checks and measures there uses nothing that POSIX alone has.

This is no Windows: the modules and names that it lacks are hidden, and the platform is renamed,
once the libraries of others are loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HIDDEN = """
import importlib, os, pathlib, signal, sys
for name in ("click", "filelock", "numpy", "psutil", "pydantic", "rich.table", "rich.progress",
             "onnxruntime", "onnx", "yaml", "jinja2", "torch", "tempfile", "ctypes", "subprocess"):
    importlib.import_module(name)
POSIX = {"fcntl", "resource", "grp", "pwd", "termios", "pty", "posix_ipc", "spwd"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in POSIX:
            raise ModuleNotFoundError(f"no module named {name!r} on Windows", name=name)
for name in POSIX:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for name in ("sched_getaffinity", "fork", "getuid", "geteuid", "killpg", "setsid", "getpgid",
             "posix_fallocate", "mkfifo", "statvfs", "sysconf", "uname", "getloadavg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGPIPE"):
    if hasattr(signal, name):
        delattr(signal, name)
sys.platform = "win32"
"""

LOAD = (
    HIDDEN
    + """
import pkgutil
for package in ("pipeline.core", "pipeline.steps", "pipeline.targets", "pipeline.targets.ort",
                "pipeline.targets.tensorrt", "pipeline.stages", "pipeline.commands"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name != "onnxsim_process":
            importlib.import_module(f"{package}.{module.name}")
import pipeline.cli, pipeline.source
print("loaded")
"""
)

CHECK = (
    HIDDEN
    + """
from pathlib import Path
from pipeline.core import machine
from pipeline.steps import artifact
root = Path(sys.argv[1])
artifact.make(root / "trial" / "calibration", kind="calibrate", name="calibration", key="k",
              made_from={}, tools={}, build=lambda place: (place / "pixels").write_text("x") and {})
assert machine.granted() >= 1
from pipeline.cli import main
main(["check", "trial", "--output", str(root)])
"""
)


@pytest.mark.parametrize(("program", "said"), [(LOAD, "loaded"), (CHECK, "ok")])
def test_nothing_of_posix_is_needed(program: str, said: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert said in run.stdout
