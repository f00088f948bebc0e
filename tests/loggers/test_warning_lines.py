"""A user sees warnings of this package once each, and none of other libraries."""

import logging
import warnings

import pytest

from dad_fast.loggers.run_log import RunLog
from dad_fast.loggers.warning_lines import own_warnings_only

log = logging.getLogger("dad_fast.data")


def noise():
    log.warning("%s images are not read", 3)
    logging.getLogger("open_clip").warning("no pretrained weights")
    warnings.warn("palette images with transparency", stacklevel=1)


@pytest.mark.parametrize("debug", [False, True])
def test_own_warnings_are_one_line_each(capsys, debug):
    with own_warnings_only(debug):
        noise()
        noise()
    error = capsys.readouterr().err
    assert error.count("warning: 3 images are not read\n") == 1
    # pytest records Python's warnings and loggers without a handler.
    assert ("transparency" in error) <= debug and ("pretrained" in error) <= debug


def test_a_run_logs_a_warning_that_was_shown_before_and_does_not_show_it_again(tmp_path, capsys):
    with own_warnings_only(debug=False):
        noise()
        with RunLog(tmp_path):
            noise()
            log.warning("new")
    error = capsys.readouterr().err
    assert error.count("images are not read") == 1 and error.count("warning: new") == 1
    text = (tmp_path / "train.log").read_text()
    assert text.count("images are not read") == 1 and text.count("warning: new") == 1
