"""Errors that a user can fix, each with the exit code that `dad-fast` documents.

A message is one line: the problem, its place (flag or file), and the fix.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence


class DadFastError(Exception):
    """Base of all errors that print as one line, without a traceback."""

    exit_code = 1


class UsageError(DadFastError):
    """A flag, a key or a combination of settings is wrong."""

    exit_code = 2


class EnvironmentProblem(DadFastError):
    """A package, a compiler, a driver or a device is missing or is the wrong one."""

    exit_code = 3


class DataError(DadFastError):
    """A data set, an image, a class list or a weights file cannot be used."""

    exit_code = 4


class NotFinite(DadFastError):
    """A loss, a gradient or an output was not finite; the run stopped and kept its state."""

    exit_code = 1


class PeerLost(DadFastError):
    """Another process of the run has died or does not answer."""

    exit_code = 1


class Preempted(DadFastError):
    """SIGTERM or SIGUSR1 arrived; the state was saved and `--resume auto` continues."""

    exit_code = 75


class Interrupted(DadFastError):
    """Ctrl-C; the state was saved and `--resume auto` continues."""

    exit_code = 130


def printable(text: str) -> str:
    """Escape control characters except line ends, so that no name can control the terminal."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def print_error(message: str) -> None:
    """Print `message` as one line on stderr, whatever the names in it."""
    print("dad-fast:", printable(message).replace("\n", "\\n"), file=sys.stderr)


def discard_output() -> None:
    """Send what is still printed nowhere, after the reader of a pipe has gone.

    Without this, Python complains again at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], int]:
    """Wrap `main(arguments)` as a program that returns an exit code.

    A DadFastError becomes one line on stderr.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str]) -> int:
        try:
            main(arguments)
        except DadFastError as error:
            print_error(f"error: {error}")
            return error.exit_code
        return 0

    return run
