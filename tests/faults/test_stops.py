"""SIGTERM, SIGUSR1 and Ctrl-C in every phase of every verb, in one process and in several: the documented exit code, one line, nobody
left behind; and the same command again ends as if nothing had been. A phase is met by making it slow (slowly/sitecustomize.py).
"""

from __future__ import annotations

import json
import os
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
WITHIN = 240.0  # seconds from the signal to the end of the last process: less than any timeout of the processes themselves
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
    "-b",
    "8",
    "-j",
    "0",
    "--epochs",
    "2",
    "--warmup-epochs",
    "0",
    "--device",
    "cpu",
    "--set",
    "log_every=2",
    "--resume",
    "auto",
]


class Phase(NamedTuple):
    verb: str
    slow: str  # module:function:seconds
    number: signal.Signals
    words: str  # of the last line
    nproc: int = 1


VERIFY, HEAD = "dad_fast.data.sources.index:_verify:0.5", "dad_fast.models.zeroshot:_compute:60"
JUDGE, STEP = (
    "dad_fast.evaluate.runner:image_scores:0.5",
    "dad_fast.engine.step:TrainStep.__call__:1",
)
LABELS, FEATURES = (
    "dad_fast.engine.pseudo_labels:pseudo_labels:0.5",
    "dad_fast.engine.probe_features:execute:0.2",
)
SAVING, BLOCK = (
    "dad_fast.checkpoint.folder:CheckpointFolder.save:1",
    "dad_fast.precompute.fill:adversarial:0.5",
)
AGAIN, SAVED, WHOLE = (
    "run the same command again with --resume auto",
    "saved in",
    "the results above are complete",
)
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
    "train, validation": Phase("train", JUDGE, INT, "stopped at step 3 of 6; saved"),
    "train, validation, two": Phase("train", JUDGE, TERM, "stopped at step 1 of 2; saved", 2),
    "train, report": Phase("train", "dad_fast.report.page:write_report:60", TERM, AGAIN),
    "lp-clip, labels": Phase("lp-clip", LABELS, TERM, AGAIN),
    "lp-clip, labels, two": Phase("lp-clip", LABELS, INT, AGAIN, 2),
    "lp-clip, features": Phase("lp-clip", FEATURES, INT, AGAIN),
    "lp-clip, features, two": Phase("lp-clip", FEATURES, TERM, AGAIN, 2),
    "precompute, index": Phase("precompute", VERIFY, TERM, "the same command goes on"),
    "precompute, block": Phase("precompute", BLOCK, INT, "run the same command to resume"),
    "precompute, block, two": Phase("precompute", BLOCK, TERM, "run the same command to resume", 2),
    "eval, index": Phase("eval", VERIFY, INT, WHOLE),
    "eval, index, two": Phase("eval", VERIFY, TERM, WHOLE, 2),
    "eval, judging": Phase("eval", JUDGE, TERM, WHOLE),
    "eval, judging, two": Phase("eval", JUDGE, INT, WHOLE, 2),
    "ablate, check": Phase("ablate", VERIFY, TERM, "0 of 2 runs done"),
    "ablate, run": Phase("ablate", STEP, INT, "0 of 2 runs done"),
    "ablate, judging": Phase("ablate", JUDGE, TERM, "0 of 2 runs done"),
}


def arguments(verb: str, parts: Path, out: Path) -> list[str]:
    data = ["--data-dir", str(parts / "data"), "--teacher", str(parts / "teacher.safetensors")]
    if verb == "train":
        return [
            "train",
            "--method",
            "kd",
            *data,
            *tiny.STUDENT,
            *RUN,
            "--val-every",
            "1",
            "-o",
            str(out),
        ]
    if verb == "lp-clip":
        return ["train", "--method", "lp-clip", "--lp-views", "1", *data, *RUN, "-o", str(out)]
    if verb == "eval":
        return [
            "eval",
            *data,
            "-b",
            "2",
            "-j",
            "0",
            "--device",
            "cpu",
            "--suite",
            "val",
            "--json",
            str(out),
        ]
    discretizer = ["--discretizer", "jpeg:60", "-o", str(out), "-j", "0"]
    if verb == "precompute":
        return [
            "precompute",
            *data,
            *discretizer,
            "--images",
            "raw",
            "-b",
            "2",
            "--shard-blocks",
            "1",
            "--device",
            "cpu",
        ]
    sweep = [
        "-b",
        "8",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--devices",
        "cpu",
        "--jobs",
        "1",
        "--seeds",
        "1",
        "--axes",
        "filter",
    ]
    return ["ablate", *data, *tiny.STUDENT, *discretizer, *sweep, "--resume", "auto"]


