"""GPU counters: nothing without a GPU, and no crash where a board or a driver lacks some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dad_fast.loggers.gpu import Gpu


class NotSupported(Exception):
    """The error of pynvml for a counter that a board lacks."""


def missing(*_: Any) -> Any:
    raise NotSupported


def board(**changes: Any) -> Gpu:
    """A `Gpu` on a stand-in for pynvml with the readings of an ordinary board."""
    readings: dict[str, Any] = {
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlClocksEventReasonSwPowerCap": 4,
        "nvmlClocksEventReasonHwThermalSlowdown": 64,
        "nvmlDeviceGetName": lambda h: b"NVIDIA Board",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(total=80 * 2**30, used=2**30),
        "nvmlDeviceGetEnforcedPowerLimit": lambda h: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda h, which: {1: 1980, 2: 3201}[which],
        "nvmlDeviceGetPowerUsage": lambda h: 512_500,
        "nvmlDeviceGetClockInfo": lambda h, which: {1: 1755, 2: 3201}[which],
        "nvmlDeviceGetTemperature": lambda h, which: 61,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda h: (
            4 | 1
        ),  # power cap, and idle, which throttles nothing
        "nvmlDeviceGetTotalEnergyConsumption": lambda h: 1_500,
    }
    return Gpu(
        SimpleNamespace(
            **{name: value for name, value in (readings | changes).items() if value is not None}
        ),
        None,
    )


def test_readings_and_their_units() -> None:
    gpu = board()
    assert gpu.facts() == {
        "name": "NVIDIA Board",
        "driver": "580.1",
        "memory_gib": 80.0,
        "power_limit_w": 700.0,
        "max_sm_mhz": 1980,
        "max_memory_mhz": 3201,
    }
    assert gpu.sample() == {
        "power_w": 512.5,
        "sm_mhz": 1755,
        "memory_mhz": 3201,
        "temperature_c": 61,
        "memory_used_gib": 1.0,
        "throttled": ["power cap"],
    }
    assert gpu.energy_joules() == 1.5


def test_missing_counters_are_left_out() -> None:
    gpu = board(
        nvmlDeviceGetPowerUsage=missing,
        nvmlDeviceGetTotalEnergyConsumption=missing,
        nvmlDeviceGetTemperature=None,
    )
    assert (
        "power_w" not in gpu.sample()
        and "temperature_c" not in gpu.sample()
        and gpu.sample()["sm_mhz"] == 1755
    )
    assert gpu.energy_joules() is None
    nothing = Gpu(SimpleNamespace(), None)
    assert nothing.facts() == {} and nothing.sample() == {} and nothing.energy_joules() is None


def test_throttle_reasons_of_older_drivers() -> None:
    gpu = board(
        nvmlDeviceGetCurrentClocksEventReasons=None,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda h: 64,
        nvmlClocksEventReasonHwThermalSlowdown=None,
        nvmlClocksThrottleReasonHwThermalSlowdown=64,
    )
    assert gpu.sample()["throttled"] == ["thermal, hardware"]


def test_no_gpu_gives_none() -> None:
    torch = pytest.importorskip("torch")
    assert Gpu.open(torch.cuda.device_count()) is None


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    pytest.importorskip("pynvml")
    gpu = Gpu.open()
    assert gpu is not None and gpu.facts()["name"] and gpu.sample()["sm_mhz"] > 0
