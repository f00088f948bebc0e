"""How a run is started, as opposed to what it computes: nothing here changes a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    output: str  # the run's folder
    resume: str = ""  # "" = start; "auto" = continue what is in `output`, or start; otherwise a checkpoint folder
    overwrite: bool = False  # replace an existing run
    allow_config_change: bool = False  # continue although a setting that changes the result is another one
    debug: bool = False  # show tracebacks
    preset: str = ""  # the preset's name, for the record
