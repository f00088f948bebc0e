"""Versions and hardware for run.json."""

from __future__ import annotations

import json
import sys

from dad_fast import files
from dad_fast.loggers import environment


def test_never_fails_and_holds_no_environment_variables(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2-secret")
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setitem(sys.modules, "pynvml", None)  # no NVML
    facts = environment.environment()
    text = json.dumps(files.plain(facts), allow_nan=False)
    assert facts["git"] is None and facts["driver"] is None and "hunter2" not in text
    assert facts["packages"]["torch"] and facts["cpus"] >= 1


def test_copy_without_history_has_the_commit_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DAD_FAST_COMMIT", raising=False)
    assert environment._git_commit(tmp_path) is None
    monkeypatch.setenv("DAD_FAST_COMMIT", "0123abc")
    assert environment._git_commit(tmp_path) == "0123abc"
