"""A user sees warnings of this package once each, and none of other libraries."""

import logging
import subprocess
import sys

import pytest

from dad_fast.loggers.run_log import RunLog
from dad_fast.loggers.warning_lines import own_warnings_only

NOISE = """
import logging, sys, warnings
from dad_fast.loggers.warning_lines import own_warnings_only

with own_warnings_only(debug=sys.argv[1] == "debug"):
    for _ in range(2):
        logging.getLogger("dad_fast.data").warning("%s images are not read", 3)
        logging.getLogger("open_clip").warning("no pretrained weights")
        warnings.warn("palette images with transparency")
"""


@pytest.mark.parametrize("mode", ["plain", "debug"])
def test_own_warnings_are_one_line_each_and_others_are_hidden(mode, monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    # Pytest has handlers of its own.
    done = subprocess.run([sys.executable, "-c", NOISE, mode], capture_output=True, text=True)
    own = "warning: 3 images are not read\n"
    if mode == "plain":
        assert done.stderr == own
    else:
        assert done.stderr.count(own) == 1
        assert "no pretrained weights" in done.stderr and "with transparency" in done.stderr


def test_a_run_logs_a_warning_that_was_shown_before_and_does_not_show_it_again(tmp_path, capsys):
    log = logging.getLogger("dad_fast.data")
    with own_warnings_only(debug=False):
        log.warning("old")
        with RunLog(tmp_path):
            log.warning("old")
            log.warning("new")
    error = capsys.readouterr().err
    assert error.splitlines() == ["warning: old", "warning: new"]
    text = (tmp_path / "train.log").read_text()
    assert text.count("warning: old\n") == text.count("warning: new\n") == 1
