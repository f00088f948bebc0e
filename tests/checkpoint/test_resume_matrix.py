"""Resume from any step k is bit-exact for every method, loader and accumulation."""

import hashlib
import json
import os
import shutil
import signal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from hypothesis import given, settings
from hypothesis import strategies as st

from dad_fast.cli.main import main
from dad_fast.engine.build import Builder
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import Preempted
from dad_fast.methods.settings import resolve
from tests import tiny

STEPS = 8  # of three an epoch: the first two epochs and a part of the third
METHODS = ("ce", "kd", "aug-only", "dat", "dad", "dat+dad")
ACCUMULATED = ("data.batch_size=4", "engine.grad_accum_steps=2")
CASES = {method: (f"method={method}",) for method in METHODS}
CASES |= {
    f"{method}, accumulated": (f"method={method}", *ACCUMULATED) for method in ("ce", "dat+dad")
}
CASES |= {f"{method}, dali": (f"method={method}", "data.loader=dali") for method in ("ce", "dad")}
CASES |= {
    "kd, dali, accumulated": ("method=kd", "data.loader=dali", *ACCUMULATED),
    "kd, sgd, no ema": ("method=kd", "optim.opt=sgd", "ema.model_ema=false"),
    "ce, lamb": ("method=ce", "optim.opt=lamb"),  # counts its steps on the host
    "ce, float16": (
        "method=ce",
        "precision.amp=true",
        "precision.student=float16",
        "optim.lr=3.0",
    ),  # the scale of the loss moves
    "kd, channels last": (
        "method=kd",
        "precision.channels_last=true",
    ),  # whose moments are laid out as the weights are
    "kd, timm's flags": (
        "method=kd",
        "schedule.sched=poly",
        "optim.layer_decay=0.7",
        "optim.opt_betas=[0.9,0.95]",
        "student.grad_checkpointing=true",
    ),
    "dad, stored": ("method=dad", "store.dirs=[STORE]", "augment.mixup=0", "augment.cutmix=0"),
    "lp-clip": ("method=lp-clip", "augment.mixup=0", "augment.cutmix=0", "augment.scale=[0.6,1.0]"),
}
BUILDER = Builder()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tiny.write_parts(tmp_path_factory.mktemp("inputs"))
    given = [
        "--data-dir",
        root / "data",
        *tiny.STUDENT,
        "--teacher",
        root / "teacher.safetensors",
        "--discretizer",
        root / "vqgan.ckpt",
    ]
    store = [
        "precompute",
        *given,
        "-b",
        "8",
        "-j",
        "0",
        "--device",
        "cpu",
        "--images",
        "raw",
        "--views",
        "2",
        "-o",
        root / "store",
    ]
    assert main([str(part) for part in store]) == 0
    return root


def config(inputs, case, *more):
    sets = [
        f"data.data_dir={inputs / 'data'}",
        f"teacher.name={inputs / 'teacher.safetensors'}",
        f"discretizer.name={inputs / 'vqgan.ckpt'}",
        "student.name=resnet18",
        "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
        "student.drop_path=0.3",
        "student.drop=0.2",
        f"augment.img_size={tiny.SIDE}",
        "augment.mixup=0.8",
        "augment.cutmix=1.0",
        "augment.aa=rand-m9-mstd0.5-inc1",
        "data.batch_size=8",
        "data.workers=0",
        "device=cpu",
        "log_every=3",
        "ema.model_ema=true",
        "optim.clip_grad=1.0",
        "schedule.epochs=4",
        "schedule.warmup_epochs=1",
        "checkpoint.every_steps=1",
        "checkpoint.keep=100",
        f"max_steps={STEPS}",
    ]
    extra = [item.replace("STORE", f'"{inputs / "store"}"') for item in CASES[case]]
    return resolve(None, None, [*sets, *extra, *more], {})


def run(folder, cfg, resume=""):
    made = Trainer(cfg, BUILDER.build(cfg), folder, "test", resume)
    made.start()
    Lockstep([made]).train()
    summary = made.summary()
    made.log.close()
    return summary


def digest(folder, step):
    files = [
        folder / f"checkpoints/step-{step}" / name
        for name in ("model.safetensors", "train.safetensors")
    ]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def logged(folder):
    """Return metrics.jsonl without values that depend on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("time", "data_wait", "img_per_s")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """Uninterrupted run of a case, with a checkpoint of every step; made on first use."""
    made = {}

    def get(case):
        if case not in made:
            if "dali" in case:
                pytest.importorskip("nvidia.dali")
            made[case] = tmp_path_factory.mktemp("straight")
            run(made[case], config(inputs, case))
        return made[case]

    return get


def stopped_at(step, straight, folder):
    """Write the folder of a run that was killed just after its checkpoint of `step`."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(straight / f"checkpoints/step-{step}", folder / f"checkpoints/step-{step}")
    shutil.copy(straight / "metrics.jsonl", folder / "metrics.jsonl")
    return folder


