"""`import dad_fast` and every help screen load neither numpy nor torch, and answer at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {"numpy", "torch", "timm", "open_clip", "PIL", "rich", "triton"}
WATCH = "import sys; import {module}; {call}; print(','.join(sorted({{name.split('.')[0] for name in sys.modules}})), file=sys.stderr)"


def loaded(module: str, call: str = "pass") -> set[str]:
    result = subprocess.run([sys.executable, "-c", WATCH.format(module=module, call=call)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.strip().splitlines()[-1].split(","))


def test_import_is_light() -> None:
    assert not loaded("dad_fast") & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [["-h"], ["train", "-h"], ["train", "--help-all"], ["eval", "-h"], ["store", "-h"], ["report", "-h"], ["doctor", "-h"], ["--version"]],
)
def test_help_is_light(arguments: list[str]) -> None:
    assert not loaded("dad_fast.cli", f"dad_fast.cli.main({arguments!r})") & HEAVY


def test_print_config_is_light() -> None:
    arguments = ["train", "--preset", "demo", "--print-config"]
    assert not loaded("dad_fast.cli", f"dad_fast.cli.main({arguments!r})") & HEAVY


def test_help_answers_at_once() -> None:
    """Under 0.3 s of the processor's time; the best of three, since the test machine is shared."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "dad_fast", "train", "-h"], capture_output=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.3


def test_public_names_are_found_when_used() -> None:
    pytest.importorskip("torch")
    import dad_fast
    from dad_fast.methods import attack, objectives

    assert dad_fast.PGD is attack.PGD and dad_fast.losses is objectives and callable(dad_fast.discretize)
    assert {"Teacher", "VQGAN", "PGD", "discretize", "losses", "__version__"} <= set(dir(dad_fast))
    assert dad_fast.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dad_fast.nothing
