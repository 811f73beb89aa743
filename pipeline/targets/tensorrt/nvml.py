"""Clocks, temperature and power of the GPU, by NVML where `nvidia-ml-py` is installed."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any

INSTALL = "pip install nvidia-ml-py"

_HARMLESS = ("GpuIdle", "ApplicationsClocksSetting", "None")


@dataclass(frozen=True)
class GpuState:
    """What the GPU's sensors say at one moment.

    Attributes:
        sm_clock: MHz.
        memory_clock: MHz.
        temperature: Degrees Celsius.
        power: Watts; None where the GPU has no sensor.
        throttled: Reasons for which the clock is held down, such as "SwPowerCap".
        driver: Version of the driver.
    """

    sm_clock: int
    memory_clock: int
    temperature: int
    power: float | None
    throttled: tuple[str, ...]
    driver: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read(bus_id: str | None = None, module: Any = None) -> GpuState | str:
    """Read the sensors.

    Args:
        bus_id: PCI address of the GPU, as CUDA gives it; None for the first. NVML numbers GPUs in
            its own order and knows nothing of CUDA_VISIBLE_DEVICES.
        module: The `pynvml` module, for tests.

    Returns:
        The state, or in words why there is none: sensors are told beside a measurement, and one
        that does not answer, as in some virtual machines, must not end it.
    """
    if module is None:
        try:
            module = importlib.import_module("pynvml")
        except ImportError:
            return INSTALL
    try:
        module.nvmlInit()
    except module.NVMLError as error:
        return f"NVML does not start ({error})"
    try:
        if bus_id is None:
            handle = module.nvmlDeviceGetHandleByIndex(0)
        else:
            handle = module.nvmlDeviceGetHandleByPciBusId(bus_id)
        return _state(module, handle)
    except module.NVMLError as error:
        return f"NVML does not read the GPU at {bus_id or 'its first place'} ({error})"
    finally:
        module.nvmlShutdown()


def _state(nvml: Any, handle: Any) -> GpuState:
    try:
        power: float | None = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
    except nvml.NVMLError:
        power = None
    driver = nvml.nvmlSystemGetDriverVersion()
    return GpuState(
        sm_clock=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_clock=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        temperature=int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power=power,
        throttled=_throttled(nvml, handle),
        driver=driver.decode() if isinstance(driver, bytes) else str(driver),
    )


def _throttled(nvml: Any, handle: Any) -> tuple[str, ...]:
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError:
        return ()
    prefix = "nvmlClocksThrottleReason"
    names = (
        (name.removeprefix(prefix), value)
        for name, value in vars(nvml).items()
        if name.startswith(prefix) and isinstance(value, int)
    )
    # Only single bits are reasons; among the constants there is also a mask of all.
    return tuple(
        name
        for name, value in names
        if value & bits and value.bit_count() == 1 and name not in _HARMLESS
    )
