"""Versions and hardware of this machine, for run.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from dad_fast.cores import num_cores, side_by_side

PACKAGES = (
    "dad-fast",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "open_clip_torch",
    "apache-tvm-ffi",
    "safetensors",
    "numpy",
    "pillow",
    "nvidia-ml-py",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "xformers",
    "apex",
)


def environment() -> dict[str, Any]:
    """Return versions and hardware for run.json. Never fails: an unknown value is None or left out.

    Contains no environment variables, since these may hold secrets.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": num_cores(),
        "side_by_side": side_by_side(),
        "packages": versions,
        "git": _git_commit(Path(__file__).resolve().parents[2]),
        **_torch_facts(),
        "driver": _driver(),
    }


def _torch_facts() -> dict[str, Any]:
    try:
        import torch

        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
        return {
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpus": gpus,
        }
    except Exception as error:
        # A broken driver must not stop a run on the CPU.
        return {
            "threads": None,
            "cuda": None,
            "cudnn": None,
            "gpus": [],
            "torch_problem": str(error).partition("\n")[0],
        }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        # No package, no driver or no GPU: the record holds None in each case.
        return None


def _git_commit(root: Path) -> str | None:
    """Return the commit of the checkout at `root`, with "+" where files differ.

    None for an installed package, also inside another repository. A copy of a checkout without its
    history has the commit that DAD_FAST_COMMIT names.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DAD_FAST_COMMIT") or None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
