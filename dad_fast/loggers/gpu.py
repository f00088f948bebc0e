"""Counters of one NVIDIA GPU by nvidia-ml-py.

Power, clocks, temperature, memory, throttling and energy. Counters that the driver or the board
lacks are left out; without a GPU, a driver or the package, `Gpu.open` returns None. Reading takes
about a millisecond on the host and never waits for the GPU, so a run may read at its log steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Reasons for a clock below the GPU's own, by the names of NVML's constants.
THROTTLES = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "thermal, software",
    "HwThermalSlowdown": "thermal, hardware",
    "HwPowerBrakeSlowdown": "power brake",
}


class Gpu:
    """One GPU. Methods never raise; counters that cannot be read are left out or None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, index: int = 0) -> Gpu | None:
        """Open the GPU that torch calls cuda:`index`, by UUID: NVML may count differently."""
        try:
            import pynvml
            import torch

            if index >= torch.cuda.device_count():
                return None
            uuid = str(torch.cuda.get_device_properties(index).uuid)
            pynvml.nvmlInit()
            prefix = "" if uuid.startswith(("GPU-", "MIG-")) else "GPU-"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid))
        except Exception:
            # No package, no driver or a board that NVML does not know: a run needs none of them.
            return None

    def facts(self) -> dict[str, Any]:
        """Return constants: name, driver, memory_gib, power_limit_w, max_sm_mhz, max_memory_mhz."""
        nvml, handle = self._nvml, self._handle
        return _present(
            name=_try(lambda: _text(nvml.nvmlDeviceGetName(handle))),
            driver=_try(lambda: _text(nvml.nvmlSystemGetDriverVersion())),
            memory_gib=_try(lambda: round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1)),
            power_limit_w=_try(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
            max_sm_mhz=_try(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
            max_memory_mhz=_try(
                lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
            ),
        )

    def sample(self) -> dict[str, Any]:
        """Read power_w, sm_mhz, memory_mhz, temperature_c, memory_used_gib and throttled.

        memory_used_gib is that of all processes, throttled a list of reasons.
        """
        nvml, handle = self._nvml, self._handle
        return _present(
            power_w=_try(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            sm_mhz=_try(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            memory_mhz=_try(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            temperature_c=_try(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            memory_used_gib=_try(
                lambda: round(nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30, 2)
            ),
            throttled=_try(self._throttled),
        )

    def energy_joules(self) -> float | None:
        """Return the energy since the driver was loaded.

        The counter is updated about every 0.1 s: measure over a second or more.
        """
        return _try(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3)

    def _throttled(self) -> list[str]:
        nvml = self._nvml
        # Renamed in driver 535: Throttle became Event.
        read = (
            getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
            or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        )
        bits = read(self._handle)
        found = []
        for constant, words in THROTTLES.items():
            old = getattr(nvml, f"nvmlClocksThrottleReason{constant}", 0)
            bit = getattr(nvml, f"nvmlClocksEventReason{constant}", old)
            if bits & bit:
                found.append(words)
        return found


def _try(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:
        # NVMLError_NotSupported, an older binding without the function, a GPU that is lost.
        return None


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
