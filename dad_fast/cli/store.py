"""`dad-fast store`: options and help."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import options_parser, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config.fields import nearest
from dad_fast.config.options import StoreOptions
from dad_fast.errors import UsageError

SUMMARY = "inspect, verify and merge stores of adversarial images and teacher outputs"

HELP = """\
usage: dad-fast store info STORE
       dad-fast store verify STORE
       dad-fast store sheet STORE [--data-dir DIR] [--discretizer FILE] [-o FILE]
       dad-fast store merge PART [PART ...] -o STORE

Inspect the output of dad-fast precompute.

  info     settings, size, share of images that the teacher's filter keeps, shares of codes changed
  verify   read and check every byte; exit code 4 if something is wrong, after naming all of it
  sheet    a picture of stored images, with the teacher's predictions
  merge    merge parts of one store that were written on different machines

flags:
{flags}
"""
ACTIONS = ("info", "verify", "sheet", "merge")


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(StoreOptions)))
        return 0
    options = parse(arguments)
    from dad_fast.tools import store

    return store.run(options)


def parse(arguments: Sequence[str]) -> StoreOptions:
    """Return the options. Raises UsageError."""
    parser = options_parser("store", StoreOptions)
    options = typed_options(StoreOptions, vars(parser.parse(arguments)))
    action, folders = options.action, options.folders
    if action not in ACTIONS:
        unknown = f"unknown action {action}{nearest(action, ACTIONS)}"
        problem = unknown if action else "nothing to do"
        usage = f"dad-fast store {'|'.join(ACTIONS)} STORE"
        raise UsageError(f"{problem}: write {usage} (see dad-fast store -h)")
    if not folders:
        raise UsageError(f"name the store's folder: dad-fast store {action} STORE")
    if action == "merge" and not options.output:
        raise UsageError("name the folder of the whole store: -o STORE")
    if action != "merge" and len(folders) > 1:
        raise UsageError(f"one store at a time, not {len(folders)}")
    return options
