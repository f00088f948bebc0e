"""`--print-config` on a machine with a GPU says what auto means there."""

from __future__ import annotations

import tomllib

import pytest

torch = pytest.importorskip("torch")

from dad_fast.cli.main import main
from dad_fast.config import Config
from dad_fast.tools import auto


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(auto, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


def printed(capsys, *more):
    assert main(["train", "--method", "ce", "--print-config", *more]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["precision"]["channels_last"] == "auto"
    return [line for line in text.splitlines() if line.startswith("#")]


def test_comments_name_what_auto_means(h200, capsys):
    title, *lines = printed(capsys, "--torchcompile", "off")
    assert title == "# auto on cuda:0, NVIDIA H200:"
    assert "#   precision.amp: on (this GPU computes in bfloat16)" in lines
    named = {line.split()[1] for line in lines}
    assert {"engine.kernels:", "engine.cuda_graphs:", "precision.channels_last:"} < named
    assert "engine.torchcompile:" not in named


def test_a_run_on_a_cpu_has_no_comment(h200, capsys):
    assert printed(capsys, "--device", "cpu") == []


def test_a_machine_without_a_driver_has_no_comment(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(auto.ctypes, "CDLL", no_library)
    assert auto.comments(Config()) == []