def start(command: list[str], folder: Path, slow: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DAD_FAST_CACHE": str(folder / "cache"),
    }
    if slow:
        slowly = {"DAD_FAST_SLOW": slow, "DAD_FAST_SLOW_MARK": str(folder / "met")}
        environment |= slowly | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SLOWLY)])}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop(
    command: list[str], folder: Path, slow: str, number: int, ranks: int = 1
) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal in the slow phase, once so many processes are there."""
    process = start(command, folder, slow)
    try:
        until = time.monotonic() + HANG
        while len(list(folder.glob("met-*"))) < ranks:
            assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=WITHIN)[1]
        assert not subprocess.run(
            ["pgrep", "--session", str(process.pid)], capture_output=True
        ).stdout, "somebody is left behind"
        return process.returncode, said
    finally:
        process.kill()


def contents(verb: str, out: Path) -> Any:
    """What must be the same as without a stop."""
    if verb == "eval":
        return json.loads(out.read_text())["teacher"]["suites"]
    if verb == "precompute":
        return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("model.safetensors")
        if "checkpoints" not in str(path)
    }


@pytest.fixture(scope="module")
def straight(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a verb in so many processes: what it leaves behind when nobody stops it."""
    made: dict[tuple[str, int], Any] = {}

    def get(verb: str, nproc: int) -> Any:
        if (verb, nproc) not in made:
            folder = tmp_path_factory.mktemp("straight")
            made[verb, nproc] = run_to_the_end(verb, parts, folder, nproc)
        return made[verb, nproc]

    return get


def run_to_the_end(verb: str, parts: Path, folder: Path, nproc: int) -> Any:
    process = start(command(verb, parts, folder, nproc), folder)
    said = process.communicate(timeout=HANG)[1]
    assert process.returncode == 0, said
    return contents(verb, folder / "out")


def command(verb: str, parts: Path, folder: Path, nproc: int) -> list[str]:
    several = ["--nproc", str(nproc)] if nproc > 1 else []
    return [sys.executable, "-m", "dad_fast", *arguments(verb, parts, folder / "out"), *several]


def stopped(name: str, parts: Path, folder: Path) -> Phase:
    phase = PHASES[name]
    ranks = 1 if phase.slow in (VERIFY, SAVING) else phase.nproc  # one process indexes, one writes
    code, said = stop(
        command(phase.verb, parts, folder, phase.nproc), folder, phase.slow, phase.number, ranks
    )
    assert code == (130 if phase.number == INT else 75), said
    errors = [line for line in said.splitlines() if "dad-fast: error" in line]
    assert len(errors) == 1 and phase.words in errors[0] and "Traceback" not in said, said
    return phase


@pytest.mark.parametrize("name", ["train, index, two", "eval, judging, two"])
def test_a_stop(parts: Path, tmp_path: Path, name: str) -> None:
    stopped(name, parts, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PHASES)
def test_after_a_stop_in_any_phase_the_same_command_ends_with_the_same_bytes(
    parts: Path, tmp_path: Path, straight: Any, name: str
) -> None:
    phase = stopped(name, parts, tmp_path)
    assert run_to_the_end(phase.verb, parts, tmp_path, phase.nproc) == straight(
        phase.verb, phase.nproc
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb, slow, number",
    [("eval", JUDGE, TERM), ("train", JUDGE, USR1), ("train", VERIFY, INT)],
    ids=["eval", "validation", "index"],
)
def test_under_torchrun(
    parts: Path, tmp_path: Path, straight: Any, verb: str, slow: str, number: int
) -> None:
    """It passes SIGTERM and Ctrl-C on and ends with 1; SIGUSR1 kills it, and its processes hear of that."""
    given = [*TORCHRUN, *arguments(verb, parts, tmp_path / "out")]
    code, said = stop(given, tmp_path, slow, number, ranks=1 if slow == VERIFY else 2)
    assert (
        code == (-USR1 if number == USR1 else 1)
        and (WHOLE if verb == "eval" else "--resume auto") in said
    ), said
    assert run_to_the_end(verb, parts, tmp_path, 2) == straight(verb, 2)


def test_processes_with_unequal_shares_stop_together(parts: Path, tmp_path: Path) -> None:
    """Of five images three processes have two, two and one; and of two images one has none. Whoever is asked, all of them stop."""
    code = f"""
    import signal, numpy as np
    from dad_fast.data.sources.registry import open_source
    from dad_fast.distributed.signals import stop_requests
    from dad_fast.errors import Preempted
    from dad_fast.evaluate.runner import evaluate
    from dad_fast.evaluate.suites.base import EvalSet, Subset
    source = open_source({str(parts / "data")!r}, "val")
    view = {{"img_size": 8, "crop_pct": 1.0, "interpolation": "bilinear", "batch_size": 1, "workers": 0, "device": torch.device("cpu")}}

    def judge(who, num_images, corruption=None):
        def model(pixels):
            if rank == who:
                os.kill(os.getpid(), signal.SIGUSR1)
            return torch.zeros(len(pixels), 3)
        rows = np.arange(num_images)
        judged = EvalSet("some", (Subset(source, rows, source.labels[rows]), Subset(source, rows, source.labels[rows])), source.classes)
        with stop_requests():
            try:
                return evaluate(model, judged, corruption=corruption, stopped="as asked", **view).num_images
            except Preempted as stop:
                return str(stop)
    print(judge(None, 5), judge(0, 5), judge(2, 5, ("contrast", None)), judge(1, 2), judge(2, 2), judge(None, 2))
    d.close()
    """
    found = run_together(3, tmp_path, code)
    assert [said.split("\n")[0] for _, said, _ in found] == [
        "5 as asked as asked as asked 2 2"
    ] * 3, found
