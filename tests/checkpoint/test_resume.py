"""Stopped, killed or damaged runs resume and end bit for bit like an uninterrupted run."""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from dad_fast.checkpoint.folder import (
    CheckpointFolder,
    generator_tensors,
    restore_generators,
    snapshot,
)
from dad_fast.checkpoint.writer import Writer
from dad_fast.cli.main import main
from dad_fast.config import to_toml
from dad_fast.engine.build import Builder
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import DataError, NotFinite, Preempted, UsageError
from dad_fast.methods.settings import resolve
from tests import warm
from tests.processes import HANG, ROOT, wait_until

BUILDER = Builder()
COMMON = [
    "data.batch_size=50",
    "data.workers=0",
    "log_every=7",
    "eval.every_epochs=0",
    "eval.suites=[]",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.scale=[0.6,1.0]",
    "ema.model_ema=true",
    "optim.clip_grad=1.0",
    "schedule.epochs=1",
    "student.name=resnet18",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "student.drop_path=0.2",
    "variants={}",
    "device=cpu",
]


def config(method="dad", *more):
    return resolve("demo", None, [*COMMON, f"method={method}", *more], {})


def trainer(folder, cfg, resume=""):
    return Trainer(cfg, BUILDER.build(cfg), folder, "test", resume)


def run(folder, cfg, resume=""):
    made = trainer(folder, cfg, resume)
    made.start()
    Lockstep([made]).train()
    return made


def digest(folder, step):
    path = folder / "checkpoints" / f"step-{step}"
    return {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "train.safetensors")
    }


@pytest.mark.parametrize("method", ["dad", "dat+dad", "ce"])
def test_resume_is_bit_exact(tmp_path, method):
    more = ["engine.grad_accum_steps=2"] if method == "ce" else []
    cfg = config(method, "data.batch_size=20", *more)
    run(tmp_path / "straight", replace(cfg, max_steps=8))
    run(tmp_path / "parts", replace(cfg, max_steps=3))
    torch.manual_seed(12345)  # whatever happened to the generators in between
    run(tmp_path / "parts", replace(cfg, max_steps=8), "auto")
    assert digest(tmp_path / "straight", 8) == digest(tmp_path / "parts", 8)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "parts")
    ]
    last = [[r for r in one if r["kind"] == "train"][-1] for one in rows]
    assert next(r["loss"] for r in last) == pytest.approx(last[1]["loss"], rel=1e-6)


COMMAND = [sys.executable, "-m", "dad_fast", "train", "--preset", "demo"]


def command(folder, *more):
    sets = [part for item in [*COMMON, "method=dad", *more] for part in ("--set", item)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return warm.start([*COMMAND, *sets, "--resume", "auto", "-o", str(folder)], env=env)


KILLED = ("checkpoint.every_steps=3", "max_steps=24", "data.batch_size=20")


@pytest.fixture(scope="module")
def not_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    process = command(folder, *KILLED)
    assert process.wait(HANG) == 0, process.communicate()[1]
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resume_after_a_kill_is_bit_exact(tmp_path, number, not_killed, capsys):
    process = command(tmp_path / "killed", *KILLED)
    wait_until((tmp_path / "killed/checkpoints/step-3").exists, process)
    resumed = ["train", "--resume", str(tmp_path / "killed")]
    assert main(resumed) == 2
    assert f"process {process.pid} on" in capsys.readouterr().err
    process.send_signal(number)
    _, said = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 75 and "--resume auto" in said.splitlines()[-1]
    else:
        assert process.returncode == -9
    assert (tmp_path / "killed/.lock").exists() == (number == signal.SIGKILL)
    process = warm.start([*COMMAND[:4], *resumed[1:]], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.wait(HANG) == 0, process.communicate()[1]
    assert not (tmp_path / "killed/.lock").exists()
    assert digest(tmp_path / "killed", 24) == digest(not_killed, 24)
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (
        not_killed / "model.safetensors"
    ).read_bytes()


def test_damaged_latest_falls_back_with_a_warning(tmp_path, capsys):
    cfg = config("ce", "checkpoint.every_steps=3")
    run(tmp_path, replace(cfg, max_steps=6))
    damaged = tmp_path / "checkpoints/step-6/train.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    made = trainer(tmp_path, cfg, "auto")
    made.start()
    assert (
        made.next_step == 3
        and "step-6 is damaged" in capsys.readouterr().err
        and "is damaged" in (tmp_path / "train.log").read_text()
    )
    (tmp_path / "checkpoints/step-3/state.json").write_text("{")
    with pytest.raises(DataError, match="no sound checkpoint"):
        trainer(tmp_path, cfg, "auto")


def test_changed_settings_are_refused_by_name(tmp_path):
    run(tmp_path, config("ce", "max_steps=2"))
    with pytest.raises(UsageError, match=r"optim\.lr"):
        trainer(tmp_path, config("ce", "optim.lr=0.5"), "auto")
    assert trainer(tmp_path, config("ce", "log_every=1"), "auto").next_step == 2
    changed = config("ce", "optim.lr=0.5")
    assert (
        Trainer(
            changed, BUILDER.build(changed), tmp_path, "test", "auto", allow_config_change=True
        ).next_step
        == 2
    )


def test_micro_batch_size_may_change_without_batch_norm(tmp_path):
    run(tmp_path / "bn", config("ce", "max_steps=2"))
    with pytest.raises(
        UsageError,
        match="batch norm saw 50 images at a time in each of 1 processes, now 10 .*--grad-accum-steps",
    ):
        trainer(
            tmp_path / "bn",
            config("ce", "data.global_batch_size=50", "engine.grad_accum_steps=5"),
            "auto",
        )
    with pytest.raises(UsageError, match=r"data\.global_batch_size: 50 → 250"):
        trainer(tmp_path / "bn", config("ce", "engine.grad_accum_steps=5"), "auto")
    vit = (
        "student.name=vit_tiny_patch16_224",
        "student.model_kwargs={patch_size=7,embed_dim=24,depth=1,num_heads=2}",
    )
    run(tmp_path / "ln", config("ce", "max_steps=2", *vit))
    made = trainer(
        tmp_path / "ln",
        config("ce", "data.global_batch_size=50", "engine.grad_accum_steps=5", "log_every=1", *vit),
        "auto",
    )
    assert made.next_step == 2 and made.images_per_step == 50 and made.cfg.data.batch_size == 10


def test_non_finite_loss_stops_the_run_and_saves_the_state(tmp_path):
    made = trainer(
        tmp_path,
        config(
            "ce", "optim.lr=1e30", "optim.clip_grad=0", "schedule.warmup_epochs=0", "max_steps=20"
        ),
    )
    made.start()
    with pytest.raises(NotFinite, match="--lr"):
        Lockstep([made]).train()
    kept = made.checkpoints.load("auto", print)
    assert all(
        torch.isfinite(v).all()
        for k, v in kept.tensors.items()
        if k.startswith("student.") and v.is_floating_point()
    )


def test_old_checkpoints_are_deleted_and_the_best_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, best in ((1, False), (2, True), (3, False), (4, False), (5, False)):
        folder.save(step, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), best)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-2", "step-4", "step-5"]
    assert (
        os.readlink(tmp_path / "latest") == "step-5" and os.readlink(tmp_path / "best") == "step-2"
    )


def test_kill_before_the_best_link_is_repaired(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), True)
    for name in ("latest", "best"):
        (tmp_path / name).unlink()
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.load("auto", print)
    assert not (tmp_path / "best").is_symlink()  # a run that is refused changes nothing
    folder.settle()
    folder.save(2, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), False)
    assert os.readlink(tmp_path / "best") == "step-1" and (tmp_path / "step-1").is_dir()


