"""Make training steps of a preset at real size on the pretended GPU; print launches, syncs, memory.

python -m tests.pretended_gpu python -m tests.pretended_gpu.steps PRESET [--graphs on] [--batch 256]

Models have random weights of their architectures; values mean nothing, for kernels do nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections import Counter

import torch

from benchmarks import workload
from tests.pretended_gpu import values

GIB = 2**30
LAUNCHES = ("kernel", "library", "copy", "set")


class Device:
    """What the pretended GPU counted."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.pretended_counts.restype = ctypes.c_char_p
        self._library.pretended_peak.restype = ctypes.c_size_t

    def reset(self) -> None:
        self._library.pretended_reset()

    def counts(self) -> Counter[tuple[str, str]]:
        lines = self._library.pretended_counts().decode().splitlines()
        fields = [line.split("\t", 2) for line in lines]
        return Counter({(kind, name): int(count) for count, kind, name in fields})

    def total(self, *kinds: str) -> int:
        return sum(count for (kind, _), count in self.counts().items() if kind in kinds)

    def reserved(self) -> int:
        """Return the largest memory of the device that was taken since `reset`."""
        return int(self._library.pretended_peak())


def on_the_device() -> None:
    """Make tensors on the device at once: random weights of ViT-L take long on a CPU."""
    random_batch = workload.random_batch

    def on_the_host(*arguments):
        with torch.device("cpu"):
            return random_batch(*arguments)

    workload.random_batch = on_the_host
    torch.set_default_device("cuda")


def measure(preset: str, graphs: str, batch: int, form: str) -> dict[str, object]:
    """Make steps until graphs are captured; return what the last one did."""
    values.ignore()
    on_the_device()
    device = Device()
    work = workload.make_workload("paper", torch.device("cuda", 0), batch, preset)
    cfg = work.with_method(work.cfg.method, work.cfg.attack.order, form, graphs)
    step = work.step(cfg)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device.reset()
    for number in range(4):
        step(work.batch, number, 1e-3)
    broken = device.total("invalidated", "not captured", "invalid launch")
    reserved = device.reserved()
    device.reset()
    step(work.batch, 4, 1e-3)
    counts = device.counts()
    for (kind, name), count in counts.most_common(40):
        print(count, kind, name[:150])
    return {
        "launches": device.total(*LAUNCHES),
        "replays": device.total("replay"),
        "syncs": device.total("sync"),
        "broken": broken + device.total("invalidated", "not captured", "invalid launch"),
        "captured": bool(step.graphs and step.graphs.captured),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 1),
        "reserved_gib": round(reserved / GIB, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--graphs", choices=("on", "off", "auto"), default="on")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--form", choices=("", "kernels", "no savings"), default="")
    options = parser.parse_args()
    print(json.dumps(measure(options.preset, options.graphs, options.batch, options.form)))
