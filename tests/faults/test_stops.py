"""SIGTERM and Ctrl-C where there is nothing to save: one line, the documented exit code, no file. (Training: test_resume*.py.)"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from harness import ROOT  # noqa: E402


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_eval_stops_between_batches(tmp_path: Path, number: signal.Signals, code: int) -> None:
    arguments = ["eval", "--teacher", "embedded:digits", "--data-dir", "embedded:digits", "-j", "0", "-b", "10", "--device", "cpu"]
    arguments += ["--suite", "train", "gaussian_noise", "shot_noise", "glass_blur", "--json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "dad_fast", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "top-1" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert "stopped: what stands above is whole" in said.splitlines()[-1] and not list(tmp_path.iterdir())
