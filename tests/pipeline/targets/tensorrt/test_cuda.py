"""The fake of `torch.cuda` against the real one, and its errors in the pipeline's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import PipelineError, UnavailableError
from pipeline.targets.tensorrt import cuda as module
from pipeline.targets.tensorrt.device import Gpu, find_gpu
from pipeline.targets.tensorrt.target import torch_cuda

without_gpu = pytest.mark.skipif(isinstance(find_gpu(), Gpu), reason="this machine has a GPU")
# A torch that was built for CPUs has neither streams nor graphs, only names for them.
with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")


def misfits(fake: Callable[..., Any], real: Callable[..., Any]) -> list[str]:
    """Where a call that the fake takes could be one that the real thing refuses."""
    given, wanted = (dict(inspect.signature(f).parameters) for f in (fake, real))
    given.pop("self", None), wanted.pop("self", None)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in wanted.values() if p.default is p.empty and p.kind not in kinds]
    wrong = [f"needs {name}" for name in needed if name not in given]
    places = list(wanted)
    for place, (name, parameter) in enumerate(given.items()):
        if name not in wanted:
            wrong.append(f"has no {name}")
        elif places.index(name) < place or wanted[name].kind is not parameter.kind:
            wrong.append(f"has {name} elsewhere")
        elif parameter.default not in (parameter.empty, wanted[name].default):
            wrong.append(f"has another {name} if nothing is said")
    return wrong


def methods(fake_class: type) -> list[str]:
    return [name for name in vars(fake_class) if not name.startswith("__")]


def test_functions_and_classes_of_torch_cuda(cuda: Any) -> None:
    names = vars(cuda.torch.cuda)
    assert len(names) == 9
    assert {name: misfits(fake, getattr(torch.cuda, name)) for name, fake in names.items()} == {
        name: [] for name in names
    }


@with_cuda
@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("Stream", {"synchronize"}),
        ("Event", {"record", "elapsed_time"}),
        ("CUDAGraph", {"capture_begin", "capture_end", "replay"}),
    ],
)
def test_methods_of_torch_cuda(cuda: Any, name: str, used: set[str]) -> None:
    fake, real = getattr(cuda.torch.cuda, name).func, getattr(torch.cuda, name)
    assert set(methods(fake)) == used
    assert {method: misfits(getattr(fake, method), getattr(real, method)) for method in used} == {
        method: [] for method in used
    }


@with_cuda
def test_attributes_of_torch_cuda() -> None:
    assert hasattr(torch.cuda.Stream, "cuda_stream")
    for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"):
        assert hasattr(torch._C._CudaDeviceProperties, name)


def test_misfits_are_found() -> None:
    def real(pool: Any, mode: str = "global", *, late: int = 0) -> None: ...

    def missing(mode: str = "global") -> None: ...
    def unknown(pool: Any, size: int = 0) -> None: ...
    def other_default(pool: Any, mode: str = "relaxed") -> None: ...
    def swapped(mode: str = "global", pool: Any = None) -> None: ...
    def by_place(pool: Any, late: int = 0) -> None: ...
    def fits(pool: Any, *, late: int = 0) -> None: ...

    assert misfits(missing, real) == ["needs pool"]
    assert misfits(unknown, real) == ["has no size"]
    assert misfits(other_default, real) == ["has another mode if nothing is said"]
    assert "has pool elsewhere" in misfits(swapped, real)
    assert misfits(by_place, real) == ["has late elsewhere"]
    assert misfits(fits, real) == []


def test_errors_of_torch() -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert issubclass(torch.AcceleratorError, RuntimeError)
    assert not issubclass(torch.OutOfMemoryError, torch.AcceleratorError)


@with_cuda
@without_gpu
@pytest.mark.parametrize("where", [{"device": "cuda:0"}, {"pin_memory": True}])
def test_torch_knows_the_places_of_memory(where: dict[str, Any]) -> None:
    """torch's `empty` shows no signature: it is called, and misses the driver, not an argument."""
    with pytest.raises(RuntimeError, match="Found no NVIDIA driver"):
        torch.empty(2, 3, dtype=torch.float32, **where)


def test_parts_of_tensors_share_their_memory() -> None:
    """What copies by parts relies on, with tensors of the host."""
    whole, source = torch.zeros(4, 3), torch.ones(4, 3)
    whole[:2].copy_(source[:2], non_blocking=True)
    np.copyto(source[:1].numpy(), 7)
    assert whole.sum() == 6
    assert source[0, 0] == 7
    assert whole[:2].data_ptr() == whole.data_ptr()


@with_cuda
@without_gpu
def test_a_machine_without_a_driver() -> None:
    with pytest.raises(UnavailableError, match=r"^CUDA does not start: Found no NVIDIA driver"):
        module.start()


@with_cuda
@without_gpu
def test_a_real_error_of_cuda() -> None:
    words = r"^here: CUDA error: .*: the NVIDIA driver is too old for this CUDA runtime; install a"
    with pytest.raises(UnavailableError, match=words), module.explained("here"):
        torch.cuda.Stream()


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "Found no NVIDIA driver on your system. Please check",
            "install an NVIDIA driver; nvidia-smi shows it",
        ),
        ("The NVIDIA driver on your system is too old (found version 12040)", "a newer driver"),
        ("No CUDA GPUs are available", "check CUDA_VISIBLE_DEVICES and nvidia-smi"),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 46: CUDA-capable device(s) is/are "
            "busy or unavailable",
            "held exclusively by another process",
        ),
        ("CUDA unknown error - this may be due to", "nvidia-smi tells whether the GPU is well"),
    ],
)
def test_what_torch_says_when_it_starts(cuda: Any, said: str, remedy: str) -> None:
    cuda.fail["init"] = (0, RuntimeError(f"{said}\nadvice"))
    with pytest.raises(UnavailableError) as error:
        module.start()
    assert str(error.value).startswith(f"CUDA does not start: {said}: ")
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (2, UnavailableError, "build with a smaller largest batch"),
        (35, UnavailableError, "install a newer driver"),
        (46, UnavailableError, "the GPU is held exclusively by another process"),
        (100, UnavailableError, "check CUDA_VISIBLE_DEVICES and nvidia-smi"),
        (700, PipelineError, "(code 700); nvidia-smi tells whether the GPU is well"),
    ],
)
def test_codes_of_cuda(
    cuda_error: Callable[[int, str], Exception], code: int, kind: type[PipelineError], words: str
) -> None:
    with pytest.raises(kind) as error, module.explained("model.engine"):
        raise cuda_error(code, "in CUDA's words")
    assert type(error.value) is kind
    assert str(error.value).startswith("model.engine: CUDA error: in CUDA's words")
    assert str(error.value).endswith(words)
    assert "\n" not in str(error.value)


def test_too_little_memory_for_torch(out_of_memory: Exception) -> None:
    words = "here: CUDA error: out of memory: the GPU has too little free memory"
    with pytest.raises(UnavailableError, match=words), module.explained("here"):
        raise out_of_memory


def test_mistakes_of_ours_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), module.explained("here"):
        raise RuntimeError("shapes do not match")


def test_a_torch_without_cuda(cuda: Any) -> None:
    cuda.torch.version.cuda = None
    with pytest.raises(UnavailableError, match=r"torch 2\.15\.0\+cu132 was built without CUDA"):
        module.start()


def test_cuda_of_torch_without_importing_it() -> None:
    assert torch_cuda() == torch.version.cuda


def test_cuda_of_torch_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert torch_cuda() is None


def test_the_address_of_a_gpu(cuda: Any) -> None:
    assert module.bus_id() == "0000:41:1f.0"
