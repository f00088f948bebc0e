"""SIGTERM, SIGUSR1 and Ctrl-C in every phase of every command, in one process and in several.

The command exits with the documented code, prints one line and leaves no process behind; the same
command, run again, ends with the result of an uninterrupted run. slowly/sitecustomize.py slows a
phase down, so that the signal meets it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

for package in ("torch", "timm", "open_clip"):
    pytest.importorskip(package)
import tiny

from tests.processes import HANG, ROOT, run_together

SLOWLY = Path(__file__).parent / "slowly"
# From the signal to the end of the last process: less than any timeout of the processes themselves.
SECONDS_TO_END = 240.0
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "dad_fast",
)
RUN = [
    *shlex.split("-b 8 -j 0 --epochs 2 --warmup-epochs 0 --device cpu --set log_every=2"),
    *shlex.split("--resume auto"),
]


class Phase(NamedTuple):
    """Phase of a command.

    slow: its function that is slowed down, as module:function:seconds.
    number: the signal.
    words: of the last line.
    """

    command: str
    slow: str
    number: signal.Signals
    words: str
    nproc: int = 1


VERIFY = "dad_fast.data.sources.index:_verify:0.5"
HEAD = "dad_fast.models.zeroshot:_compute:60"
EVALUATE = "dad_fast.evaluation.runner:image_scores:0.5"
STEP = "dad_fast.engine.step:TrainStep.__call__:1"
LABELS = "dad_fast.engine.probe.pseudo_labels:pseudo_labels:0.5"
FEATURES = "dad_fast.engine.probe.features:execute:0.2"
SAVING = "dad_fast.checkpoint.folder:CheckpointFolder.save:1"
# In the final evaluation of a run, and after its results are written.
TEACHER_SCORES = "dad_fast.engine.finish:_teacher_record:60"
REPORT = "dad_fast.report.page:write_report:60"
BLOCK = "dad_fast.precompute.fill:adversarial:0.5"

AGAIN = "run the same command again with --resume auto"
SAVED = "saved in"
WHOLE = "the results above are complete"
PHASES = {
    "train, flags": Phase("train", "dad_fast.cli.train:main:60", TERM, AGAIN),
    "train, index": Phase("train", VERIFY, TERM, AGAIN),
    "train, index, two": Phase("train", VERIFY, INT, AGAIN, 2),
    "train, zero-shot head": Phase("train", HEAD, USR1, AGAIN),
    "train, zero-shot head, two": Phase("train", HEAD, TERM, AGAIN, 2),
    "train, first step": Phase("train", STEP, INT, "stopped in the first step"),
    "train, first step, two": Phase("train", STEP, TERM, "stopped in the first step", 2),
    "train, checkpoint": Phase("train", SAVING, TERM, SAVED),
    "train, checkpoint, two": Phase("train", SAVING, INT, SAVED, 2),
    "train, validation": Phase("train", EVALUATE, INT, "stopped at step 3 of 6; saved"),
    "train, validation, two": Phase("train", EVALUATE, TERM, "stopped at step 1 of 2; saved", 2),
    "train, report": Phase("train", REPORT, TERM, AGAIN),
    "students, evaluation": Phase("students", TEACHER_SCORES, TERM, AGAIN),
    "students, evaluation, two": Phase("students", TEACHER_SCORES, INT, AGAIN, 2),
    "students, between two": Phase("students", REPORT, USR1, AGAIN),
    "lp-clip, labels": Phase("lp-clip", LABELS, TERM, AGAIN),
    "lp-clip, labels, two": Phase("lp-clip", LABELS, INT, AGAIN, 2),
    "lp-clip, features": Phase("lp-clip", FEATURES, INT, AGAIN),
    "lp-clip, features, two": Phase("lp-clip", FEATURES, TERM, AGAIN, 2),
    "precompute, index": Phase("precompute", VERIFY, TERM, "run the same command again to resume"),
    "precompute, block": Phase("precompute", BLOCK, INT, "run the same command to resume"),
    "precompute, block, two": Phase("precompute", BLOCK, TERM, "run the same command to resume", 2),
    "eval, index": Phase("eval", VERIFY, INT, WHOLE),
    "eval, index, two": Phase("eval", VERIFY, TERM, WHOLE, 2),
    "eval, evaluation": Phase("eval", EVALUATE, TERM, WHOLE),
    "eval, evaluation, two": Phase("eval", EVALUATE, INT, WHOLE, 2),
    "ablate, check": Phase("ablate", VERIFY, TERM, "0 of 2 runs done"),
    "ablate, run": Phase("ablate", STEP, INT, "0 of 2 runs done"),
    "ablate, evaluation": Phase("ablate", EVALUATE, TERM, "0 of 2 runs done"),
}


def arguments(command: str, parts: Path, out: Path) -> list[str]:
    data = ["--data-dir", str(parts / "data"), "--teacher", str(parts / "teacher.safetensors")]
    if command in ("train", "students"):
        more = ["--student", "resnet18", "resnet26"] if command == "students" else []
        return [
            *shlex.split("train --method kd"),
            *data,
            *tiny.STUDENT,
            *more,
            *RUN,
            *shlex.split("--val-every 1 -o"),
            str(out),
        ]
    if command == "lp-clip":
        return ["train", "--method", "lp-clip", "--lp-views", "1", *data, *RUN, "-o", str(out)]
    if command == "eval":
        return ["eval", *data, *shlex.split("-b 2 -j 0 --device cpu --suite val --json"), str(out)]
    discretizer = ["--discretizer", "jpeg:60", "-o", str(out), "-j", "0"]
    if command == "precompute":
        return [
            "precompute",
            *data,
            *discretizer,
            *shlex.split("--images raw -b 2 --shard-blocks 1 --device cpu"),
        ]
    sweep = [
        *shlex.split("-b 8 --epochs 1 --warmup-epochs 0 --devices cpu --jobs 1 --seeds 1"),
        *shlex.split("--axes filter"),
    ]
    return ["ablate", *data, *tiny.STUDENT, *discretizer, *sweep, "--resume", "auto"]


def start(line: list[str], folder: Path, slow: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DAD_FAST_CACHE": str(folder / "cache"),
    }
    if slow:
        slowly = {"DAD_FAST_SLOW": slow, "DAD_FAST_SLOW_MARK": str(folder / "met")}
        environment |= slowly | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SLOWLY)])}
    return subprocess.Popen(
        line,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop(line: list[str], folder: Path, slow: str, number: int, ranks: int = 1) -> tuple[int, str]:
    """Send a signal once `ranks` processes are in the slow phase. Return (exit code, stderr)."""
    process = start(line, folder, slow)
    try:
        until = time.monotonic() + HANG
        while len(list(folder.glob("met-*"))) < ranks:
            assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        stderr = process.communicate(timeout=SECONDS_TO_END)[1]
        find_processes = ["pgrep", "--session", str(process.pid)]
        left = subprocess.run(find_processes, capture_output=True).stdout
        assert not left, "a process is left behind"
        return process.returncode, stderr
    finally:
        process.kill()


def contents(command: str, out: Path) -> Any:
    """Return the results that must equal those of an uninterrupted run."""
    if command == "eval":
        return json.loads(out.read_text())["teacher"]["suites"]
    if command == "precompute":
        return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
    found: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("model.safetensors")
        if "checkpoints" not in str(path)
    }
    if command == "students":
        for path in out.glob("*/*/results.json"):
            record = json.loads(path.read_text())
            del record["seconds"]
            assert record["shared_by"] == 2
            found[str(path.relative_to(out))] = record
        assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def straight(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of an uninterrupted command, by command and number of processes."""
    made: dict[tuple[str, int], Any] = {}

    def get(command: str, nproc: int) -> Any:
        if (command, nproc) not in made:
            folder = tmp_path_factory.mktemp("straight")
            made[command, nproc] = run_to_the_end(command, parts, folder, nproc)
        return made[command, nproc]

    return get


