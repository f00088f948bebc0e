"""Desk model of the flagship's step on an H200: FLOP, bytes and milliseconds by stage.

    python scripts/desk_model.py --write     # docs/records/desk-model.json and the tables of docs/performance.md

Nothing here runs on a GPU. Every operation of a step of `--preset dad-vitb16` at its real size is
recorded on fake tensors (dad_fast/tools/dry_run/trace.py) and timed by the rates of rates.toml: the
slower of arithmetic and memory for each operation, one after the other.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "records" / "desk-model.json"
PAGE = ROOT / "docs" / "performance.md"
GPU = "H200"
# TB/s of copies between NCHW and NHWC: a transpose that is far from, and one at, the rate of passes
LAYOUT_RANGE = (1.0, 3.87)
EAGER = {"engine.torchcompile": False}
PLAIN = {"engine.kernels": "off"}
# name -> (settings, assumption about them)
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": (
        {**PLAIN, **EAGER, "precision.amp": False},
        "no autocast and no TF32",
    ),
    "bf16": ({**PLAIN, **EAGER}, "autocast, torch's group norm and attention"),
    "bf16, kernels": (
        EAGER,
        "the Triton norms stay in NHWC, so attention takes a fused kernel; PGD and loss fused",
    ),
    "bf16, compiled": (
        PLAIN,
        "teacher and student compiled: the passes between two matrix products are one kernel",
    ),
    "bf16, kernels, compiled": ({}, "both, as the preset runs by default"),
}


def make_record() -> dict[str, Any]:
    """Trace and time every form."""
    from dad_fast.config.fields import with_values
    from dad_fast.config.resolve import gather
    from dad_fast.config.variants import with_batch_sizes
    from dad_fast.tools.dry_run.assumptions import with_assumptions
    from dad_fast.tools.dry_run.estimate import estimate
    from dad_fast.tools.dry_run.rates import read_rates

    (rates,) = (rates for rates in read_rates() if rates.name == GPU)
    flagship = with_assumptions(gather("dad-vitb16", None, [], {}))
    forms = {}
    traced: dict[str, Any] = {}
    for name, (settings, assumption) in FORMS.items():
        cfg = with_values(flagship, settings)
        # Compilation changes the model of time and not the trace.
        key = repr(with_values(cfg, {"engine.torchcompile": False}))
        if key not in traced:
            traced[key] = estimate(cfg, 1)
        found = replace(traced[key], cfg=with_batch_sizes(cfg, 1))
        stages = {}
        for stage in found.stages():
            each = found.stage_cost(stage, rates)
            stages[stage.name] = {
                "TFLOP": round(each.flop / 1e12, 1),
                "passes_GB": round(each.passed / 1e9, 1),
                "layout_GB": round(each.layout / 1e9, 1),
                "ms": round(each.milliseconds, 1),
                "peak_GiB": round(stage.peak / 2**30, 1),
            }
        spread = [replace(rates, layout=layout) for layout in LAYOUT_RANGE]
        forms[name] = {
            "assumption": assumption,
            "stages": stages,
            "ms": round(found.step_milliseconds(rates), 1),
            "images_per_second": round(found.images_per_second(rates)),
            "images_per_second_range": [round(found.images_per_second(each)) for each in spread],
            "peak_GiB": round(found.step.trace.peak / 2**30, 1),
        }
    return {
        "what": "modelled step of preset dad-vitb16; nothing was measured on a GPU",
        "batch_size": flagship.data.batch_size,
        "rates": asdict(rates),
        "layout_range": list(LAYOUT_RANGE),
        "forms": forms,
    }


def forms_table(record: Mapping[str, Any]) -> str:
    """Return the table of forms as Markdown."""
    lines = [
        "| form | ms a step | images/s | with layout copies at 1.0 to 3.87 TB/s | peak GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, form in record["forms"].items():
        slow, fast = form["images_per_second_range"]
        spread = f"{slow:,} to {fast:,}" if slow != fast else ""
        lines.append(
            f"| {name} | {form['ms']:,.0f} | {form['images_per_second']:,} | {spread} "
            f"| {form['peak_GiB']:.1f} |"
        )
    return "\n".join(lines)


def stages_table(record: Mapping[str, Any], name: str) -> str:
    """Return the stages of a form as Markdown."""
    form = record["forms"][name]
    lines = [
        f"| {name} | TFLOP | passes, GB | layout copies, GB | ms | TFLOP/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = [*form["stages"].items()]
    total = {
        key: sum(stage[key] for _, stage in rows) for key in ("TFLOP", "passes_GB", "layout_GB")
    }
    for label, stage in [*rows, ("step", {**total, "ms": form["ms"]})]:
        reached = f"{stage['TFLOP'] / stage['ms'] * 1e3:,.0f}" if stage["TFLOP"] >= 0.1 else ""
        lines.append(
            f"| {label} | {stage['TFLOP']:.1f} | {stage['passes_GB']:,.0f} "
            f"| {stage['layout_GB']:,.0f} | {stage['ms']:,.0f} | {reached} |"
        )
    return "\n".join(lines)


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of docs/performance.md by their marks."""
    shown = ("bf16, kernels, compiled", "bf16, kernels")
    found = {f"stages: {name}": stages_table(record, name) for name in shown}
    return {"forms": forms_table(record), **found}


def with_tables(page: str, record: Mapping[str, Any]) -> str:
    """Return the page with its tables made from the record."""
    for mark, table in tables(record).items():
        start, end = f"<!-- desk model, {mark} -->\n", "<!-- end -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        page, count = re.subn(pattern, f"{start}\n{table}\n\n{end}", page, flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table {mark!r}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="desk model of the flagship's step on an H200")
    parser.add_argument("--write", action="store_true", help="write the record and the tables")
    write = parser.parse_args().write
    record = make_record()
    if write:
        RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_tables(page, record), encoding="utf-8")
    for table in tables(record).values():
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
