"""Description of the machine in the records of a benchmark session."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from benchmarks.record import Record
from dad_fast.kernels.csrc import csrc, csrc_status
from dad_fast.loggers.environment import environment
from dad_fast.loggers.gpu import Gpu


class Machine:
    """Constant facts of the machine, and its load from the start to the end of a session."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = Gpu.open(device.index or 0) if device.type == "cuda" else None
        self.facts = environment()
        self.start = self._state()
        self._busy_start = _cpu_seconds()

    @property
    def slug(self) -> str:
        """Return a folder name for this device, such as nvidia-h200 or cpu-amd-epyc."""
        name = f"cpu {self.facts['cpu']}"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        name = re.sub(r"\(R\)|\(TM\)|@.*| CPU| Processor", "", name)
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def describe(self) -> Record:
        """Return the `machine` of a record."""
        facts = self.facts
        commit = facts["git"] or ""
        device: Record = {
            "kind": self.device.type,
            "cpu": facts["cpu"],
            "cpus": facts["cpus"],
            "threads": torch.get_num_threads(),
        }
        if self.device.type == "cuda":
            device |= facts["gpus"][self.device.index or 0] | (self.gpu.facts() if self.gpu else {})
        return {
            "device": device,
            "start": self.start,
            "end": self._state(),
            "cpu_share_of_others": self._others(),
            "python": facts["python"],
            "packages": facts["packages"],
            "csrc": re.sub(r"^on: .*\((.*)\)$", r"on, \1", csrc_status()) if csrc() else "off",
            "cuda": facts["cuda"],
            "cudnn": facts["cudnn"],
            "commit": commit.rstrip("+") or None,
            "dirty": commit.endswith("+"),
        }

    def _state(self) -> Record:
        load = {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
        return load | (self.gpu.sample() if self.gpu else {})

    def _others(self) -> float | None:
        """Return the share of all cores' time that other processes took in this session; None if
        unknown.
        """
        start, end = self._busy_start, _cpu_seconds()
        if start is None or end is None or end[0] <= start[0]:
            return None
        return round(max(0.0, (end[1] - start[1]) / (end[0] - start[0])), 3)


def _cpu_seconds() -> tuple[float, float] | None:
    """Return (time of all cores, busy time of processes other than this one and its children) in
    seconds.
    """
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    per_second = os.sysconf("SC_CLK_TCK")
    busy = (sum(ticks) - ticks[3] - ticks[4]) / per_second  # without idle and disk waits
    return sum(ticks) / per_second, busy - sum(os.times()[:4])
