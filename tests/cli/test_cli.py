"""Command line: dispatch, help screens, messages, exit codes. A recorder replaces `train.run`."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from dad_fast import errors
from dad_fast.cli import main as cli
from dad_fast.cli import train as train_flags
from dad_fast.cli.screen import narrowed
from dad_fast.config import Config, Launch, options, to_toml
from dad_fast.config.fields import settings
from dad_fast.config.flags import NEGATABLE, options_of
from dad_fast.config.options_fit import FitOptions
from dad_fast.methods.settings import resolve
from dad_fast.sweep.ablation import AXES

DEMO = ["--preset", "demo"]
OPTIONS = {
    "train": options.Launch,
    "ablate": options.AblateOptions,
    "eval": options.EvalLaunch,
    "average": options.AverageOptions,
    "analyze": options.AnalyzeLaunch,
    "predict": options.PredictOptions,
    "export": options.ExportOptions,
    "precompute": options.StoreLaunch,
    "store": options.StoreOptions,
    "fit-discretizer": FitOptions,
    "report": options.ReportOptions,
    "profile": options.ProfileLaunch,
    "doctor": options.DoctorOptions,
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of `train.run`."""
    calls: list[Any] = []
    module = types.ModuleType("dad_fast.sweep.train")

    def run(cfg: Config, launch: Launch) -> int:
        calls.append((cfg, launch))
        return 0

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dad_fast.sweep.train", module)
    import dad_fast.sweep

    monkeypatch.setattr(dad_fast.sweep, "train", module, raising=False)
    return calls


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(cfg: Config, launch: Launch) -> int:
        raise error

    monkeypatch.setattr(sys.modules["dad_fast.sweep.train"], "run", run)


def test_train_gets_settings_and_launch(started: list[Any]) -> None:
    arguments = [
        "train",
        *DEMO,
        *shlex.split("--lr 0.5 -b 64 -j0 -o out --overwrite --suite test,val gaussian_noise:3"),
    ]
    arguments += ["--no-filter", "--scale", "0.5", "1", "--debug"]
    assert cli.main(arguments) == 0
    ((cfg, launch),) = started
    assert (cfg.optim.lr, cfg.data.batch_size, cfg.data.workers) == (0.5, 64, 0)
    assert cfg.eval.suites == ("test", "val", "gaussian_noise:3")
    assert cfg.augment.scale == (0.5, 1.0)
    assert not cfg.loss.filter
    assert launch == Launch(
        output="out",
        overwrite=True,
        preset="demo",
        debug=True,
        arguments=tuple(arguments[1:]),
        # Without --debug, which the dispatcher takes.
        command=shlex.join(["dad-fast", *arguments[:-1]]),
    )


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (DEMO, "runs/demo"),
        (["{file}"], "runs/mine"),
        ([*DEMO, "-o", "x"], "x"),
        (["--method", "ce"], "runs/ce"),
    ],
)
def test_default_output(
    started: list[Any], tmp_path: Path, arguments: list[str], output: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(resolve("demo")))
    if "--preset" not in arguments and "{file}" not in arguments:
        arguments = [*arguments, "--data-dir", "embedded:digits", "--student", "resnet18"]
    assert cli.main(["train", *(argument.format(file=file) for argument in arguments)]) == 0
    assert started[0][1].output == output


