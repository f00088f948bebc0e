"""`import dad_fast` and every help screen load neither numpy nor torch, and are fast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {"numpy", "torch", "timm", "open_clip", "PIL", "rich", "triton"}
WATCH = """
import sys
import {module}
{call}
print(','.join(sorted({{name.split('.')[0] for name in sys.modules}})), file=sys.stderr)
"""


def loaded(module: str, call: str = "pass") -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", WATCH.format(module=module, call=call)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stderr.strip().splitlines()[-1].split(","))


def test_import_is_light() -> None:
    assert not loaded("dad_fast") & HEAVY


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
def test_help_is_light(arguments: list[str]) -> None:
    assert not loaded("dad_fast.cli.main", f"dad_fast.cli.main.main({arguments!r})") & HEAVY


def test_print_config_is_light() -> None:
    arguments = ["train", "--preset", "demo", "--print-config"]
    assert not loaded("dad_fast.cli.main", f"dad_fast.cli.main.main({arguments!r})") & HEAVY


def test_help_is_fast() -> None:
    """Measured at 7 times the CPU time of starting Python (0.2 s); one heavy import exceeds 20."""
    seconds = {"-c pass": [], "-m dad_fast train -h": []}
    # The minimum of three, in turns, since the test machine is shared.
    for _ in range(3):
        for command, found in seconds.items():
            before = os.times()
            subprocess.run([sys.executable, *command.split()], capture_output=True, check=True)
            after = os.times()
            user = after.children_user - before.children_user
            system = after.children_system - before.children_system
            found.append(user + system)
    start, answer = (min(found) for found in seconds.values())
    assert answer < 20 * max(start, 0.01)


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
