"""Opening ONNX Runtime sessions, quietly, with settings that are written down.

A setting that is not stated here is ONNX Runtime's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.targets.ort import providers

LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
"""How far ONNX Runtime optimizes the graph on load -> its name there."""

SPIN_US = 50
"""How long threads wait actively for more work, in microseconds: most operators follow each other
within that time, and whoever else needs the CPU gets it soon. ONNX Runtime's own 2^20 pauses are 15
to 50 ms, in which they take the CPU from whoever runs next."""

LONG_SPIN_US = 1000
"""The same where waiting longer is measured to be faster: the next call of a busy service finds
threads awake. Artifacts that state no duration were measured so."""

_SPIN_SINCE = (1, 26)
"""First ONNX Runtime that takes the duration (its pull request 27916); an older one is told to stop
waiting with the run."""

_FATAL = 4
_ERRORS = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
           "NotImplemented", "RuntimeException")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How a model is opened.

    Attributes:
        threads: Threads inside an operator; None for all that are granted.
        level: How far ONNX Runtime optimizes the graph on load, see `LEVELS`.
        spinning: Idle threads wait actively.
        provider: See `providers.NAMES`.
        entries: Further session options, by ONNX Runtime's name.
        spin_us: How long they do, in microseconds, see `SPIN_US`.
        precision: What the provider multiplies in, see `providers.PRECISIONS`.
        huge_pages: What it works in is moved to huge pages, see `pipeline.core.huge_pages`.
    """

    threads: int | None = None
    level: str = "all"
    spinning: bool = True
    provider: str = "cpu"
    entries: Mapping[str, str] = field(default_factory=dict)
    spin_us: int = SPIN_US
    precision: str = "fp32"
    huge_pages: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "entries": dict(self.entries)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{"spin_us": LONG_SPIN_US, **plain})


def runtime() -> Any:
    """The onnxruntime module, with its chatter off the screen.

    Raises:
        UnavailableError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError("onnxruntime is not installed: pip install onnxruntime") from error
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises; its exceptions have no base of their own."""
    state = runtime().capi.onnxruntime_pybind11_state
    return tuple(getattr(state, name) for name in _ERRORS)


def options(settings: Settings, threads: int, profile_prefix: Path | None = None) -> Any:
    """ONNX Runtime's session options for `settings`."""
    ort = runtime()
    made = ort.SessionOptions()
    made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[settings.level])
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    made.log_severity_level = _FATAL
    entries = {
        "session.intra_op.allow_spinning": "1" if settings.spinning else "0",
        **_spin_limit(ort.__version__, settings.spin_us),
        **settings.entries,
    }
    for key, value in entries.items():
        made.add_session_config_entry(key, value)
    if profile_prefix is not None:
        made.enable_profiling = True
        made.profile_file_prefix = str(profile_prefix)
    return made


def limits_spinning(version: str) -> bool:
    """Whether this version of ONNX Runtime can be told how long threads wait actively."""
    return tuple(map(int, version.split(".")[:2])) >= _SPIN_SINCE


def _spin_limit(version: str, microseconds: int) -> dict[str, str]:
    """What keeps threads from waiting actively for long, for a version of ONNX Runtime."""
    if limits_spinning(version):
        return {"session.intra_op.spin_duration_us": str(microseconds)}
    return {"session.force_spinning_stop": "1"}


def start(model: Path, settings: Settings, threads: int, profile_prefix: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` of a model.

    Args:
        model: An ONNX file.
        settings: How to open it.
        threads: How many threads, see `pipeline.core.threads`.
        profile_prefix: Where to write the time of every node, if at all.

    Raises:
        UnavailableError: onnxruntime or its provider is not installed.
        ArtifactError: ONNX Runtime does not accept the model.
    """
    ort = runtime()
    why = providers.missing(settings.provider, ort, settings.precision)
    if why is not None:
        raise UnavailableError(why)
    made = options(settings, threads, profile_prefix)
    chosen = providers.add(settings.provider, ort, made, threads, settings.precision)
    try:
        return ort.InferenceSession(str(model), made, providers=chosen or None)
    except errors() as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"onnxruntime does not accept {model}: {reason}") from error
