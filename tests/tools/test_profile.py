"""`dad-fast profile`: real profiles on the CPU, arguments of nsys and ncu (recorded by a stub),
errors.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dad_fast.cli import main as cli
from dad_fast.cli import profile as profile_flags
from dad_fast.loggers import profiling
from dad_fast.tools.profile import run as profile
from tests.tools.test_timeline import write_nsys

ROOT = Path(__file__).parents[2]
DEMO = ["--preset", "demo", "--method", "dad", "-b", "8", "--device", "cpu"]


def test_ranges_are_free_when_off_and_named_when_on() -> None:
    assert profiling.stage("a") is profiling.stage("b")
    with (
        profiling.naming_stages(),
        torch.profiler.profile() as profiler,
        profiling.stage("outer"),
        profiling.stage("inner"),
    ):
        torch.ones(2) + 1
    assert {"outer", "inner"} <= {event.key for event in profiler.key_averages()}
    assert profiling.stage("a") is profiling.stage("b")
    with pytest.raises(RuntimeError), profiling.naming_stages():
        raise RuntimeError
    assert profiling.stage("a") is profiling.stage("b")


def test_the_cuda_range_is_nothing_on_a_cpu() -> None:
    with profiling.cuda_profiler_range(torch.device("cpu")):
        pass


@pytest.fixture
def demo_parts() -> None:
    for package in ("open_clip", "mlxtend", "sklearn"):
        pytest.importorskip(package)


def test_torch(demo_parts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            [
                "profile",
                "torch",
                *DEMO,
                "--steps",
                "2",
                "--warm-up",
                "1",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "2 steps of dad after a warm-up of 1, 8 images each, on cpu" in text
        and "trace.json.gz" in text
    )
    shown = {line.split()[0] for line in text.split("stage ")[1].split("\n\n")[0].splitlines()[1:]}
    assert shown == {
        "step",
        "data",
        "mix",
        "attack",
        "encode",
        "lookup",
        "decode",
        "teacher",
        "student",
        "objective",
        "backward",
        "update",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"trace.json.gz", "ops.txt"}


@pytest.mark.slow  # a training step under the profiler
def test_memory(demo_parts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "memory", *DEMO, "--warm-up", "0", "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (
        "CPU Mem" in text
        and re.search(r"whole process, loading included: \d+\.\d\d GiB", text)
        and "1 steps" in text
    )
    assert "aten::" in (tmp_path / "memory.txt").read_text()


def stub(folder: Path, tool: str, code: int = 0, then: str = "") -> dict[str, str]:
    """Return a PATH on which `tool` records its arguments, one a line, and runs `then`."""
    folder.mkdir()
    script = folder / tool
    script.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {shlex.quote(str(folder / "arguments"))}\n{then}\nexit {code}\n'
    )
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_nsys_captures_only_the_profiled_steps(tmp_path: Path) -> None:
    export = write_nsys(tmp_path / "export.sqlite")
    environment = stub(
        tmp_path / "bin", "nsys", then=f"cp {export} {tmp_path / 'out'}/profile.sqlite"
    )
    command = [
        str(ROOT / "scripts" / "nsys.sh"),
        *DEMO,
        "--steps",
        "3",
        "--warm-up",
        "7",
        "-o",
        str(tmp_path / "out"),
    ]
    environment["PYTHON"] = sys.executable
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "bin" / "arguments").read_text().splitlines()
    assert arguments[0] == "profile" and {
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
    } <= set(arguments)
    assert (
        f"--output={tmp_path / 'out' / 'profile'}" in arguments and "--export=sqlite" in arguments
    )
    inner = arguments[arguments.index("-m") :]
    assert inner[:4] == ["-m", "dad_fast", "profile", "range"] and inner[-4:] == [
        "--steps",
        "3",
        "--warm-up",
        "7",
    ]
    assert (
        Path(inner[4]).read_text().count('device = "cpu"') == 1
        and 'cuda_graphs = "off"' in Path(inner[4]).read_text()
    )
    assert (
        "device idle 38.9%" in done.stdout
        and "profile.nsys-rep: open it" in done.stdout
        and "Look at" in done.stdout
    )
    # nsys would start a valid command.
    cfg, launch = profile_flags.parse(inner[3:])
    assert (cfg.method, launch.kind, launch.steps, launch.warm_up) == ("dad", "range", 3, 7)


def test_ncu_profiles_own_kernels_by_default(tmp_path: Path) -> None:
    environment = stub(tmp_path / "bin", "ncu") | {"PYTHON": sys.executable}
    command = [str(ROOT / "scripts" / "ncu.sh"), *DEMO, "-o", str(tmp_path / "out")]
    assert (
        subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path).returncode == 0
    )
    arguments = (tmp_path / "bin" / "arguments").read_text().splitlines()
    assert {"--profile-from-start=off", "--launch-count=20"} <= set(arguments)
    (kernels,) = (
        a.removeprefix("--kernel-name=regex:") for a in arguments if a.startswith("--kernel-name")
    )
    assert (
        profile.own_kernels()
        and all(re.search(kernels, name) for name in profile.own_kernels())
        and not re.search(kernels, "gemm")
    )
    done = subprocess.run(
        [*command, "--kernel", "gemm.*", "--launches", "3"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    arguments = (tmp_path / "bin" / "arguments").read_text().splitlines()
    assert (
        "--kernel-name=regex:gemm.*" in arguments
        and "--launch-count=3" in arguments
        and "profile.ncu-rep: open it" in done.stdout
    )


def test_a_tool_that_fails_is_named_with_its_code(tmp_path: Path) -> None:
    environment = stub(tmp_path / "bin", "ncu", code=9)
    command = [sys.executable, "-m", "dad_fast", "profile", "ncu", *DEMO, "-o", "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "ncu failed with exit code 9" in done.stderr


def test_command_that_nsys_starts(demo_parts: None, tmp_path: Path) -> None:
    assert (
        cli.main(
            [
                "profile",
                "range",
                *DEMO,
                "--steps",
                "1",
                "--warm-up",
                "1",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("nsys --preset demo --method dad", 3, "nsys is not on the PATH: install Nsight Systems"),
        ("ncu --preset demo --method dad", 3, "ncu is not on the PATH: install Nsight Compute"),
        ("", 2, "name a kind of profile (kinds: nsys, ncu, torch, memory, range)"),
        ("nsyss", 2, "unknown kind of profile nsyss; did you mean nsys?"),
        ("torch --preset demo", 2, "pick one with --method"),
        ("torch --preset demo --method dad --steps 0", 2, "--steps 0: a whole number, 1 or more"),
        (
            "torch --preset demo --method dad --warm-up x",
            2,
            "--warm-up x: a whole number, 0 or more",
        ),
        ("torch --preset demo --method dad --step 3", 2, "did you mean --steps?"),
        ("torch --method dad", 2, "add --data-dir"),
        ("torch --preset demo --method dad -o {file}", 2, "is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["profile", *shlex.split(line.format(file=file))]) == code
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out


def test_help_is_light_and_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    watch = "import sys, dad_fast.cli.main; dad_fast.cli.main.main(['profile', '-h']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not {"torch", "numpy"} & set(done.stderr.split())
    assert len(done.stdout.splitlines()) <= 40 and max(map(len, done.stdout.splitlines())) <= 110
