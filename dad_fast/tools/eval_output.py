"""Outputs of `dad-fast eval`: the terminal, and checks of the paths of files."""

from __future__ import annotations

from pathlib import Path

from dad_fast.config.options import EvalLaunch
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import UsageError, discard_output


class Printer:
    """Prints results in the main process.

    A reader that has gone (`| head`) ends the command, unless results are also written to files.
    """

    def __init__(self, launch: EvalLaunch):
        self.writes_files = bool(launch.json or launch.csv or launch.predictions)

    def __call__(self, text: str) -> None:
        if not distributed.is_main():
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            if not self.writes_files:
                raise
            discard_output()


def check_outputs(launch: EvalLaunch) -> None:
    """Check the output paths before any work: their folders exist, and only earlier results are
    replaced.
    """
    for flag, path in (("--json", launch.json), ("--csv", launch.csv)):
        suffix = flag.replace("--", ".")
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise UsageError(f"{flag} {path}: name a file in a folder that exists")
        if path and Path(path).exists() and Path(path).suffix != suffix:
            raise UsageError(
                f"{flag} {path}: exists and does not end in {suffix}, so it is not replaced; name "
                "another file"
            )
    if launch.predictions and Path(launch.predictions).is_file():
        raise UsageError(
            f"--save-predictions {launch.predictions}: is a file; name a folder, which gets a file "
            "for each model"
        )
