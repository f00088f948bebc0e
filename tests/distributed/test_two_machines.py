"""Two machines: network namespaces whose connection is cut. Needs root on Linux and iproute2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from tests.distributed.test_distributed_training import COMMON, saved_step
from tests.processes import HANG, environment

ADDRESS = "10.83.0"
TIMEOUT = 10.0  # --dist-timeout
REST = 300.0  # seconds for what comes after it, on a slow machine: they do not wait for an hour


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces, 10.83.0.1 and 10.83.0.2."""
    names = [f"dad-fast-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"{ADDRESS}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"cannot make network namespaces: {error}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def train(folder: Path, *more: str) -> list[str]:
    sets = [part for item in (*COMMON, "schedule.epochs=50") for part in ("--set", item)]
    return [
        sys.executable,
        "-m",
        "dad_fast",
        "train",
        "--preset",
        "demo",
        *sets,
        "-o",
        str(folder),
        "--resume",
        "auto",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces")
def test_cut_connection_is_reported(machines: list[str], tmp_path: Path) -> None:
    """Both sides name the lost process and end; the remaining machine resumes alone."""
    run, processes = tmp_path / "run", []
    for rank, name in enumerate(machines):
        own = {
            "RANK": rank,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": f"{ADDRESS}.1",
            "MASTER_PORT": 29500,
        }
        env = environment(**own, GLOO_SOCKET_IFNAME="eth0")
        command = ["ip", "netns", "exec", name, *train(run, "--dist-timeout", str(TIMEOUT))]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        deadline = time.monotonic() + HANG
        while (
            not (run / "checkpoints/latest").exists() or saved_step(run) < 9
        ):  # by then --dist-timeout holds
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in processes
            )
            time.sleep(0.1)
        ip("-n", machines[1], "link", "set", "eth0", "down")
        said = [process.communicate(timeout=TIMEOUT + REST)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], said
    assert "error: process 1 of 2 (counted from 0) is gone" in said[0]
    assert (
        "error: process 0 of 2, or torchrun's rendezvous machine, is gone or cannot be reached"
        in said[1]
    )

    step = saved_step(run)
    done = subprocess.run(
        train(run, "--max-steps", str(step + 3)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert f"steps    {step} to {step + 3} of 24 images" in done.stderr
