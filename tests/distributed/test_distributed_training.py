"""Several processes equal one process with the same global batch, and each other bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from tests.processes import HANG, environment, run_script, wait_until

SCRIPT = Path(__file__).parents[1] / "train_together.py"
METHODS = ("ce", "kd", "dad", "dat")


def results(nproc, folder, trainings):
    """Return {name: (losses, hash)}, after checking that all processes end with the same bits."""
    found = run_script(nproc, folder, [str(SCRIPT), json.dumps(trainings)])
    assert all(code == 0 for code, _, _ in found), found
    assert all(out == found[0][1] for _, out, _ in found)
    return {
        name: (losses, digest) for name, losses, digest in map(json.loads, found[0][1].splitlines())
    }


def trainings(parts):
    """Every method without batch statistics in 64 bits, and with a VQGAN in 32 bits."""
    exact = [[f"{method} exact", method, "ln", 1, "float64"] for method in METHODS]
    accumulated = [
        ["dad accumulated", "dad", "ln", 2, "float64"],
        ["kd poisoned", "kd", "ln", 1, "float64", 1],
    ]
    rounded = [[f"{method} rounded", method, "ln", 1, "float32"] for method in ("dad", "dat+dad")]
    return [
        *exact,
        *accumulated,
        *rounded,
        *([f"{method} bn", method, "bn", parts, "float64"] for method in ("ce", "kd", "dad")),
    ]


@pytest.mark.parametrize("nproc", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_equal_a_single_process(tmp_path, nproc):
    alone = results(
        1, tmp_path, trainings(parts=nproc)
    )  # batch norm in so many micro-batches sees what the processes see
    together = results(nproc, tmp_path, trainings(parts=1))
    for name, (losses, _) in alone.items():
        tolerance = 1e-3 if "rounded" in name else 1e-10
        assert together[name][0] == pytest.approx(
            losses, rel=tolerance, nan_ok="poisoned" in name
        ), name
        assert len(set(losses)) == len(losses)  # it trains


def test_shared_gradients_equal_ddp(tmp_path):
    """Losses and gradients equal those of DDP, which benchmarks/test_scaling.py times."""
    found = run_script(2, tmp_path, [str(SCRIPT.parent / "with_ddp.py")])
    assert all(code == 0 for code, _, _ in found), found
    ours, theirs = (json.loads(line) for line in found[1][1].splitlines())
    assert ours.keys() == theirs.keys() == {"kd", "dad"}
    for method in ours:
        assert len(ours[method]) == len(theirs[method]) == 4
        for step, (one_tensor, ddp) in enumerate(zip(ours[method], theirs[method], strict=True)):
            assert ddp == pytest.approx(one_tensor, rel=1e-10), (method, step)


COMMON = [
    "data.workers=0",
    "log_every=4",
    "eval.every_epochs=0",
    "eval.suites=[]",
    "augment.mixup=0.8",
    "ema.model_ema=true",
    "schedule.epochs=1",
    "student.name=vit_tiny_patch16_224",
    "student.drop_path=0.2",
    "student.drop=0.1",
    "variants={}",
    "device=cpu",
    "student.model_kwargs={patch_size=7,embed_dim=24,depth=2,num_heads=2}",
    "data.global_batch_size=24",
    "method=kd",
    "checkpoint.every_steps=3",
]


def train(folder, *more):
    sets = [part for item in COMMON for part in ("--set", item)]
    command = [
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
        *map(str, more),
    ]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def process_of(launcher, rank):
    """The id of the process with that rank."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no such process")


def wait_for_step(folder, step, launcher):
    wait_until((folder / f"checkpoints/step-{step}").exists, launcher)


def saved_step(folder):
    return json.loads((folder / "checkpoints/latest/state.json").read_text())["step"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_killed_process_then_stop_then_resume_on_one_process(tmp_path):
    run = tmp_path / "run"
    launcher = train(run, "--nproc", 2)
    wait_for_step(run, 3, launcher)
    os.kill(process_of(launcher, 1), signal.SIGKILL)
    said = launcher.communicate(timeout=HANG)[1]
    assert launcher.returncode == 1
    assert (
        "process 1 of 2 (counted from 0) is gone" in said
        and "process 1 of 2 (counted from 0) was killed by SIGKILL" in said
    )

    launcher, before = train(run, "--nproc", 2), saved_step(run)
    wait_for_step(run, before + 3, launcher)
    os.kill(process_of(launcher, 1), signal.SIGTERM)  # one is asked, both stop at one step
    said = launcher.communicate(timeout=HANG)[1]
    assert launcher.returncode == 75, said
    step = saved_step(run)
    assert f"stopped at step {step}" in said and said.count("stopped at step") == 1

    command = [
        sys.executable,
        "-m",
        "dad_fast",
        "train",
        "--resume",
        "auto",
        "-o",
        str(run),
        "--max-steps",
        str(step + 3),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert f"steps    {step} to {step + 3} of 24 images" in done.stderr
    assert "batch 24 x 1 process = 24 images a step" in (run / "train.log").read_text()
    assert "batch 12 x 2 processes = 24 images a step" in (run / "train-rank1.log").read_text()
    steps = [
        row["step"]
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "train"
    ]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_resume_of_two_processes_is_bit_exact(tmp_path):
    launcher = train(tmp_path / "parts", "--nproc", 2, "--max-steps", 60)
    wait_for_step(tmp_path / "parts", 6, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=HANG)
    assert launcher.returncode == 75
    for folder in ("parts", "straight"):
        launcher = train(tmp_path / folder, "--nproc", 2, "--max-steps", 60)
        said = launcher.communicate(timeout=HANG)[1]
        assert launcher.returncode == 0, said
    for name in (
        "model.safetensors",
        "checkpoints/step-60/train.safetensors",
        "checkpoints/step-60/model.safetensors",
    ):
        assert (tmp_path / "parts" / name).read_bytes() == (
            tmp_path / "straight" / name
        ).read_bytes(), name


@pytest.mark.slow
def test_train_with_torchrun(tmp_path):
    sets = [part for item in COMMON for part in ("--set", item)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "dad_fast",
        "train",
        "--preset",
        "demo",
        *sets,
    ]
    given = [*command, "-o", str(tmp_path / "run"), "--max-steps", "4"]
    done = subprocess.run(given, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "batch 12 x 2 processes = 24 images a step" in (tmp_path / "run/train.log").read_text()


def test_indivisible_batch_sizes_are_refused(tmp_path, capsys):
    from dad_fast.cli.main import main

    given = [
        "train",
        "--preset",
        "demo",
        "--method",
        "ce",
        "-o",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--max-steps",
        "1",
    ]
    assert main([*given, "--global-batch-size", "30", "--batch-size", "20"]) == 2
    assert "--batch-size 20 x 1 processes x --grad-accum-steps 1 = 20" in capsys.readouterr().err
    assert main([*given, "--global-batch-size", "31", "--grad-accum-steps", "2"]) == 2
    assert "take a multiple of 2" in capsys.readouterr().err
    assert (
        main([*given, "--global-batch-size", "6", "--grad-accum-steps", "2", "--mixup", "0.8"]) == 2
    )
    assert "take a multiple of 4" in capsys.readouterr().err
    assert main([*given, "--sync-bn"]) == 3 and "--sync-bn" in capsys.readouterr().err
    assert main([*given, "--nproc", "0"]) == 2
    assert not (tmp_path / "run").exists()