def run_to_the_end(command: str, parts: Path, folder: Path, nproc: int) -> Any:
    process = start(command_line(command, parts, folder, nproc), folder)
    stderr = process.communicate(timeout=HANG)[1]
    assert process.returncode == 0, stderr
    return contents(command, folder / "out")


def command_line(command: str, parts: Path, folder: Path, nproc: int) -> list[str]:
    several = ["--nproc", str(nproc)] if nproc > 1 else []
    return [sys.executable, "-m", "dad_fast", *arguments(command, parts, folder / "out"), *several]


def stopped(name: str, parts: Path, folder: Path) -> Phase:
    phase = PHASES[name]
    # One process indexes, and one writes.
    ranks = 1 if phase.slow in (VERIFY, SAVING) else phase.nproc
    line = command_line(phase.command, parts, folder, phase.nproc)
    code, stderr = stop(line, folder, phase.slow, phase.number, ranks)
    assert code == (130 if phase.number == INT else 75), stderr
    errors = [line for line in stderr.splitlines() if "dad-fast: error" in line]
    assert len(errors) == 1 and phase.words in errors[0] and "Traceback" not in stderr, stderr
    return phase


def test_stop_exits_with_the_documented_code(parts: Path, tmp_path: Path) -> None:
    """One phase, in two processes; the next test, which is slow, covers all of them."""
    stopped("train, index, two", parts, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PHASES)
