"""Full disks, quotas and read-only folders: one line, exit code 4, and no other file lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from harness import HANG, ROOT

from tests import warm

SMALL = [
    "data.batch_size=20",
    "data.workers=0",
    "log_every=4",
    "eval.every_epochs=0",
    "eval.suites=[]",
    "variants={}",
    "device=cpu",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "schedule.epochs=1",
    "max_steps=12",
    "checkpoint.every_steps=4",
]
SETS = [part for item in SMALL for part in ("--set", item)]


# `dad-fast` where a file holds at most 100,000 bytes.
WITH_QUOTA = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from dad_fast.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def dad_fast(
    *arguments: str, program: tuple[str, str] = ("-m", "dad_fast")
) -> subprocess.CompletedProcess[str]:
    return warm.run([sys.executable, *program, *arguments], timeout=HANG, cwd=ROOT)


def train(
    folder: Path, *more: str, program: tuple[str, str] = ("-m", "dad_fast")
) -> subprocess.CompletedProcess[str]:
    return dad_fast(
        "train",
        "--preset",
        "demo",
        "--method",
        "kd",
        *SETS,
        *more,
        "-o",
        str(folder),
        program=program,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_earlier_checkpoints(small_disk: Path) -> None:
    stopped = train(small_disk / "run")
    assert stopped.returncode == 4, stopped.stderr
    assert "the disk is full" in last_line(stopped) and "--resume auto" in last_line(stopped)
    checkpoints = small_disk / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-4", "step-8"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    resumed = train(small_disk / "run", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert (small_disk / "run" / "results.json").exists()


def test_quota_reached_in_the_middle_of_a_file(tmp_path: Path) -> None:
    stopped = train(tmp_path / "run", program=("-c", WITH_QUOTA))
    assert stopped.returncode == 4, stopped.stderr
    assert "step-4: the disk is full, or a limit is reached" in last_line(stopped)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize("command", ["train", "precompute"])
def test_read_only_output_is_one_line(tmp_path: Path, command: str) -> None:
    if not Path("/sys/kernel").is_dir():
        pytest.skip("needs Linux's /sys, where no folder can be made")
    folder = "/sys/kernel/run"
    if command == "train":
        done = train(Path(folder))
    else:
        done = dad_fast("precompute", "--preset", "demo", *SETS, "-o", folder)
    assert done.returncode == 4 and folder in last_line(done)
    assert "check the path" in last_line(done) or "cannot be written" in last_line(done)


def test_output_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = train(tmp_path / "file" / "run")
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"
