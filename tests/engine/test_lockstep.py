"""Runs that share their batches end bit for bit as alone, and resume together."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from dad_fast.checkpoint import state
from dad_fast.checkpoint.folder import CheckpointFolder
from dad_fast.cli.main import main
from dad_fast.config.options import Launch
from dad_fast.engine.build import Builder
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import DataError, NotFinite, Preempted
from dad_fast.methods.settings import resolve
from dad_fast.sweep.run import train_runs
from dad_fast.sweep.runs import Run
from tests import tiny
from tests.processes import run_script

STEPS = 5  # of three an epoch
BUILDER = Builder()
RESNET = (
    "student.name=resnet18",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "student.drop=0.2",
)
VIT = (
    "student.name=vit_tiny_patch16_224",
    "student.model_kwargs={patch_size=8,embed_dim=24,depth=2,num_heads=2}",
    "student.drop_path=0.3",
    "optim.lr=0.003",
    "loss.temperature=2.0",
    "ema.model_ema=false",
)
STORED = ("store.dirs=[STORE]", "augment.mixup=0", "augment.cutmix=0")
# What both runs have, and what the second one has besides its student.
CASES = {
    "ce": (("method=ce",), ()),
    "kd": (("method=kd",), ("loss.kd=0.3",)),
    "dat": (("method=dat",), ()),
    "dad": (("method=dad",), ("loss.dad=0.5", "loss.filter=false")),
    "dat+dad, accumulated": (
        ("method=dat+dad", "data.batch_size=4", "engine.grad_accum_steps=2"),
        ("optim.opt=sgd",),
    ),
    "dad, stored": (("method=dad", *STORED), ("loss.dad=0.5",)),
    "dad, joint": (
        # The generator mixes stored outputs at this temperature.
        ("method=dad", *STORED, "loss.form=joint", "loss.temperature=3.0"),
        ("optim.lr=0.01", "loss.temperature=3.0"),
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tiny.write_parts(tmp_path_factory.mktemp("inputs"))
    given = [
        *("--data-dir", root / "data", *tiny.STUDENT, "--teacher", root / "teacher.safetensors"),
        *("--discretizer", root / "vqgan.ckpt"),
    ]
    store = ["precompute", *given, "-b", "8", "-j", "0", "--device", "cpu", "--images", "raw"]
    assert main([str(part) for part in [*store, "--views", "2", "-o", root / "store"]]) == 0
    return root


def config(inputs, *more):
    sets = [
        f"data.data_dir={inputs / 'data'}",
        f"teacher.name={inputs / 'teacher.safetensors'}",
        f"discretizer.name={inputs / 'vqgan.ckpt'}",
        f"augment.img_size={tiny.SIDE}",
        "augment.mixup=0.8",
        "augment.cutmix=1.0",
        "data.batch_size=8",
        "data.workers=0",
        "device=cpu",
        "log_every=2",
        "ema.model_ema=true",
        "optim.clip_grad=1.0",
        "schedule.epochs=2",
        "schedule.warmup_epochs=0",
        "checkpoint.every_steps=2",
        f"max_steps={STEPS}",
    ]
    extra = [item.replace("STORE", f'"{inputs / "store"}"') for item in more]
    return resolve(None, None, [*sets, *extra], {})


def pair(inputs, case, *more):
    both, second = CASES[case]
    return [
        config(inputs, *RESNET, *both, *more),
        config(inputs, *VIT, *both, *second, *more),
    ]


def run(cfgs, folder, names="ab", resume=""):
    """Train runs together. Returns their loop."""
    trainers = [
        Trainer(cfg, BUILDER.build(cfg), folder / name, name, resume)
        for cfg, name in zip(cfgs, names, strict=True)
    ]
    loop = Lockstep(trainers)
    loop.start()
    try:
        loop.train()
    finally:
        for log in loop.logs:
            log.close()
    return loop


def alone(cfgs, folder, names="ab"):
    for cfg, name in zip(cfgs, names, strict=True):
        run([cfg], folder, name)
    return folder


def tensors(folder):
    """Return a hash of the tensors of every checkpoint that a run has."""
    files = sorted((folder / "checkpoints").glob("step-*/*.safetensors"))
    assert files
    return {
        f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def links(folder):
    return [os.readlink(folder / "checkpoints" / name) for name in ("latest", "best")]


def logged(folder):
    """Return metrics.jsonl without values that depend on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("time", "data_wait", "img_per_s")}
        for row in rows
    ]


def assert_same(found, expected, names="ab"):
    for name in names:
        assert tensors(found / name) == tensors(expected / name), name
        assert links(found / name) == links(expected / name), name
        assert logged(found / name) == logged(expected / name), name


