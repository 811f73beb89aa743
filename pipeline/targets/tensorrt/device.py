"""What the driver says about the GPU.

Asked through the driver's own C library, which is there exactly when a driver is: no CUDA runtime
and no Python package is needed, and the answer takes a millisecond where there is none.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

NO_DRIVER = (
    "no NVIDIA driver is installed on this machine; run it on one with an RTX GPU and driver "
    "(nvidia-smi shows both)"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As NVIDIA calls it.
        capability: Compute capability, such as "8.9".
        memory: Bytes.
        driver_cuda: Newest CUDA version that the driver serves, such as (13, 0).
    """

    name: str
    capability: str
    memory: int
    driver_cuda: tuple[int, int]


def find_gpu(library: str = "libcuda.so.1") -> Gpu | str:
    """The first GPU (`CUDA_VISIBLE_DEVICES` counts), or in words why there is none.

    Args:
        library: Name of the driver's library.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return NO_DRIVER
    count = ctypes.c_int()
    if code := driver.cuInit(0):
        return f"the NVIDIA driver does not start ({_error(driver, code)}); reboot or reinstall it"
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi"
    return _describe(driver)


def _describe(driver: ctypes.CDLL) -> Gpu | str:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    version, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    codes = (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    )
    if failed := next((code for code in codes if code), 0):
        return f"the NVIDIA driver does not describe its GPU ({_error(driver, failed)})"
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{major.value}.{minor.value}",
        memory=memory.value,
        driver_cuda=(version.value // 1000, version.value % 1000 // 10),
    )


def _error(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"
