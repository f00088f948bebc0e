"""Flags of `dad-fast store`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dad_fast.cli.parser import Parser, wants_help
from dad_fast.config.fields import nearest
from dad_fast.errors import UsageError

SUMMARY = "look at a store of adversarial images and teacher outputs, check it, join its parts"

HELP = """\
usage: dad-fast store info STORE
       dad-fast store verify STORE
       dad-fast store sheet STORE [--data-dir DIR] [--discretizer FILE] [-o FILE]
       dad-fast store merge PART [PART ...] -o STORE

Looks at what dad-fast precompute has stored.

  info     what made it, its size, the share kept by the teacher, the shares of codes changed
  verify   reads every byte and checks it; exit code 4 when something is wrong, all of it named
  sheet    a picture of stored images, with what the teacher says of them
  merge    brings parts of one store together that were written on different machines

flags:
  -o, --output PATH     of sheet: the PNG [STORE-sheet.png]; of merge: the store's folder
  --num N               sheet: how many samples [24]
  --view N              sheet: which view [0]
  --data-dir DIR        sheet: show the clean images too; an image folder or embedded:digits
  --split NAME          sheet: a split of it [train]
  --discretizer FILE    sheet: decode the stored codes with the VQGAN that made them
  --debug               show tracebacks
"""
ACTIONS = ("info", "verify", "sheet", "merge")


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(HELP, end="")
        return 0
    given = parse(arguments)
    from dad_fast.tools import store

    return store.run(given)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """action, folders, output, num, view, data_dir, split, discretizer. Raises UsageError."""
    parser = Parser("store")
    parser.add_argument("action", nargs="?", default="")
    parser.add_argument("folders", nargs="*", default=[])
    parser.add_argument("-o", "--output", default="")
    for flag in ("--data-dir", "--discretizer"):
        parser.add_argument(flag, default="")
    parser.add_argument("--split", default="train")
    parser.add_number("--num", default=24)
    parser.add_number("--view", default=0, least=0)
    given = parser.parse(arguments)
    if given.action not in ACTIONS:
        what = (
            f"unknown action {given.action}{nearest(given.action, ACTIONS)}"
            if given.action
            else "nothing to do"
        )
        raise UsageError(
            f"{what}: write dad-fast store {'|'.join(ACTIONS)} STORE (see dad-fast store -h)"
        )
    if not given.folders:
        raise UsageError(f"name the store's folder: dad-fast store {given.action} STORE")
    if given.action == "merge" and not given.output:
        raise UsageError("name the folder of the whole store: -o STORE")
    if given.action != "merge" and len(given.folders) > 1:
        raise UsageError(f"one store at a time, not {len(given.folders)}")
    return given
