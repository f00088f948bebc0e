"""results.json, table.md and plot.svg of a sweep, from the records of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dad_fast.config import to_toml
from dad_fast.evaluation.tables import markdown, print_table, read_record
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.stores import store_seconds
from dad_fast.report.page import write_report
from dad_fast.sweep.ablation_tables import ablation_markdown, print_ablation, summary
from dad_fast.sweep.forest import forest_plot
from dad_fast.sweep.runs import Sweep

# Facts of the first run's run.json that the table names.
ENVIRONMENT = (
    "python",
    "platform",
    "cpu",
    "cpus",
    "packages",
    "git",
    "threads",
    "cuda",
    "cudnn",
    "gpus",
    "driver",
    "side_by_side",
)


def write_tables(sweep: Sweep, failed: Mapping[str, str], num_processes: int = 1) -> None:
    """Write the tables of the runs that are done.

    failed: run or store -> reason
    num_processes: of each run
    """
    records = {run.folder: run.record(num_processes) for run in sweep.runs}
    done = [run for run in sweep.runs if records[run.folder] is not None]
    if not done:
        return
    runs = [{**(records[run.folder] or {}), "variant": run.variant} for run in done]
    facts = json.loads((done[0].folder / "run.json").read_text())
    stores = [
        {"kind": store.kind, "views": store.launch.views, "seconds": store_seconds(store.folder)}
        for store in sweep.stores
    ]
    whole: dict[str, Any] = {
        "config": to_toml(sweep.config),
        "environment": {name: facts[name] for name in ENVIRONMENT if name in facts},
        "runs": runs,
        "stores": stores,
        "failed": dict(failed),
    }
    plan, output = sweep.ablation, sweep.output
    if plan:
        whole["ablation"] = {
            "base": plan.base,
            "axes": plan.axes,
            "stores": list(dict.fromkeys(store.kind for store in sweep.stores)),
            "failed": dict(failed),
            "cells": summary(whole, plan.base),
        }
        table = ablation_markdown(whole)
        atomic_write_text(output / "plot.svg", forest_plot(whole))
    else:
        table = markdown(whole) + "\n\n" + markdown(whole, "ece") + "\n"
    atomic_write_json(output / "results.json", whole)
    atomic_write_text(output / "table.md", table)


def show_tables(sweep: Sweep) -> None:
    """Print the table of a sweep's results.json and write report.html."""
    output = sweep.output
    record = read_record(output / "results.json")
    if sweep.ablation:
        print_ablation(record)
    else:
        print_table(record)
    write_report(output)
    plot = "plot.svg, " if sweep.ablation else ""
    print_line(
        f"{output}: table.md, {plot}report.html, results.json, and a folder for each run, such as "
        f"{sweep.runs[0].folder}"
    )
