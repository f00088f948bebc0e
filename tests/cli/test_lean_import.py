"""`import dad_fast` and every help screen load the standard library and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

WATCH = """
import sys
import {module}
{call}
print(','.join(sorted({{name.split('.')[0] for name in sys.modules}})), file=sys.stderr)
"""


def loaded(module: str, call: str = "pass") -> set[str]:
    """Top-level modules from outside the standard library and this package."""
    result = subprocess.run(
        [sys.executable, "-c", WATCH.format(module=module, call=call)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    names = set(result.stderr.strip().splitlines()[-1].split(","))
    return names - sys.stdlib_module_names - {"__main__", "dad_fast"}


@pytest.fixture(scope="module")
def at_startup() -> set[str]:
    """Modules that the environment itself loads in every Python process (from .pth files)."""
    return loaded("sys")


def test_import_is_light(at_startup: set[str]) -> None:
    assert loaded("dad_fast") <= at_startup


@pytest.mark.parametrize(
    "arguments",
    [
        ["-h"],
        ["train", "-h"],
        ["train", "--help-all"],
        ["eval", "-h"],
        ["store", "-h"],
        ["report", "-h"],
        ["doctor", "-h"],
        ["--version"],
    ],
)
def test_help_is_light(at_startup: set[str], arguments: list[str]) -> None:
    assert loaded("dad_fast.cli.main", f"dad_fast.cli.main.main({arguments!r})") <= at_startup


def test_print_config_is_light(at_startup: set[str]) -> None:
    # With a GPU it imports torch, for the meaning of auto there.
    arguments = ["train", "--preset", "demo", "--print-config", "--device", "cpu"]
    assert loaded("dad_fast.cli.main", f"dad_fast.cli.main.main({arguments!r})") <= at_startup


PATHS = {
    "--data-dir": (4, ["--data-dir", "nowhere"]),
    "--val-split": (4, ["--val-split", "valid"]),
    "one class": (4, ["--data-dir", "nested"]),
    "--class-map": (4, ["--class-map", "classes.csv"]),
    "--teacher gone.pt": (4, ["--teacher", "open_clip:ViT-B-32@gone.pt"]),
    "--discretizer gone.ckpt": (4, ["--method", "dad", "--discretizer", "gone.ckpt"]),
    "needs a discretizer": (2, ["--method", "dad"]),
    "needs a teacher": (2, ["--teacher", ""]),
    "--student-weights": (4, ["--student-weights", "gone.safetensors"]),
    "not a store": (4, ["--store", "gone"]),
    "--output full exists": (2, ["-o", "full"]),
    "holds no run": (2, ["-o", "full", "--overwrite"]),
}

EVAL_PATHS = {
    "gone: no such checkpoint": (4, ["gone"]),
    "holds several runs, such as several/dad/seed-0": (4, ["several"]),
    "nothing to evaluate": (2, []),
    "--json out/r.json: name a file in a folder that exists": (2, ["run", "--json", "out/r.json"]),
    "--csv full: name a file": (2, ["run", "--csv", "full"]),
    "--suite contrst: no corruption, no folder": (4, ["run", "--suite", "contrst"]),
    "--suite contrast:7: no severity": (2, ["run", "--suite", "contrast:7"]),
    "--suite imagenet=gone: no such folder": (4, ["run", "--suite", "imagenet=gone"]),
    "'imagent' is no kind of test set": (2, ["run", "--suite", "imagent=data"]),
    "--ood gone: no corruption": (4, ["run", "--ood", "gone"]),
    "nowhere: no such folder (--data-dir)": (4, ["run", "--data-dir", "nowhere"]),
    "--teacher gone.pt: no such file": (4, ["run", "--teacher", "open_clip:ViT-B-32@gone.pt"]),
    "a name of the hub": (2, ["run", "--teacher", "timm/resnet18"]),
    "no class map gone.csv": (4, ["run", "--class-map", "gone.csv"]),
}


def test_wrong_paths_are_errors_before_torch_is_imported(tmp_path) -> None:
    for name in ("data/train/a", "data/train/b", "data/val/a", "data/val/b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("nested/train/train", "nested/val/val", "full/notes"):
        (tmp_path / name).mkdir(parents=True)
    given = ["--data-dir", "data", "--method", "kd", "--teacher", "embedded:digits", "-o", "out"]
    given += ["--student", "resnet18"]
    commands = [["train", *given, *more] for _, more in PATHS.values()]
    commands.append(["train", *given, "--data-dir", "nowhere", "--seeds", "2", "--jobs", "1"])
    commands.append(["train", *given, "--data-dir", "nowhere", "--nproc", "2"])
    commands.append(["ablate", *given, "--data-dir", "nowhere", "--vary", "loss.kd=1,2"])
    commands.append(["precompute", "--targets", *given[:2], *given[4:], "--data-dir", "nowhere"])
    finetune = ["--preset", "finetune", "--discretizer", "jpeg:75"]
    commands.append(["train", *finetune, "--data-dir", "nowhere", "-o", "out"])

    (tmp_path / "several/dad/seed-0").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    for place in ("run", "several/dad/seed-0"):
        (tmp_path / place / "model.safetensors").touch()
    (tmp_path / "run/config.toml").write_text('[data]\ndata_dir = "data"\n')
    commands += [["eval", *more] for _, more in EVAL_PATHS.values()]
    code = (
        "import sys; from dad_fast.cli.main import main\n"
        f"print([main(arguments) for arguments in {commands!r}], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands), done.stderr
    for line, text in zip(lines, PATHS, strict=False):
        assert text in line, (text, line)
    nowhere = lines[len(PATHS) : -len(EVAL_PATHS)]
    assert all("nowhere" in line and "--data-dir" in line for line in nowhere)
    for line, text in zip(lines[-len(EVAL_PATHS) :], EVAL_PATHS, strict=True):
        assert text in line, (text, line)
    codes = [code for code, _ in PATHS.values()] + [4] * len(nowhere)
    codes += [code for code, _ in EVAL_PATHS.values()]
    assert done.stdout.strip() == f"{codes} False"
    assert not (tmp_path / "out").exists()


def test_public_names_are_imported_on_first_use() -> None:
    pytest.importorskip("torch")
    import dad_fast
    from dad_fast.methods import attack, losses

    assert dad_fast.PGD is attack.PGD and dad_fast.losses is losses
    for name in dad_fast.__all__:
        assert name in dir(dad_fast) and getattr(dad_fast, name) is not None
    assert dad_fast.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dad_fast.nothing
