"""Verbs and flags of `dad-fast`. Nothing here imports numpy or torch; a verb's module does, once its flags are right."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from dad_fast.config import Launch, check, to_toml
from dad_fast.config.fields import nearest, settings
from dad_fast.config.resolve import gather
from dad_fast.config.variants import NOT_SCIENCE
from dad_fast.errors import DadFastError, UsageError
from dad_fast.flags import eval_help, eval_parser, train_help, train_parser
from dad_fast.flags.doctor import DOCTOR_HELP, doctor_options

TOP_HELP = """\
usage: dad-fast VERB [...]

Trains image classifiers that stay right when the world changes: discrete adversarial distillation.

examples:
  dad-fast train --preset demo                            # on embedded data: no GPU, no download
  dad-fast eval runs/demo/dad/seed-0 --suite optdigits    # judge what was trained
  dad-fast doctor                                         # what is on, what is off, and the mend

verbs:
  train       train a student by ce, kd, aug-only, dat, dad or dat+dad
  eval        judge a checkpoint (or a teacher) on test sets and corruptions
  precompute  fill a store: adversarial images, or the teacher's outputs, once for many runs
  store       look at a store of adversarial images and teacher outputs, check it, join its parts
  profile     look into a few training steps: Nsight, torch's profiler, memory
  doctor      look at this machine (packages, GPU, kernels, numerics), or with --data at a data set

dad-fast VERB -h explains a verb; dad-fast --version says the version.
Exit codes: 0 done, 1 failure, 2 usage, 3 environment, 4 data, 75 preempted and saved,
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. Errors that a user can mend are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = _dispatch([argument for argument in arguments if argument != "--debug"], debug)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        print(f"dad-fast: {message}", file=sys.stderr)
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit code."""
    if isinstance(error, DadFastError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("dad_fast"):
        return f"error: the package {error.name} is missing; install dad-fast with its dependencies (dad-fast doctor lists them)", 3
    mend = "lower --batch-size, or " if type(error).__name__ == "OutOfMemoryError" else ""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"failure: {text} ({mend}run with --debug for the traceback)", 1


def _dispatch(arguments: list[str], debug: bool) -> int:
    verbs: dict[str, Callable[[list[str], bool], int]] = {
        "train": _train,
        "eval": _eval,
        "precompute": _precompute,
        "profile": _profile,
        "store": _store,
        "doctor": _doctor,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(TOP_HELP, end="")
        return 0
    if arguments[0] == "--version":
        import dad_fast

        print(f"dad-fast {dad_fast.__version__}")
        return 0
    if arguments[0] not in verbs:
        what = "flag before the verb" if arguments[0].startswith("-") else "verb"
        raise UsageError(f"unknown {what} {arguments[0]}{nearest(arguments[0], verbs)} (verbs: {', '.join(verbs)})")
    return verbs[arguments[0]](arguments[1:], debug)


def _train(arguments: list[str], debug: bool) -> int:
    if _wants_help(arguments):
        print(train_help(every="--help-all" in arguments))
        return 0
    given = vars(train_parser().parse(arguments))
    flags = {path: given[path] for path in settings() if path in given}
    file = Path(given["config"]) if given["config"] else None
    output = given["output"] or f"runs/{given['preset'] or (file.stem if file else '') or given.get('method', 'dad')}"
    paths = {*flags, *(item.partition("=")[0].strip() for item in given["sets"])}
    if given["resume"] == "auto" and not (file or given["preset"]) and paths <= NOT_SCIENCE and (Path(output) / "config.toml").exists():
        file = Path(output) / "config.toml"  # nothing said what to train: continue with the run's own settings
    cfg = gather(given["preset"], file, given["sets"], flags)
    if given["print_config"]:
        print(to_toml(cfg), end="", flush=True)
    check(cfg)  # after printing: what is still missing is said below the settings
    if given["print_config"]:
        return 0
    launch = Launch(
        output=output,
        resume=given["resume"],
        overwrite=given["overwrite"],
        allow_config_change=given["allow_config_change"],
        debug=debug,
        preset=given["preset"],
    )
    if launch.resume and launch.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: leave one out")
    from dad_fast.commands import train

    return train.run(cfg, launch)


def _eval(arguments: list[str], debug: bool) -> int:
    if _wants_help(arguments):
        print(eval_help())
        return 0
    given = vars(eval_parser().parse(arguments))
    flags = {path: given[path] for path in settings() if path in given}
    from dad_fast.commands import eval as command

    return command.run(given["checkpoint"], flags, given["json"])


def _profile(arguments: list[str], debug: bool) -> int:
    from dad_fast.flags import profile as profile_flags

    if _wants_help(arguments):
        print(profile_flags.help_text(), end="")
        return 0
    cfg, launch = profile_flags.parse(arguments)
    check(cfg)
    from dad_fast.commands import profile

    return profile.run(cfg, launch)


def _precompute(arguments: list[str], debug: bool) -> int:
    from dad_fast.flags import precompute as precompute_flags

    if _wants_help(arguments):
        print(precompute_flags.help_text())
        return 0
    cfg, launch = precompute_flags.parse(arguments)
    from dad_fast.commands import precompute

    return precompute.run(cfg, launch, arguments)


def _store(arguments: list[str], debug: bool) -> int:
    from dad_fast.flags import store as store_flags

    if _wants_help(arguments):
        print(store_flags.HELP, end="")
        return 0
    given = store_flags.parse(arguments)
    from dad_fast.commands import store

    return store.run(given)


def _doctor(arguments: list[str], debug: bool) -> int:
    if _wants_help(arguments):
        print(DOCTOR_HELP, end="")
        return 0
    options = doctor_options(arguments)
    if options.data:
        from dad_fast.commands import doctor_data

        return doctor_data.run(options)
    from dad_fast.commands import doctor

    return doctor.run(options.numerics)


def _wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help", "--help-all") for argument in arguments)
