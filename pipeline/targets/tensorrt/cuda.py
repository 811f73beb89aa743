"""The GPU by `torch.cuda`, with its errors in the pipeline's own words.

Streams, events, memory and graphs are torch's, and are used as they are where an engine runs
(`runner.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.core.errors import PipelineError, UnavailableError

DEVICE = 0
"""The first GPU that CUDA_VISIBLE_DEVICES leaves; `find_gpu` describes the same."""

_MEMORY = (
    "the GPU has too little free memory; close what else runs on it or build with a smaller "
    "largest batch"
)
_DRIVER = "the NVIDIA driver is too old for this CUDA runtime; install a newer driver"
_REMEDIES = {
    2: _MEMORY,  # cudaErrorMemoryAllocation
    35: _DRIVER,  # cudaErrorInsufficientDriver
    46: "the GPU is held exclusively by another process",  # cudaErrorDevicesUnavailable
    100: "no GPU is visible; check CUDA_VISIBLE_DEVICES and nvidia-smi",  # cudaErrorNoDevice
}
# What torch finds out while it starts has no code, only these words (c10/cuda/CUDAFunctions.cpp).
_AT_START = {
    "Found no NVIDIA driver": "install an NVIDIA driver; nvidia-smi shows it",
    "driver on your system is too old": _DRIVER,
    "No CUDA GPUs are available": _REMEDIES[100],
    "busy or unavailable": _REMEDIES[46],
}


def start() -> None:
    """Start CUDA on the GPU.

    Raises:
        UnavailableError: There is no GPU or no driver, or torch was built without CUDA.
    """
    if torch.version.cuda is None:
        raise UnavailableError(
            f"torch {torch.__version__} was built without CUDA; install one with it"
        )
    try:
        with explained("CUDA does not start"):
            torch.cuda.init()
            torch.cuda.set_device(DEVICE)
    except RuntimeError as error:
        line = _first_line(error)
        known = (remedy for words, remedy in _AT_START.items() if words in line)
        remedy = next(known, "nvidia-smi tells whether the GPU is well")
        raise UnavailableError(f"CUDA does not start: {line}: {remedy}") from error


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn CUDA's errors into the pipeline's own.

    Args:
        where: What was being done, or with which file, for messages.

    Raises:
        UnavailableError: Memory, driver or device are lacking.
        PipelineError: Any other CUDA error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:  # of torch's own allocator, for the GPU
        raise UnavailableError(f"{where}: CUDA error: out of memory: {_MEMORY}") from error
    except torch.AcceleratorError as error:
        code = int(getattr(error, "error_code", -1))  # torch's stubs do not have it
        line = _first_line(error)
        if remedy := _REMEDIES.get(code):
            raise UnavailableError(f"{where}: {line}: {remedy}") from error
        raise PipelineError(
            f"{where}: {line} (code {code}); nvidia-smi tells whether the GPU is well"
        ) from error


def free_memory() -> int:
    """Bytes that are free on the GPU."""
    free, _ = torch.cuda.mem_get_info(DEVICE)
    return free


def bus_id() -> str:
    """PCI address of the GPU, by which NVML knows it, such as "0000:01:00.0"."""
    gpu: Any = torch.cuda.get_device_properties(DEVICE)  # torch's stubs have no address
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def _first_line(error: BaseException) -> str:
    # What follows is advice for those who write kernels.
    return str(error).partition("\n")[0]
