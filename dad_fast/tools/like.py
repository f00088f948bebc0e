"""`dad-fast eval --like RUN`: public models that beat the results of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dad_fast.config.options import EvalLaunch
from dad_fast.errors import UsageError
from dad_fast.evaluation import public_models
from dad_fast.files import atomic_write_json
from dad_fast.tools.evaluate_checks import check_outputs


def run(launch: EvalLaunch, flags: Mapping[str, Any]) -> int:
    """Print them, and write them with --json. Evaluates nothing.

    Raises UsageError for other flags, DataError for a run without comparable results.
    """
    alone = EvalLaunch(like=launch.like, json=launch.json, arguments=launch.arguments)
    if flags or launch != alone:
        raise UsageError("--like compares results that exist: leave the other flags out")
    check_outputs(launch)
    found = public_models.read_run(launch.like)
    if launch.json:
        better = [asdict(model) for model in public_models.better_models(found)]
        about = public_models.table().about
        atomic_write_json(launch.json, {"run": asdict(found), "better": better, "source": about})
    for line in public_models.better_lines(found):
        print(line)
    return 0
