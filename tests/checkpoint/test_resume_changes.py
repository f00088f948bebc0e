"""Changes on resume: allowed or refused settings, files, classes, weights, versions."""

import json
import shutil
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from PIL import Image

from dad_fast.checkpoint.folder import STATE, CheckpointFolder, _digest
from dad_fast.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from dad_fast.cli.main import main
from dad_fast.config import Launch
from dad_fast.engine.build import Builder
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.settings import resolve
from dad_fast.sweep import train
from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny.write_images(root / "data")
    tiny.write_teacher(root / "teacher.safetensors")
    tiny.write_vqgan(root / "vqgan.ckpt")
    return root


def config(inputs, *more):
    sets = [
        f"data.data_dir={inputs / 'data'}",
        f"teacher.name={inputs / 'teacher.safetensors'}",
        f"discretizer.name={inputs / 'vqgan.ckpt'}",
        "student.name=resnet18",
        "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
        f"augment.img_size={tiny.SIDE}",
        "method=dad",
        "data.batch_size=8",
        "data.workers=0",
        "device=cpu",
        "schedule.epochs=2",
        "schedule.warmup_epochs=0",
        "max_steps=1",
    ]
    return resolve(None, None, [*sets, *more], {})


def trainer(folder, cfg, resume="auto", allow=False):
    return Trainer(cfg, Builder().build(cfg), folder, "test", resume, allow)


@contextmanager
def changed_state(folder):
    """Yield the state of the checkpoint in a run's folder, to be changed."""
    path = folder / "checkpoints/step-1/state.json"
    state = json.loads(path.read_text())
    hashes = state.pop("sha256")
    yield state
    hashes[STATE] = _digest(state)
    path.write_text(json.dumps({**state, "sha256": hashes}))


def run(made):
    made.start()
    Lockstep([made]).train()
    made.log.close()


@pytest.fixture(scope="module")
def begun(inputs, tmp_path_factory):
    """One step of dad."""
    folder = tmp_path_factory.mktemp("begun")
    run(trainer(folder, config(inputs)))
    return folder


@pytest.fixture
def elsewhere(inputs, tmp_path):
    return shutil.copytree(inputs, tmp_path / "elsewhere")


def refused(begun, cfg, match):
    with pytest.raises(UsageError, match=match) as caught:
        trainer(begun, cfg)
    assert "--allow-config-change" in str(caught.value) and "\n" not in str(caught.value)


def test_files_may_move(begun, elsewhere):
    made = trainer(begun, config(elsewhere))
    assert made.next_step == 1 and not made.notes


def test_other_files_are_refused(begun, elsewhere):
    tiny.write_teacher(elsewhere / "teacher.safetensors", seed=1)
    tiny.write_vqgan(elsewhere / "vqgan.ckpt", seed=1)
    shutil.copy(elsewhere / "data/train/ant/0.jpg", elsewhere / "data/train/ant/9.jpg")
    Image.new("RGB", (40, 40)).save(elsewhere / "data/val/bee/0.jpg")
    for what in (
        "weights of the teacher",
        "weights of the discretizer",
        r"images in \S*data train",
        r"images in \S*data val",
    ):
        refused(begun, config(elsewhere), what)


def test_reordered_classes_are_refused(begun, inputs, tmp_path):
    rows = {name: tmp_path / f"{name}.csv" for name in ("same", "swapped")}
    rows["same"].write_text("id,folder,name\n0,ant,ant\n1,bee,bee\n2,cat,cat\n")
    rows["swapped"].write_text("id,folder,name\n0,bee,bee\n1,ant,ant\n2,cat,cat\n")
    assert trainer(begun, config(inputs, f"data.class_map={rows['same']}")).next_step == 1
    refused(
        begun,
        config(inputs, f"data.class_map={rows['swapped']}"),
        r"the classes \(0: ant ant → bee bee\)",
    )


def test_new_ema_starts_from_the_student(begun, inputs):
    made = trainer(begun, config(inputs, "ema.model_ema=true"), allow=True)
    for average, weight in zip(
        made.update.ema.module.state_dict().values(),
        made.parts.student.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(average, weight)


def test_allowed_changes_of_the_optimizer_take_effect(begun, inputs):
    made = trainer(
        begun,
        config(inputs, "optim.weight_decay=0.5", "optim.opt_kwargs={betas=[0.5,0.6]}"),
        allow=True,
    )
    groups = made.update.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5} and all(
        tuple(group["betas"]) == (0.5, 0.6) for group in groups
    )
    assert all(entry["step"] == 1 for entry in made.update.optimizer.state.values())
    other = trainer(begun, config(inputs, "optim.opt=sgd"), allow=True)
    momentum = [entry["momentum_buffer"] for entry in other.update.optimizer.state.values()]
    assert (
        not any(buffer.any() for buffer in momentum)
        and "sgd starts with a fresh state: the run began with adamw" in other.notes
    )
    assert (
        trainer(
            begun, config(inputs, "precision.amp=true", "precision.student=float16"), allow=True
        ).update.scaler.get_scale()
        > 1
    )


