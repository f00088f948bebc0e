"""Dispatch of the commands of `dad-fast`, and their errors as one line and an exit code.

This package imports neither numpy nor torch. A command does, once its flags are checked.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType

from dad_fast.allocator import use_expandable_segments
from dad_fast.cli.screen import fill
from dad_fast.config.fields import nearest
from dad_fast.cores import wait_passively
from dad_fast.distributed.signals import ends_at_once
from dad_fast.errors import DadFastError, UsageError, discard_output, print_error
from dad_fast.files import is_full
from dad_fast.loggers.warning_lines import own_warnings_only

# Each is a module of this package, with underscores for hyphens.
COMMANDS = (
    "train",
    "ablate",
    "eval",
    "average",
    "analyze",
    "predict",
    "export",
    "precompute",
    "store",
    "fit-discretizer",
    "report",
    "profile",
    "doctor",
)
# For SIGTERM, SIGUSR1 or Ctrl-C when there is nothing to save.
STOPPED = {
    "train": "stopped; run the same command again with --resume auto",
    "ablate": "stopped; run the same command again with --resume auto",
    "eval": "stopped; run the same command again",
    "precompute": "stopped; run the same command again to resume",
    "fit-discretizer": "stopped; run the same command again with --resume auto",
}
BROKEN = {errno.EIO, errno.ESTALE, errno.ENXIO}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}

TOP_HELP = """\
usage: dad-fast COMMAND [...]

Train image classifiers that are robust to distribution shift: discrete adversarial distillation.

examples:
  dad-fast train --preset demo                            # on embedded data: no GPU, no download
  dad-fast eval runs/demo/dad/seed-0 --suite optdigits    # evaluate the result
  dad-fast doctor                                         # what this machine supports, and fixes

commands:
{commands}

dad-fast COMMAND -h explains a command; dad-fast --version prints the version.
Exit codes: 0 done, 1 failure, 2 usage, 3 environment, 4 data, 75 preempted and saved,
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Expected errors are one line on stderr."""
    _keep_children_out_of_the_current_folder()
    _print_any_character()
    wait_passively()
    use_expandable_segments()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with own_warnings_only(debug):
            code = _dispatch([argument for argument in arguments if argument != "--debug"], debug)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        discard_output()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        print_error(message)
        return code


def _print_any_character() -> None:
    """Escape what the terminal's encoding lacks, as stderr does, so that printing cannot fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _keep_children_out_of_the_current_folder() -> None:
    """Make child processes search for modules where this process does.

    With `-m` and `-c`, Python searches the current folder first, which may hold untrusted files;
    the installed command does not.
    """
    try:
        current = os.getcwd()
    except FileNotFoundError:
        # The current folder was deleted.
        return
    if current not in map(os.path.abspath, sys.path):
        os.environ["PYTHONSAFEPATH"] = "1"


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message, one line, and the exit code for `error`."""
    if isinstance(error, DadFastError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("dad_fast"):
        install = "install dad-fast with its dependencies (dad-fast doctor lists them)"
        return f"error: the package {error.name} is missing; {install}", 3
    if isinstance(error, OSError) and error.strerror:
        is_known = is_full(error) or error.errno in BROKEN | NOT_ALLOWED
        if error.filename or is_known:
            return _explain_disk(error), 4
    fix = "lower --batch-size, or " if type(error).__name__ == "OutOfMemoryError" else ""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"failure: {text} ({fix}run with --debug for the traceback)", 1


def _explain_disk(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if is_full(error):
        fix = "make room"
    elif error.errno in BROKEN:
        fix = "check the disk"
    else:
        fix = "check the path and its permissions"
    again = "run the same command again (train: with --resume auto)"
    return f"error: {where}{error.strerror}; {fix}, and {again}"


def _dispatch(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(top_help())
        return 0
    command, *rest = arguments
    if command == "--version":
        import dad_fast

        print(f"dad-fast {dad_fast.__version__}")
        return 0
    if command not in COMMANDS:
        kind = "flag before the command" if command.startswith("-") else "command"
        known = f"(commands: {', '.join(COMMANDS)})"
        raise UsageError(f"unknown {kind} {command}{nearest(command, COMMANDS)} {known}")
    with ends_at_once(STOPPED[command]) if command in STOPPED else nullcontext():
        code: int = _module(command).main(rest, debug)
        return code


def top_help() -> str:
    """Return the screen of `dad-fast -h`."""
    lines = [f"  {command:<17}{_module(command).SUMMARY}" for command in COMMANDS]
    return fill(TOP_HELP, commands="\n".join(lines))


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"dad_fast.cli.{command.replace('-', '_')}")