@pytest.fixture(scope="module")
def apart(inputs, tmp_path_factory):
    """Runs of a case, each trained alone; made on first use."""
    made = {}

    def get(case):
        if case not in made:
            cfgs = pair(inputs, case, "checkpoint.keep=100")
            made[case] = alone(cfgs, tmp_path_factory.mktemp("alone"))
        return made[case]

    return get


QUICK = ("ce", "kd", "dad, stored")


@pytest.mark.parametrize(
    "case", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in CASES]
)
def test_runs_together_equal_runs_alone(inputs, apart, tmp_path, case):
    run(pair(inputs, case, "checkpoint.keep=100"), tmp_path)
    assert_same(tmp_path, apart(case))


def after_a_kill(apart, folder, **steps):
    """Write the folders of runs that were killed after their checkpoints of these steps."""
    for name, made in steps.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        shutil.copy(apart / name / "metrics.jsonl", folder / name)
        for step in made:
            path = f"{name}/checkpoints/step-{step}"
            shutil.copytree(apart / path, folder / path)
    return folder


def resume(cfgs, folder, names="ab"):
    runs = [Run(name, cfg.seed, cfg, folder / name) for cfg, name in zip(cfgs, names, strict=True)]
    return train_runs(runs, list(names), Launch(output="", resume="auto"), BUILDER, {})


def assert_same_end(found, expected, names="ab"):
    """Compare the last checkpoint, the weights to evaluate and the log."""
    for name in names:
        last, whole = (tensors(folder / name) for folder in (found, expected))
        assert last.items() <= whole.items() and f"step-{STEPS}/train.safetensors" in last, name
        model = (found / name / "model.safetensors").read_bytes()
        ends = expected / name / f"checkpoints/step-{STEPS}/model.safetensors"
        assert model == ends.read_bytes(), name
        rows = [row for row in logged(found / name) if not row["kind"].startswith("test/")]
        assert rows == logged(expected / name), name


@pytest.mark.parametrize(
    "a, b",
    [
        ((2, 4), (2, 3)),
        pytest.param((2, 4), (2, 4), marks=pytest.mark.slow),
        pytest.param((4,), (2,), marks=pytest.mark.slow),
        pytest.param((2,), (), marks=pytest.mark.slow),
    ],
    ids=["in a save", "between steps", "no common step", "in the first save"],
)
def test_killed_runs_resume_together(inputs, apart, tmp_path, capsys, a, b):
    """From the newest step of both; the runs began alone."""
    whole = apart("ce")
    after_a_kill(whole, tmp_path, a=a, b=b)
    records = resume(pair(inputs, "ce", "checkpoint.keep=100"), tmp_path)
    assert_same_end(tmp_path, whole)
    together = bool(set(a) & set(b))
    assert [record.get("shared_by") for record in records] == ([2, 2] if together else [None] * 2)
    assert ("trained apart" in capsys.readouterr().err) == (not together)


@pytest.mark.parametrize(
    "error",
    [SystemExit("killed"), pytest.param(OSError(28, "full"), marks=pytest.mark.slow)],
    ids=["kill", "full disk"],
)
def test_a_save_that_ends_between_two_runs_leaves_a_common_step(
    inputs, apart, tmp_path, monkeypatch, error
):
    cfgs = pair(inputs, "ce", "checkpoint.keep=1")
    write_model = state.write_safetensors

    def failing(path, *content):
        if path.parent.parts[-3] == "b" and path.parent.name == ".step-4.tmp":
            raise error
        write_model(path, *content)

    monkeypatch.setattr(state, "write_safetensors", failing)
    with pytest.raises((SystemExit, DataError)):
        run(cfgs, tmp_path)
    monkeypatch.undo()
    found = [CheckpointFolder(tmp_path / name / "checkpoints", 1).steps() for name in "ab"]
    assert 4 in found[0] and 4 not in found[1] and set(found[0]) & set(found[1])
    resume(cfgs, tmp_path)
    assert_same_end(tmp_path, apart("ce"))


def test_pruned_checkpoints_are_those_of_runs_alone(inputs, tmp_path):
    cfgs = pair(inputs, "ce", "checkpoint.keep=1", "checkpoint.every_steps=1")
    alone(cfgs, tmp_path / "alone")
    run(cfgs, tmp_path / "together")
    assert_same(tmp_path / "together", tmp_path / "alone")


