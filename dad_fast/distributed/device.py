"""The device of this process."""

from __future__ import annotations

import torch

from dad_fast.distributed import process_group as distributed
from dad_fast.errors import EnvironmentProblem, UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device for `--device`. `auto` is a GPU if there is one, one per process.

    A GPU always has its number, which torch.cuda.set_device and NVML need: `cuda` is `cuda:0`. It
    becomes the current one, which streams, events and Triton's launches use.

    Raises UsageError for an invalid name, EnvironmentProblem for a GPU that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        number = distributed.local_rank() if distributed.world() > 1 else 0
        name = f"cuda:{number % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"--device {name}: torch finds no CUDA device; run dad-fast doctor, or use --device cpu"
        )
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