@pytest.mark.parametrize("operation", ["_link", "prune", "rmtree"])
def test_kill_during_cleanup_is_repaired(tmp_path, monkeypatch, operation):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3):
        if step == 3:  # stands for a kill at this moment
            at = (shutil, operation) if operation == "rmtree" else (folder, operation)
            monkeypatch.setattr(
                *at,
                lambda path, *rest, **more: (
                    None if str(path).endswith(".tmp") else sys.exit("killed")
                ),
            )
        with pytest.raises(SystemExit) if step == 3 else nullcontext():
            folder.save(
                step, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), False
            )
    monkeypatch.undo()
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load("auto", print).state["step"] == 3
    folder.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-3"]
    assert os.readlink(tmp_path / "latest") == "step-3"


def test_failed_write_keeps_the_previous_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(1, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), False)

    def full_disk(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="disk is full"):
        folder.save(2, {"x": torch.ones(1)}, {}, full_disk, False)
    assert folder.load("auto", print).state["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]


def test_writer_runs_in_the_background_and_raises_its_errors():
    writer, go, done = Writer(), threading.Event(), []
    writer.submit(lambda: (go.wait(HANG), done.append(1)))
    writer.check()  # does not wait
    assert not done
    go.set()
    writer.submit(lambda: done.append(2))  # one at a time
    writer.wait()
    assert done == [1, 2]

    def fails():
        raise OSError(28, "No space left on device")

    writer.submit(fails)
    with pytest.raises(OSError):
        wait_until(writer.check)  # which returns nothing
    writer.wait()  # said once


def test_snapshot_copies_tensors():
    tied = torch.ones(2, 3)
    first, second = snapshot({"a": tied, "b": tied, "t": tied.t()}, {"c": tied})
    tied.zero_()
    assert all(tensor.sum() == 6 for group in (first, second) for tensor in group.values())
    assert first["a"].data_ptr() != first["b"].data_ptr() and first["t"].shape == (3, 2)
    assert second["c"].data_ptr() in (first["a"].data_ptr(), first["b"].data_ptr())


WRITE_FOREVER = """
import sys, torch
from pathlib import Path
from dad_fast.checkpoint.folder import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]), keep=1)
for step in [1, *[2] * 10000]:
    folder.save(step, {"x": torch.full((500_000,), float(step))}, {}, lambda path: path.write_bytes(b"model"), False)
"""


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.01, 0.02])
def test_kill_during_write_keeps_a_whole_checkpoint(tmp_path, moment):
    """At any moment, with one checkpoint kept, even while one is replaced by another of the
    same step.
    """
    process = warm.start([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)])
    wait_until((tmp_path / "step-2").exists, process)
    wait_until((tmp_path / ".step-2.tmp").exists, process)
    time.sleep(moment)
    process.kill()
    process.wait()
    folder, said = CheckpointFolder(tmp_path, keep=1), []
    found = folder.load("auto", said.append)
    assert found.state["step"] == 2 and found.tensors["x"].eq(2).all() and not said
    folder.save(3, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-3"]


def test_generators_are_restored():
    import random

    import numpy as np

    random.gauss(0, 1), np.random.randn()  # both keep half a pair for the next call
    saved = generator_tensors(torch.device("cpu"))
    first = random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(1)
    restore_generators(saved, torch.device("cpu"))
    assert first == (
        random.gauss(0, 1),
        random.random(),
        np.random.randn(),
        np.random.rand(),
        torch.rand(1),
    )


def test_preempted_exit_code_and_settings_round_trip():
    assert Preempted.exit_code == 75
    assert "mixup = 0.8" in to_toml(config())