def test_a_stopped_run_resumes_alone(inputs, apart, tmp_path, monkeypatch):
    def log(loop, batch):
        if loop.next_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        plain_log(loop, batch)

    plain_log = Lockstep._log
    monkeypatch.setattr(Lockstep, "_log", log)
    cfgs = pair(inputs, "ce", "checkpoint.keep=100")
    with pytest.raises(Preempted, match=r"step 2 of 5; saved in .*a and 1 more folder, resume"):
        run(cfgs, tmp_path)
    monkeypatch.undo()
    for cfg, name in zip(cfgs, "ab", strict=True):
        run([cfg], tmp_path, name, "auto")
    assert_same(tmp_path, apart("ce"))


@pytest.mark.parametrize("step", [3, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_a_stop_in_the_second_validation_resumes_with_it(inputs, apart, tmp_path, step):
    cfgs = pair(inputs, "ce", "checkpoint.keep=100")
    trainers = [
        Trainer(cfg, BUILDER.build(cfg), tmp_path / name, name)
        for cfg, name in zip(cfgs, "ab", strict=True)
    ]
    evaluate = trainers[1].evaluate

    def asked_to_stop(*arguments):
        if trainers[1].next_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    trainers[1].evaluate = asked_to_stop
    loop = Lockstep(trainers)
    loop.start()
    with pytest.raises(Preempted, match="--resume auto"):
        loop.train()
    assert [one.validation_due for one in trainers] == [False, True]
    for log in loop.logs:
        log.close()
    resume(cfgs, tmp_path)
    assert_same_end(tmp_path, apart("ce"))


def test_the_others_train_on_without_a_run_that_is_not_finite(inputs, apart, tmp_path):
    one, other = pair(inputs, "ce", "checkpoint.keep=100")
    broken = replace(other, optim=replace(other.optim, lr=1e30, clip_grad=0.0))
    loop = run([one, broken], tmp_path)
    (problem,) = loop.failed.values()
    assert str(problem).startswith("b: the loss or a gradient was not a number")
    assert_same(tmp_path, apart("ce"), "a")
    kept = trainer_of(broken, tmp_path / "b", "auto").next_step
    assert 0 < kept < STEPS
    with pytest.raises(NotFinite, match="b: "):
        resume([one, broken], tmp_path)
    assert (tmp_path / "a/report.html").exists() and not (tmp_path / "b/results.json").exists()


def trainer_of(cfg, folder, resume=""):
    return Trainer(cfg, BUILDER.build(cfg), folder, folder.name, resume)


def test_smaller_students_see_resized_images(inputs, apart, tmp_path):
    """The run with the largest images is as alone, in any order."""
    large, _ = pair(inputs, "kd", "checkpoint.keep=100")
    small = replace(large, augment=replace(large.augment, img_size=24))
    loop = run([small, large], tmp_path, "ba")
    assert_same(tmp_path, apart("kd"), "a")
    assert loop.lead.label == "a"
    log = (tmp_path / "b/train.log").read_text()
    assert "made at 32 px for all and resized to 24 px" in log
    assert "resized" not in (tmp_path / "a/train.log").read_text()


def test_finished_runs_are_not_trained_again(inputs, apart, tmp_path, capsys):
    cfgs = pair(inputs, "ce", "checkpoint.keep=100")
    shutil.copytree(apart("ce"), tmp_path / "runs", symlinks=True)
    first = resume(cfgs, tmp_path / "runs")
    (tmp_path / "runs/b/results.json").unlink()
    second = resume(cfgs, tmp_path / "runs")
    assert "a: finished already" in capsys.readouterr().err
    first, second = (json.loads(json.dumps([one["suites"] for one in r])) for r in (first, second))
    assert first == second


def test_a_run_evaluated_alone_says_with_whom_it_trained(inputs, apart, tmp_path):
    cfgs = pair(inputs, "ce", "checkpoint.keep=100")
    resume(cfgs, after_a_kill(apart("ce"), tmp_path / "together", a=(2, 4), b=(2, 4)))
    shutil.copytree(apart("ce"), tmp_path / "apart", symlinks=True)
    resume(cfgs, tmp_path / "apart")
    found = {}
    for folder in ("together", "apart"):
        (tmp_path / folder / "b/results.json").unlink()
        (record,) = resume(cfgs[1:], tmp_path / folder, "b")
        facts = json.loads((tmp_path / folder / "b/run.json").read_text())
        found[folder] = record.get("shared_by"), facts.get("shares_batches_with")
    assert found == {"together": (2, ["a"]), "apart": (None, None)}


@pytest.mark.slow
def test_runs_together_equal_runs_alone_in_two_processes(inputs, tmp_path):
    script = Path(__file__).parents[1] / "runs_together.py"
    results = run_script(2, tmp_path, [str(script), str(inputs), str(tmp_path)])
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    assert_same(tmp_path / "together", tmp_path / "alone")
