"""Real processes for tests: code that several processes run together over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
# Seconds; on a busy machine anything may be slow, but only a hang takes this long.
HANG = 600.0
PREPARE = """
import os, sys, json, time, torch
torch.set_num_threads(1)
from dad_fast.config.schema import Config, EngineConfig
from dad_fast.distributed import process_group as d
cfg = Config(device="cpu")
d.init(cfg)
rank, world = d.rank(), d.world()
"""


def environment(**more):
    """Return the environment of a process of the tests, with the variables `more`."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | own | {name: str(value) for name, value in more.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, as the processes of `environment` do: results depend on the number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | warm.Process | None = None
) -> None:
    """Wait for `condition`. Fails after HANG seconds, or with stderr when `process` ends first."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"still waiting after {HANG:g} s"
        time.sleep(0.02)


def run_together(
    nproc: int, folder: Path, code: str, prepare: str = PREPARE
) -> list[tuple[int, str, str]]:
    """Run `code` after `prepare` in `nproc` processes; (exit code, stdout, stderr) of each."""
    return run_script(nproc, folder, ["-c", textwrap.dedent(prepare) + textwrap.dedent(code)])


def run_script(nproc: int, folder: Path, arguments: list[str]) -> list[tuple[int, str, str]]:
    """Run `python ARGUMENTS` in `nproc` processes; a single one gets no rank."""
    processes = []
    for rank in range(nproc):
        identity = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": nproc,
            "DAD_FAST_RENDEZVOUS": folder / f"rendezvous-{nproc}",
        }
        env = environment(**identity) if nproc > 1 else environment()
        processes.append(warm.start([sys.executable, *arguments], env=env))
    try:
        outputs = [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]
