"""`import dad_fast as df`: what a notebook or a script does with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend"):
    pytest.importorskip(package)
import torch
from torch import nn

import dad_fast as df
from dad_fast.api.settings import by_path
from dad_fast.cli.main import main
from dad_fast.config import from_toml
from dad_fast.errors import DataError, UsageError
from tests import tiny
from tests.processes import HANG

SHORT = {"img_size": 32, "batch_size": 8, "workers": 0, "epochs": 1, "warmup_epochs": 0}


class Net(nn.Module):
    """Classifier of three classes. Its submodules have no names of timm."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=4)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Linear(width, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(pixels)).relu().mean((2, 3)))


class Frozen(Net):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("api") / "data")


@pytest.fixture(scope="module")
def trained(data: Path) -> tuple[df.Run, Net]:
    """A run of own modules, trained by DAD in a thread, as a server or a notebook may."""
    torch.manual_seed(0)
    student, found = Net(), []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def work() -> None:
        found.append(
            df.train(
                data_dir=data,
                method="dad",
                student=student,
                teacher=Frozen(),
                discretizer="jpeg:60",
                output=data.parent / "own",
                max_steps=2,
                **SHORT,
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return found[0], student


def test_own_modules_train_and_the_run_is_at_hand(trained):
    run, student = trained
    assert run.results["student"] == "module:Net"
    assert run.results["teacher"]["name"] == "module:Frozen"
    assert 0 <= run.results["suites"]["val"]["top1"] <= 100
    assert run.report().name == "report.html"

    model = run.model
    assert not model.training
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    # The run trained a copy.
    assert not torch.equal(model.model.last.weight, student.last.weight)
    torch.manual_seed(0)
    assert torch.equal(student.last.weight, Net().last.weight)


def test_evaluate_takes_runs_and_modules(trained, data, capsys):
    run, student = trained
    expected = run.results["suites"]["val"]["top1"]
    assert df.evaluate(run, suites="val")["val"]["top1"] == expected
    by_module = df.evaluate(run.model, suites=["val"], data_dir=data, workers=0)
    assert by_module["val"]["top1"] == expected
    untrained = df.evaluate(student, data_dir=data, img_size=32, workers=0)
    assert untrained["val"]["num_images"] == 24
    assert "val" in capsys.readouterr().out
    with pytest.raises(UsageError, match="its output for one image is"):
        df.evaluate(Net(classes=4), data_dir=data, img_size=32)


def test_commands_name_the_missing_class(trained, data, capsys):
    run, _ = trained
    own = str(run.folder)
    for arguments, code in (
        (["eval", own], 4),
        (["predict", own, str(next(data.glob("val/*/*.jpg")))], 4),
        (["export", own, "-o", str(data.parent / "out")], 4),
        (["train", "--resume", "auto", "-o", own], 2),
    ):
        assert main(arguments) == code, arguments
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("dad-fast:")]
        assert "a user's own nn.Module" in line and "df." in line, arguments
    with pytest.raises(DataError, match=r"df\.load_student\(PATH, module=MODULE\)"):
        df.load_student(run.folder)
    with pytest.raises(DataError, match="model.safetensors"):
        df.load_student(run.folder, module=Net(width=8))
    assert df.load_student(run.folder, module=Net()).num_classes == 3


def test_own_modules_resume_when_passed_again(data):
    output = data.parent / "resumed"
    settings = {"data_dir": data, "method": "kd", "output": output, "seed": 3, **SHORT}
    torch.manual_seed(1)
    student, teacher = Net(), Frozen()
    whole = df.train(
        **{**settings, "output": data.parent / "whole"},
        student=student,
        teacher=teacher,
        max_steps=3,
        set={"checkpoint.every_steps": 1},
    )
    # A run that stops after its first checkpoint.
    torch.manual_seed(1)
    df.train(
        **settings, student=Net(), teacher=Frozen(), max_steps=1, set={"checkpoint.every_steps": 1}
    )
    with pytest.raises(UsageError, match="exists"):
        df.train(**settings, student=student, teacher=teacher, max_steps=3)
    again = df.train(
        **settings,
        student=student,
        teacher=teacher,
        max_steps=3,
        resume=True,
        allow_config_change=True,
    )
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_several_seeds_are_runs_of_one_comparison(data, tmp_path):
    run = df.train(
        data_dir=data,
        method="ce",
        student=Net(),
        seeds=2,
        output=tmp_path / "two",
        max_steps=1,
        **SHORT,
    )
    assert [one.folder.name for one in run.runs] == ["seed-0", "seed-1"]
    assert len(run.results["runs"]) == 2
    with pytest.raises(UsageError, match="holds 2 runs.*find.'ce/seed-0'"):
        _ = run.model


def test_several_students_are_found_by_their_names(data, tmp_path):
    names = ["test_vit", "test_resnet"]
    run = df.train(
        data_dir=data,
        method="ce",
        student=names,
        output=tmp_path / "two",
        max_steps=1,
        **SHORT,
    )
    # In the order of the call, as in the results.
    assert [one.results["student"] for one in run.runs] == names
    assert [record["student"] for record in run.results["runs"]] == names
    for name in names:
        one = run.find(name)
        assert one.folder == tmp_path / "two" / name / "seed-0"
        assert one.results["shared_by"] == 2
        assert run.find(f"{name}/seed-0").folder == one.folder
        assert one.model.name == name and one.model.num_classes == 3
    assert df.Run(tmp_path / "two").find("test_vit").folder == run.runs[0].folder
    with pytest.raises(UsageError, match=r"no run 'resnet18'; there are \['test_vit/seed-0'"):
        run.find("resnet18")


def test_settings_have_the_names_of_the_flags(data, tmp_path):
    wanted = {"lr": 1e-3, "batch_size": 4, "stores": True, "amp": False, "suite": ["val"]}
    assert by_path(wanted, {"optim.opt_kwargs": {"eps": 1e-6}}) == {
        "optim.lr": 1e-3,
        "data.batch_size": 4,
        "store.make": ["adversarial"],
        "precision.amp": False,
        "eval.suites": ["val"],
        "optim.opt_kwargs": {"eps": 1e-6},
    }
    with pytest.raises(UsageError, match="epoch: no such setting; did you mean epochs"):
        df.train(output=tmp_path / "run", epoch=3)
    with pytest.raises(UsageError, match="unknown key optim.lrr"):
        df.train(output=tmp_path / "run", set={"optim.lrr": 3})
    with pytest.raises(UsageError, match="--epochs"):
        df.train(output=tmp_path / "run", epochs="many")
    with pytest.raises(UsageError, match=r"student\.drop: needs a timm model"):
        df.train(
            data_dir=data, method="ce", student=Net(), output=tmp_path / "run", drop=0.1, **SHORT
        )
    with pytest.raises(UsageError, match="add img_size="):
        df.train(data_dir=data, method="ce", student=Net(), output=tmp_path / "run", batch_size=4)
    assert not (tmp_path / "run").exists()


def test_own_student_replaces_the_weights_of_a_preset(data, tmp_path):
    run = df.train(
        preset="finetune",
        data_dir=data,
        method="ce",
        student=Net(),
        output=tmp_path / "run",
        max_steps=1,
        **SHORT,
    )
    cfg = from_toml((run.folder / "config.toml").read_text())
    assert cfg.student.name == "module:Net" and not cfg.student.pretrained


def test_modules_of_timm_keep_their_normalisation():
    import timm

    model = timm.create_model("test_resnet", num_classes=2)
    teacher = df.load_teacher(model, ["cat", "dog"])
    pixels = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    mean, std = (
        torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    with torch.no_grad():
        assert torch.allclose(teacher(pixels), model.eval()((pixels - mean) / std), atol=1e-5)
    # The user's own module stays trainable.
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loaders_take_short_arguments(trained, tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    teacher = df.load_teacher("embedded:digits", classes=names)
    assert teacher(torch.rand(1, 3, 28, 28)).shape == (1, 10)
    discretizer = df.load_discretizer("jpeg:75")
    assert discretizer(torch.rand(1, 3, 28, 28)).images.shape == (1, 3, 28, 28)
    with pytest.raises(UsageError, match="img_size"):
        df.load_teacher(Net(), ["a", "b", "c"])
    with pytest.raises(DataError, match="gone: no such folder"):
        df.Run(tmp_path / "gone")


def test_evaluate_stays_the_function_after_its_package_is_imported():
    import dad_fast.evaluation.runner  # noqa: F401

    assert df.evaluate.__module__ == "dad_fast.api.evaluate"


SCRIPT = """\
import sys
from torch import nn
import dad_fast as df


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


run = df.train(data_dir=sys.argv[1], method="ce", student=Net(), output=sys.argv[2], img_size=32,
               batch_size=4, workers=1, epochs=1, warmup_epochs=0, max_steps=2)
print(run.results["student"], run.model.num_classes)
"""


@pytest.mark.slow
def test_script_without_a_guard_runs_under_torchrun(data, tmp_path):
    """Loader processes do not run the script again."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), str(data), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("module:Net 3") == 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["processes"] == 2 and not record["commands"]