def test_resume_auto_without_other_settings_uses_the_config_of_the_run(
    started: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(to_toml(resolve("demo", None, ["optim.lr=0.125"])))
    assert cli.main(["train", "-o", str(tmp_path), "--resume", "auto", "--max-steps", "9"]) == 0
    cfg, launch = started[0]
    assert (cfg.optim.lr, cfg.max_steps, launch.resume) == (0.125, 9, "auto")
    assert len(cfg.variants) == 5

    # --lr changes the result, so the settings of the run are not used, and the rest is missing.
    assert cli.main(["train", "-o", str(tmp_path), "--resume", "auto", "--lr", "1"]) == 2


def test_resume_of_a_folder_uses_its_settings_and_overrides(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", "--resume", str(run)]) == 4
    assert "no such file or folder" in capsys.readouterr().err
    run.mkdir()
    (run / "config.toml").write_text(to_toml(resolve("demo", None, ["optim.lr=0.125"])))
    assert cli.main(["train", "--resume", str(run), "--weight-decay", "0.5"]) == 0
    cfg, launch = started[0]
    assert (cfg.optim.lr, cfg.optim.weight_decay, len(cfg.variants)) == (0.125, 0.5, 5)
    assert (launch.output, launch.resume) == (str(run), "auto")

    # Into another folder, and with other settings than its own.
    other = str(tmp_path / "other")
    assert cli.main(["train", "--resume", str(run), "--method", "kd", "-o", other]) == 0
    cfg, launch = started[1]
    assert (cfg.optim.lr, launch.output, launch.resume) == (0.125, other, str(run))
    assert cli.main(["train", "--resume", str(run), *DEMO]) == 0
    cfg, launch = started[2]
    assert cfg.optim.lr != 0.125 and (launch.output, launch.resume) == (str(run), "auto")

    (run / "plot.svg").touch()
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "dad-fast ablate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "amp", "compiled"),
    [
        ([], "auto", "auto"),
        (["--amp", "{file}"], "on", "auto"),
        (["{file}", "--torchcompile", "--amp"], "on", "on"),
        (["--amp", "off", "{file}"], "off", "auto"),
        (["--amp=auto", "--torchcompile", "on"], "auto", "on"),
        (["--torchcompile", "inductor", "{file}"], "auto", "inductor"),
        (["--torchcompile=aot_eager", "--amp", "{file}"], "on", "aot_eager"),
    ],
)
def test_a_switch_without_a_value_means_on(
    started: list[Any], tmp_path: Path, words: list[str], amp: str, compiled: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlr = 0.125\n")
    assert cli.main(["train", *DEMO, *(word.format(file=file) for word in words)]) == 0
    cfg = started[0][0]
    assert (cfg.precision.amp, cfg.engine.torchcompile) == (amp, compiled)
    assert (cfg.optim.lr == 0.125) == ("{file}" in words)


def test_the_former_form_of_a_switch_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *DEMO, "--no-amp"]) == 2
    assert "unknown flag --no-amp; did you mean --amp off?" in capsys.readouterr().err


