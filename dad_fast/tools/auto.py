"""Meaning of speed settings that are "auto" on this machine's GPU, for `train --print-config`."""

from __future__ import annotations

import ctypes

from dad_fast.config import Config
from dad_fast.config.fields import get
from dad_fast.config.setting import Switch

# Decided when a run begins.
AT_START = {
    "engine.kernels": "on, each that passes its self-test at start",
    "engine.cuda_graphs": "on, if the step can be captured",
    "precision.channels_last": "on for students with more than one convolution",
}


def comments(cfg: Config) -> list[str]:
    """Return TOML comments; none without a GPU, for a run on a CPU, or if nothing is auto.

    Imports torch only where the driver finds a GPU.
    """
    if cfg.device == "cpu" or not _has_gpu():
        return []
    import torch

    from dad_fast.engine.choices import DeviceFacts, choose

    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda:0" if cfg.device in ("auto", "cuda") else cfg.device)
    decided = {path: str(found) for path, found in choose(DeviceFacts.of(device)).autos.items()}
    lines = [
        f"#   {path}: {text}"
        for path, text in (decided | AT_START).items()
        if get(cfg, path) == Switch.AUTO
    ]
    name = torch.cuda.get_device_name(device)
    return [f"# auto on {device}, {name}:", *lines] if lines else []


def _has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)