def check(inputs, straight, case, step, folder):
    whole = straight(case)
    run(stopped_at(step, whole, folder), config(inputs, case), "auto")
    assert digest(folder, STEPS) == digest(whole, STEPS), (case, step)
    assert logged(folder) == logged(whole)


QUICK = (
    "dat+dad, accumulated",
    "kd, dali, accumulated",
    "dad, stored",
    "lp-clip",
)


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_resume_within_an_epoch_is_bit_exact(inputs, straight, tmp_path, case):
    check(inputs, straight, case, 4, tmp_path / "run")


@pytest.mark.slow
@settings(max_examples=40)
@given(case=st.sampled_from(sorted(CASES)), step=st.integers(1, STEPS - 1))
def test_resume_from_any_step_is_bit_exact(inputs, straight, tmp_path_factory, case, step):
    check(inputs, straight, case, step, tmp_path_factory.mktemp("any") / "run")


def test_unreadable_image_counts_from_its_step(inputs, tmp_path):
    """The step counts it, not the thread that reads a store ahead."""
    shutil.copytree(inputs / "data", tmp_path / "data")
    for name in ("ant/3.jpg", "bee/5.jpg"):
        (tmp_path / "data/train" / name).write_bytes(b"no image")
    cfg = config(
        inputs,
        "dad, stored",
        f"data.data_dir={tmp_path / 'data'}",
        "data.max_bad_share=0.5",
        "log_every=1",
        "max_steps=3",
    )
    expected: list[set[str]] = [set()]
    for batch in Trainer(cfg, BUILDER.build(cfg), tmp_path / "run", "test").loader.batches(0, 3):
        expected.append(expected[-1] | set(batch.replaced))
    run(tmp_path / "run", cfg)
    assert [row["bad_images"] for row in logged(tmp_path / "run") if row["kind"] == "train"] == [
        len(names) for names in expected[1:]
    ]


def test_checkpoint_does_not_depend_on_max_steps(inputs, straight, tmp_path):
    run(tmp_path, config(inputs, "dad", "max_steps=3"))
    assert digest(tmp_path, 3) == digest(straight("dad"), 3)


@pytest.mark.parametrize("step", [3, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_resume_after_a_stop_in_validation_is_bit_exact(inputs, straight, tmp_path, step):
    """The stop does not wait for the validation; the resumed run starts with it."""
    cfg = config(inputs, "ce")
    if step == STEPS:
        run(tmp_path, config(inputs, "ce", f"max_steps={STEPS - 1}", "checkpoint.every_steps=1"))
        (tmp_path / "metrics.jsonl").write_bytes(
            (straight("ce") / "metrics.jsonl").read_bytes()
        )  # without the end of a shorter run
    stopped = Trainer(cfg, BUILDER.build(cfg), tmp_path, "test", "auto")
    evaluate = stopped.evaluate

    def asked_to_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    stopped.evaluate = asked_to_stop
    stopped.start()
    with pytest.raises(Preempted, match="--resume auto"):
        Lockstep([stopped]).train()
    stopped.log.close()
    assert stopped.next_step == step and stopped.validation_due
    run(tmp_path, cfg, "auto")
    assert digest(tmp_path, STEPS) == digest(straight("ce"), STEPS)
    if step != STEPS:
        assert [row for row in logged(tmp_path) if row["kind"] == "val"] == [
            row for row in logged(straight("ce")) if row["kind"] == "val"
        ]


def test_resume_from_an_earlier_step_deletes_later_checkpoints(inputs, straight, tmp_path):
    """With --resume PATH of an earlier checkpoint; the later ones belong to an abandoned run."""
    whole = straight("ce")
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    cfg = config(inputs, "ce", "checkpoint.every_steps=3", "checkpoint.keep=1", "max_steps=6")
    run(tmp_path / "run", cfg, str(tmp_path / "run/checkpoints/step-4"))
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    best = os.readlink(tmp_path / "run/checkpoints/best")
    assert (
        left == sorted({"step-6", best})
        and os.readlink(tmp_path / "run/checkpoints/latest") == "step-6"
    )
    assert digest(tmp_path / "run", 6) == digest(whole, 6)