def test_auto_resumes_what_it_means_here(begun, inputs, tmp_path):
    # The default, auto, is off on a CPU, and so is what earlier versions wrote.
    assert trainer(begun, config(inputs, "precision.amp=off")).next_step == 1
    earlier = shutil.copytree(begun, tmp_path / "earlier", symlinks=True)
    with changed_state(earlier) as state:
        del state["switches"]
        assert 'amp = "auto"' in state["config"]
        state["config"] = state["config"].replace('amp = "auto"', "amp = false")
    assert trainer(earlier, config(inputs)).next_step == 1

    with pytest.raises(UsageError, match=r"precision.amp: False → True"):
        trainer(begun, config(inputs, "precision.amp=on"))


def test_auto_with_another_meaning_is_logged(begun, inputs, tmp_path):
    moved = shutil.copytree(begun, tmp_path / "moved", symlinks=True)
    with changed_state(moved) as state:
        state["switches"]["precision.amp"] = True
    notes = trainer(moved, config(inputs)).notes
    assert "precision.amp was on where the run began and is off here" in notes


def test_another_student_is_a_one_line_error(begun, inputs):
    with pytest.raises(UsageError, match="another student") as caught:
        trainer(
            begun,
            config(inputs, "student.model_kwargs={layers=[1,1,1,1],channels=[16,8,8,8]}"),
            allow=True,
        )
    assert "\n" not in str(caught.value)


def test_changed_rounding_is_logged(begun, inputs):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        (note,) = trainer(begun, config(inputs)).notes
    finally:
        torch.set_num_threads(threads)
    assert f"number of threads {threads} → {threads + 1}" in note


def test_resume_from_another_run(begun, inputs, tmp_path):
    made = trainer(tmp_path / "new", config(inputs, "max_steps=2"), resume=str(begun))
    run(made)
    assert made.next_step == 2 and sorted(
        path.name for path in (tmp_path / "new/checkpoints").glob("step-*")
    ) == ["step-2"]


def test_single_run_and_sweep_do_not_share_a_folder(tmp_path, capsys):
    for name in ("one", "several/ce/seed-0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    given = [
        "train",
        "--preset",
        "demo",
        "--set",
        "variants={}",
        "--method",
        "ce",
        "--resume",
        "auto",
        "-o",
    ]
    assert (
        main([*given, str(tmp_path / "one"), "--seeds", "2"])
        == main([*given, str(tmp_path / "several")])
        == 2
    )
    said = capsys.readouterr().err
    assert (
        "holds one run, and these are 2" in said and "holds several runs, and this is one" in said
    )


def test_sweep_checks_all_runs_before_resuming(begun, inputs, tmp_path):
    shutil.copytree(begun, tmp_path / "dad/seed-1", symlinks=True)
    cfg = config(inputs, "optim.lr=0.5", "seeds=2")
    with pytest.raises(UsageError, match=r"seed-1/checkpoints/step-1: .*optim.lr: 0.001 → 0.5"):
        train.run(cfg, Launch(output=str(tmp_path), resume="auto"))
    assert [path.name for path in tmp_path.iterdir()] == ["dad"] and [
        path.name for path in (tmp_path / "dad").iterdir()
    ] == ["seed-1"]


def test_waiting_for_the_disk_is_logged_once(begun, inputs):
    made, said = trainer(begun, config(inputs)), []
    for seconds in (0.1, 3.2, 4.5):
        made.monitor.advice.on_write(seconds, said.append)
    assert len(said) == 1 and "waited 3.2 s" in said[0] and "--checkpoint-every-steps" in said[0]


def test_checkpoint_of_another_version_is_a_one_line_error(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    monkeypatch.setattr("dad_fast.checkpoint.folder.FORMAT", 1)
    folder.save(3, {"x": torch.ones(1)}, {}, lambda path: path.write_bytes(b"model"), best=False)
    monkeypatch.undo()
    with pytest.raises(
        DataError, match=r"step-3 was written by another version of dad-fast \(format 1, not 2\)"
    ):
        folder.load(str(tmp_path / "step-3"), print)


class Odd(torch.optim.SGD):
    """Optimizer with unusual state: lists of tensors, a type, a generator's state beside its
    parameters.
    """

    def state_dict(self):
        return {**super().state_dict(), "words": (3, (1, 2), None)}

    def load_state_dict(self, state):
        self.words = state.pop("words")
        super().load_state_dict(state)


def test_any_optimizer_state_round_trips():
    weight = torch.nn.Parameter(torch.ones(2))
    made = Odd([weight], lr=0.1)
    made.state[weight] = {"Q": [torch.eye(2), torch.ones(1)], "step": 4, "none": None}
    made.param_groups[0]["mu_dtype"] = torch.bfloat16
    tensors, numbers = flatten_optimizer(made)
    again = Odd([weight], lr=0.5)
    restore_optimizer(again, tensors, json.loads(json.dumps(numbers)))
    assert (
        again.words == (3, (1, 2), None)
        and again.param_groups[0]["mu_dtype"] is torch.bfloat16
        and again.param_groups[0]["lr"] == 0.1
    )
    entry = again.state[weight]
    assert torch.equal(entry["Q"][0], torch.eye(2)) and entry["step"] == 4 and entry["none"] is None