def test_resume_after_a_stop_in_any_phase_is_bit_exact(
    parts: Path, tmp_path: Path, straight: Any, name: str
) -> None:
    phase = stopped(name, parts, tmp_path)
    resumed = run_to_the_end(phase.command, parts, tmp_path, phase.nproc)
    assert resumed == straight(phase.command, phase.nproc)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, slow, number",
    [("eval", EVALUATE, TERM), ("train", EVALUATE, USR1), ("train", VERIFY, INT)],
    ids=["eval", "validation", "index"],
)
def test_stop_under_torchrun(
    parts: Path, tmp_path: Path, straight: Any, command: str, slow: str, number: int
) -> None:
    """torchrun forwards SIGTERM and Ctrl-C and exits with 1.

    SIGUSR1 kills it, and its processes notice.
    """
    given = [*TORCHRUN, *arguments(command, parts, tmp_path / "out")]
    code, stderr = stop(given, tmp_path, slow, number, ranks=1 if slow == VERIFY else 2)
    assert code == (-USR1 if number == USR1 else 1), stderr
    assert (WHOLE if command == "eval" else "--resume auto") in stderr, stderr
    assert run_to_the_end(command, parts, tmp_path, 2) == straight(command, 2)


def test_processes_with_unequal_shares_stop_together(parts: Path, tmp_path: Path) -> None:
    """Three processes share five images (2, 2, 1) or two (1, 1, 0).

    A signal to one stops all of them.
    """
    code = f"""
    import signal, numpy as np
    from dad_fast.data.augment.view import View
    from dad_fast.data.sources.registry import open_source
    from dad_fast.distributed.signals import stop_requests
    from dad_fast.errors import Preempted
    from dad_fast.evaluation.runner import evaluate
    from dad_fast.data.sources.subset import Subset
    from dad_fast.evaluation.suites.base import EvalSet
    source = open_source({str(parts / "data")!r}, "val")
    how = {{"view": View(8, 1.0, "bilinear"), "batch_size": 1, "workers": 0, "device": torch.device("cpu"), "stopped": "as asked"}}

    def count(stopping_rank, num_images, corruption=None):
        def model(pixels):
            if rank == stopping_rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            return torch.zeros(len(pixels), 3)
        rows = np.arange(num_images)
        part = Subset(source, rows, source.labels[rows])
        eval_set = EvalSet("some", (part, part), source.classes)
        with stop_requests():
            try:
                result = evaluate(model, eval_set, corruption=corruption, **how)
                return result.num_images
            except Preempted as stop:
                return str(stop)
    of_five = count(None, 5), count(0, 5), count(2, 5, ("contrast", None))
    print(*of_five, count(1, 2), count(2, 2), count(None, 2))
    d.close()
    """
    found = run_together(3, tmp_path, code)
    assert [output.split("\n")[0] for _, output, _ in found] == [
        "5 as asked as asked as asked 2 2"
    ] * 3, found
