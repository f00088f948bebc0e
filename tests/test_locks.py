"""Locks of folders: one process writes, and a dead one blocks nobody."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dad_fast import locks
from dad_fast.cli.main import main
from dad_fast.errors import DataError, UsageError
from dad_fast.locks import lock_folder

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from dad_fast import locks
from dad_fast.errors import program
locks.HEARTBEAT = 0.05

@program
def hold(arguments):
    with locks.lock_folder(Path(sys.argv[1])) as handle:
        {inside}
        print("held", flush=True)
        sys.stdin.read()

sys.exit(hold([]))
"""


def start(folder: Path, inside: str = "") -> subprocess.Popen[str]:
    code = HOLD.format(inside=inside)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@contextmanager
def holder(folder: Path, inside: str = "") -> Iterator[subprocess.Popen[str]]:
    """Process that holds the lock of `folder` until its stdin ends."""
    process = start(folder, inside)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def record_of_another_machine(folder: Path) -> Path:
    file = folder / ".lock"
    record = locks._record(os.getpid()) | {"host": "node7", "pid": 41, "boot": "another"}
    file.write_text(json.dumps(record))
    return file


def test_a_live_owner_is_named_and_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with holder(folder) as process:
        record = json.loads((folder / ".lock").read_text())
        assert record["command"].startswith("dad-fast")
        owner = rf"process {process.pid} on {record['host']} \(since \d{{4}}-\d\d-\d\d .*\) writes"
        with pytest.raises(UsageError, match=owner), lock_folder(folder):
            pass
        process.communicate("")
        assert process.returncode == 0 and not list(tmp_path.iterdir())
    with lock_folder(folder), lock_folder(folder):
        assert (folder / ".lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "os.fork() or time.sleep(2)"], ids=["alone", "forked"])
def test_a_killed_owner_blocks_nobody(tmp_path: Path, inside: str) -> None:
    with holder(tmp_path, inside) as process:
        kill(process)
        begun = time.monotonic()
        with lock_folder(tmp_path):
            assert time.monotonic() - begun < 2
        assert not (tmp_path / ".lock").exists()


def test_children_of_a_killed_owner_are_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "[sys.executable, '-c', 'import time; time.sleep({})']"
    inside = f"subprocess.Popen({child}, pass_fds=[handle])"
    with holder(tmp_path, inside.format("1")) as process:
        kill(process)
        with lock_folder(tmp_path):
            assert f"process {process.pid} on" in capsys.readouterr().err
    monkeypatch.setattr(locks, "ORPHANS", 0.3)
    with holder(tmp_path, inside.format("3")) as process:
        kill(process)
        with pytest.raises(UsageError, match=f"process {process.pid}"), lock_folder(tmp_path):
            pass


def test_one_of_many_that_start_together_wins(tmp_path: Path) -> None:
    processes = [start(tmp_path / "run") for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
    lines = [process.stdout.readline() for process in processes if process.stdout]
    ends = [process.communicate("") for process in processes]
    assert sorted(lines) == [""] * 5 + ["held\n"]
    assert sorted(process.returncode for process in processes) == [0, 2, 2, 2, 2, 2]
    for line, (_, error) in zip(lines, ends, strict=True):
        assert error.count("\n") == (not line) and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_locks", [True, False])
def test_an_owner_on_another_machine_counts_by_its_heartbeat(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_locks: bool,
) -> None:
    if not has_locks:

        def flock(handle: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(locks.fcntl, "flock", flock)
    file = record_of_another_machine(tmp_path)
    beats = threading.Timer(0.5, os.utime, [file])
    beats.start()
    owner = r"process 41 on node7 \(since"
    with pytest.raises(UsageError, match=owner), lock_folder(tmp_path):
        pass
    beats.join()
    assert "may have died; waiting up to" in capsys.readouterr().err
    # Long silent: at once. The file system's clock counts.
    os.utime(file, (0, time.time() - locks.STALE - 60))
    with lock_folder(tmp_path):
        assert "taken over from process 41 on node7" in capsys.readouterr().err
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()
    record_of_another_machine(tmp_path)
    monkeypatch.setattr(locks, "STALE", 0.5)
    with lock_folder(tmp_path):
        assert "taken over from" in capsys.readouterr().err


def test_without_locks_a_process_of_this_machine_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with holder(tmp_path) as process:
        monkeypatch.setattr(locks.fcntl, "flock", flock)
        with pytest.raises(UsageError, match=f"process {process.pid}"), lock_folder(tmp_path):
            pass
        kill(process)
        with lock_folder(tmp_path):
            pass


def test_an_owner_that_lost_its_lock_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        record_of_another_machine(tmp_path)
        error = process.stderr
        assert process.wait(10) == 4 and error is not None
        assert "taken over by process 41 on node7" in error.read()
    assert (tmp_path / ".lock").exists()


def test_a_full_disk_is_one_line_and_leaves_no_lock(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))"
    code = f"{limit}\n{HOLD.format(inside='')}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'run'}: the disk is full" in done.stderr
    assert not list(tmp_path.iterdir())


def test_read_only_folders(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        # Nobody writes there, so a finished run can be looked at.
        with lock_folder(tmp_path):
            pass
        with pytest.raises(DataError, match="cannot be written"), lock_folder(tmp_path / "new"):
            pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "1"}', "\0" * 9000])
def test_a_torn_record_blocks_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "train --nproc 1", "precompute", "ablate", "export"])
def test_commands_refuse_a_folder_that_another_process_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "out"
    name, *flags = command.split()
    if name in ("train", "ablate"):
        flags += ["--resume", "auto"]
    arguments = [name, "--preset", "demo", *flags, "-o", str(out)]
    if name == "export":
        pytest.importorskip("torch")
        arguments = ["export", str(tmp_path / "model.safetensors"), "-o", str(out)]
    with holder(out) as process:
        if name == "export":
            (out / ".lock").rename(tmp_path / ".out.lock")
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{out}: process {process.pid} on" in error