def test_of_several_presets_and_files_the_later_win(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[optim]\nlr = 0.125\nclip_grad = 2.0\n")
    second.write_text("[optim]\nlr = 0.25\n")
    words = [str(first), "--preset", "dad-vitb16", "--seed", "3", str(second), *DEMO]
    assert cli.main(["train", *words, "--print-config"]) == 0
    found = tomllib.loads(capsys.readouterr().out)
    assert (found["optim"]["lr"], found["optim"]["clip_grad"], found["seed"]) == (0.25, 2.0, 3)
    assert found["data"]["data_dir"] == "embedded:digits"
    assert cli.main(["train", *words]) == 0
    assert (started[0][1].preset, started[0][1].output) == (
        "dad-vitb16+demo",
        "runs/dad-vitb16+demo",
    )


def test_print_config_prints_toml_and_starts_nothing(
    started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *DEMO, "--lr", "0.25", "--print-config"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["optim"]["lr"] == 0.25

    # Prints incomplete settings, too, and reports what is missing.
    assert cli.main(["train", "--preset", "dad-vitb16", "--print-config"]) == 0
    output = capsys.readouterr()
    assert tomllib.loads(output.out)["method"] == "dad" and "--data-dir" in output.err
    assert not started


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command trian; did you mean train?"),
        ("--lr 3", "unknown flag before the command --lr"),
        ("train --batchsize 3", "unknown flag --batchsize; did you mean --batch-size?"),
        ("train --model resnet50", "unknown flag --model; did you mean --student?"),
        ("train --warmup 3", "did you mean --warmup-epochs or --warmup-prefix or --warmup-lr?"),
        ("train --epoch 3", "unknown flag --epoch; did you mean --epochs?"),
        ("train -lr 3", "unknown flag -lr; did you mean --lr?"),
        ("train -q", "unknown flag -q; dad-fast train --help-all lists every flag"),
        ("train --epochs", "--epochs: expected one argument"),
        ("train --epochs three", "--epochs must be a whole number, or auto, got 'three'"),
        ("train --attack-norm l3", "--attack-norm must be one of l2, linf"),
        ("train --lr 1 --lr-base 1", "--lr and --lr-base both give the learning rate"),
        ("train a.toml", "a.toml: no such file"),
        ("train --preset dmeo", "did you mean demo?"),
        ("train --preset demo --resume auto --overwrite", "leave one out"),
        ("train", "add --data-dir"),
        ("doctor --numeric", "did you mean --numerics?"),
        ("eval --suit x", "did you mean --suite?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    started: list[Any], capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert cli.main(shlex.split(line)) == 2
    output = capsys.readouterr()
    assert output.err.startswith("dad-fast: error: ") and message in output.err
    assert output.err.count("\n") == 1
    assert not output.out and not started


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.DataError("bad"), 4, "dad-fast: error: bad"),
        (errors.EnvironmentProblem("bad"), 3, "dad-fast: error: bad"),
        (errors.Preempted("saved"), 75, "dad-fast: error: saved"),
        (errors.Interrupted("saved"), 130, "dad-fast: error: saved"),
        (KeyboardInterrupt(), 130, "dad-fast: interrupted"),
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            3,
            "dad-fast: error: the package timm is missing",
        ),
        (
            RuntimeError("two\nlines"),
            1,
            "dad-fast: failure: RuntimeError: two lines (run with --debug for the traceback)",
        ),
        (MemoryError(), 1, "dad-fast: failure: MemoryError (run with"),
    ],
)
def test_exit_codes(
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    raising(monkeypatch, error)
    assert cli.main(["train", *DEMO]) == code
    text = capsys.readouterr().err
    assert text.startswith(message) and text.count("\n") == 1
    assert cli.main(["train", *DEMO, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["-h", "train -h", "train --anything -h", "eval --help", "doctor -h", ""]
)
def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main(line.split()) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: dad-fast")
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, "train --help-all"])
def test_help_fits_a_narrow_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screens = []
    for columns in ("100", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main([*command.split(), "-h"]) == 0
        screens.append(capsys.readouterr().out)
    wide, narrow = screens
    assert max(map(len, narrow.splitlines())) <= 80
    # Examples that go on in the next line can still be pasted.
    assert narrow.replace("\\\n", "").split() == wide.replace("\\\n", "").split()


def test_an_example_keeps_its_flags_and_its_comment_in_a_narrow_terminal() -> None:
    example = (
        "  dad-fast train --preset demo --seeds 5 --teacher embedded:digits -o runs/demo  # five"
    )
    assert narrowed(example, 60).splitlines() == [
        "  dad-fast train --preset demo --seeds 5 \\",
        "      --teacher embedded:digits -o runs/demo",
        "      # five",
    ]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_lists_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Covers the option classes; `train --help-all` lists the settings."""
    assert cli.main([command, "-h"]) == 0
    text = capsys.readouterr().out.replace(NEGATABLE, "--")
    flags = [name for option in options_of(OPTIONS[command]) for name in option.names]
    assert flags and all(f"{flag} " in text or f"{flag}," in text for flag in flags)


def test_help_of_ablate_lists_the_flag_of_every_axis(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate", "-h"]) == 0
    text = capsys.readouterr().out
    assert all(axis.flag in text for axis in AXES.values())


def test_options_do_not_reuse_flags_of_settings() -> None:
    of_settings = {setting.flag for setting in settings().values()}
    for command in ("train", "ablate", "eval", "average", "analyze", "precompute", "profile"):
        names = {name for option in options_of(OPTIONS[command]) for name in option.names}
        assert not names & of_settings, command


def test_help_all_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    for path, setting in settings().items():
        assert path in text and (setting.flag or f"--set {path}").removeprefix("--") in text
    assert max(map(len, text.splitlines())) <= 100


def test_examples_run_as_pasted(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Covers `dad-fast train` lines of the help screens; test_eval_command covers those of eval."""
    lines = (cli.TOP_HELP + train_flags.HELP).replace("\\\n", " ").splitlines()
    examples = [line.strip() for line in lines if line.startswith("  dad-fast train ")]
    assert len(examples) >= 4
    for line in examples:
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    assert len(started) == len(examples)


def test_as_a_module_and_through_a_pipe() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dad_fast", "train", "--zzz"], capture_output=True, text=True
    )
    message = "dad-fast: error: unknown flag --zzz; dad-fast train --help-all lists every flag\n"
    assert (result.returncode, result.stderr) == (2, message)
    run = "from dad_fast.cli.main import main; main(['train', '--help-all'])"
    late = f"import time; time.sleep(0.3); {run}"
    closed = subprocess.run(
        f"{shlex.join([sys.executable, '-c', late])} | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert closed.stderr == ""
