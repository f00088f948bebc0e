"""`--check-skips`: the table of skips, and the exit status for a reason that is not in the list."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skip_report import ALLOWED_SKIPS, load_patterns

ROOT = Path(__file__).parents[2]
CONFTEST = """
from pathlib import Path
from tests.skip_report import SkipReport

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipReport(config, Path(__file__).with_name("allowed.toml")), "skip-report")
"""
ALLOWED = """
[[skip]]
reason = "needs CUDA"
why = "a GPU"

[[skip]]
reason = "never here"
why = "another platform"
when = "sys_platform == 'no such platform'"
"""
TESTS = """
import pytest

@pytest.mark.skip(reason="needs CUDA")
@pytest.mark.parametrize("number", range(2))
def test_one(number): ...

def test_two(): ...
"""


def run(folder: Path, tests: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    files = {
        "conftest.py": CONFTEST,
        "allowed.toml": ALLOWED,
        "pytest.ini": f"[pytest]\npythonpath = {ROOT}\n",
        **tests,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        str(folder),
    ]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_allowed_skips_are_counted_and_pass(tmp_path: Path) -> None:
    done = run(tmp_path, {"test_it.py": TESTS})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "    2  needs CUDA\n    2  in all\n" in done.stdout and "NOT ALLOWED" not in done.stdout


def test_unknown_reasons_fail_also_for_whole_files_and_in_workers(tmp_path: Path) -> None:
    inner = "import pytest\n\ndef test_three():\n    pytest.skip('never here')\n"
    whole = "import pytest\n\npytest.importorskip('no_such_package')\n"
    files = {"test_it.py": TESTS, "test_inner.py": inner, "test_whole.py": whole}
    done = run(tmp_path, files, "-p", "xdist", "-n", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "    1  NOT ALLOWED: never here\n" in done.stdout
    assert (
        "    1  NOT ALLOWED: could not import 'no_such_package': No module named 'no_such_package'\n"
        in done.stdout
    )
    assert "error: 2 reason(s) not in allowed_skips.toml" in done.stdout


def test_the_committed_list_is_valid() -> None:
    assert load_patterns(ALLOWED_SKIPS)


def test_entry_without_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text('[[skip]]\nreason = "x"\n')
    with pytest.raises(
        pytest.UsageError,
        match=r"list\.toml: an entry has reason, why and perhaps when, not reason",
    ):
        load_patterns(tmp_path / "list.toml")
