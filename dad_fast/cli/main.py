"""The verbs of `dad-fast`. Nothing here or in flags/ imports numpy or torch; a verb's command does, once its flags are right."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext

from dad_fast.config.fields import nearest
from dad_fast.cores import wait_passively
from dad_fast.distributed.signals import ends_at_once
from dad_fast.errors import DadFastError, UsageError, print_error
from dad_fast.files import is_full

# Each a module of this package.
COMMANDS = (
    "train",
    "ablate",
    "eval",
    "analyze",
    "predict",
    "export",
    "precompute",
    "store",
    "report",
    "profile",
    "doctor",
)
STOPPED = {  # by SIGTERM, SIGUSR1 or Ctrl-C when there is nothing to save
    "train": "stopped; run the same command again with --resume auto",
    "ablate": "stopped; run the same command again with --resume auto",
    "eval": "stopped; run the same command again",
    "precompute": "stopped; the same command goes on",
}
BROKEN = {errno.EIO, errno.ESTALE, errno.ENXIO}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}

TOP_HELP = """\
usage: dad-fast VERB [...]

Trains image classifiers that stay right when the world changes: discrete adversarial distillation.

examples:
  dad-fast train --preset demo                            # on embedded data: no GPU, no download
  dad-fast eval runs/demo/dad/seed-0 --suite optdigits    # judge what was trained
  dad-fast doctor                                         # what is on, what is off, and the mend

verbs:
{verbs}

dad-fast VERB -h explains a verb; dad-fast --version says the version.
Exit codes: 0 done, 1 failure, 2 usage, 3 environment, 4 data, 75 preempted and saved,
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. Errors that a user can mend are one line on stderr."""
    _keep_children_out_of_the_current_folder()
    wait_passively()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = _dispatch([argument for argument in arguments if argument != "--debug"], debug)
        sys.stdout.flush()
        return code
    except (
        BrokenPipeError
    ):  # the reader of our output has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        print_error(message)
        return code


def _keep_children_out_of_the_current_folder() -> None:
    """Processes that we start look for modules where this one does. Python lets `-m` and `-c` look in the current folder first, where
    data of others may lie; the installed command does not."""
    try:
        if os.getcwd() not in map(os.path.abspath, sys.path):
            os.environ["PYTHONSAFEPATH"] = "1"
    except FileNotFoundError:  # somebody has removed the current folder
        pass


def _explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit code."""
    if isinstance(error, DadFastError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("dad_fast"):
        return (
            f"error: the package {error.name} is missing; install dad-fast with its dependencies (dad-fast doctor lists them)",
            3,
        )
    if (
        isinstance(error, OSError)
        and error.strerror
        and (error.filename or is_full(error) or error.errno in BROKEN | NOT_ALLOWED)
    ):
        where = f"{error.filename}: " if error.filename else ""
        mend = (
            "make room"
            if is_full(error)
            else "check the disk"
            if error.errno in BROKEN
            else "check the path and its permissions"
        )
        return (
            f"error: {where}{error.strerror}; {mend}, and run the same command again (train: with --resume auto)",
            4,
        )
    mend = "lower --batch-size, or " if type(error).__name__ == "OutOfMemoryError" else ""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"failure: {text} ({mend}run with --debug for the traceback)", 1


def _dispatch(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(top_help(), end="")
        return 0
    if arguments[0] == "--version":
        import dad_fast

        print(f"dad-fast {dad_fast.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        what = "flag before the verb" if arguments[0].startswith("-") else "verb"
        raise UsageError(
            f"unknown {what} {arguments[0]}{nearest(arguments[0], COMMANDS)} (verbs: {', '.join(COMMANDS)})"
        )
    with ends_at_once(STOPPED[arguments[0]]) if arguments[0] in STOPPED else nullcontext():
        code: int = importlib.import_module(f"dad_fast.cli.{arguments[0]}").main(
            arguments[1:], debug
        )
        return code


def top_help() -> str:
    lines = [
        f"  {verb:<12}{importlib.import_module(f'dad_fast.cli.{verb}').SUMMARY}"
        for verb in COMMANDS
    ]
    return TOP_HELP.format(verbs="\n".join(lines))
