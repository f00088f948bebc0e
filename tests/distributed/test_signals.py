"""Signals with nothing to save, and inside stop_requests."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dad_fast.distributed import signals
from dad_fast.distributed.signals import asked, ends_at_once, stop_requests
from dad_fast.errors import DataError, Interrupted, Preempted
from tests.processes import HANG, ROOT

ERRORS = [(signal.SIGTERM, Preempted), (signal.SIGUSR1, Preempted), (signal.SIGINT, Interrupted)]


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python's handler runs here at the latest


@pytest.mark.parametrize(("number", "error"), ERRORS)
def test_signal_raises_at_once_with_nothing_to_save(number, error):
    before, cleaned = signal.getsignal(number), []
    with pytest.raises(error, match="words"), ends_at_once("words"):
        try:
            send(number)
            pytest.fail("not ended")
        except Exception:
            pytest.fail("taken for a failure")
        finally:
            send(signal.SIGTERM)  # launchers repeat themselves
            cleaned.append(True)
    assert cleaned and signal.getsignal(number) is before and asked() is None


@pytest.mark.parametrize(("number", "error"), ERRORS)
def test_signal_is_a_request_inside_stop_requests(number, error):
    with ends_at_once("outside"):
        with stop_requests() as stop:
            send(number)
            assert asked() is stop.error is error
        with pytest.raises(error, match="inside"), ends_at_once("inside"):
            pytest.fail("what was asked for before is answered first")


def test_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.error is Interrupted
        send(signal.SIGINT)


def test_failure_is_kept_and_next_block_starts_clean():
    with pytest.raises(DataError, match="damaged"), ends_at_once("words"):
        raise DataError("damaged")
    with ends_at_once("words"), stop_requests() as stop:
        assert stop.error is None and not signals._active.at_once


def test_process_that_waits_in_c_ends():
    """Python's handlers do not run there: in a collective, or with a disk that does not answer."""
    code = """
    import ctypes
    from dad_fast.distributed import signals
    signals.PATIENCE = 0.3
    with signals.ends_at_once("stopped, the words"):
        print("waits", flush=True)
        lock, held = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
        lock(held), lock(held)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=-1, stderr=-1, text=True
    ) as process:
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=HANG)[1]
    assert process.returncode == 75 and said == "dad-fast: error: stopped, the words\n"
