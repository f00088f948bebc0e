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
    arguments = ["train", "--preset", "demo", "--print-config"]
    assert loaded("dad_fast.cli.main", f"dad_fast.cli.main.main({arguments!r})") <= at_startup


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
