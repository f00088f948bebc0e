"""Markdown tables from benchmark records, of a GPU or a CPU.

scripts/gpu_report.py RECORD.json [...]      prints a table per comparison
scripts/gpu_report.py --update FILE.md       renews what stands between <!-- records: FOLDER/GROUP.json --> and <!-- end records -->,
                                             the record's path being relative to the file; --check only says whether it is as it should be
A number in a document comes from a committed record: this is how it gets there. Needs no packages.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import COLUMNS, Record, read_record, shown_columns, table

BLOCK = re.compile(r"(<!-- records: (\S+) -->\n).*?(<!-- end records -->)", re.DOTALL)
ON_A_CPU = {
    "",
    "ms",
    "ratio",
    "quartiles",
    "predicted",
    "n",
}  # rates of a CPU say nothing that a reader needs


def peak_tflops(record: Record, path: Path) -> float | None:
    """What a plain matrix product reached on that machine, from the record of the stages beside this one."""
    try:
        stages = record if record["group"] == "stages" else read_record(path.parent / "stages.json")
    except ValueError:
        return None
    rows = [
        row
        for comparison in stages["comparisons"]
        if comparison["name"] == "matrix product"
        for row in comparison["rows"]
    ]
    return rows[0].get("tflops") if rows else None


def caption(record: Record, path: Path, label: str) -> str:
    """One line: size, machine, versions, commit, date, how busy the machine was."""
    machine = record["machine"]
    device = machine["device"]
    if device["kind"] == "cpu":
        where = f"{device['cpu']}, threads: {device['threads']}"
    else:
        where = f"{device['name']}, driver {device.get('driver', 'unknown')}"
        state = machine["end"]
        where += (
            f", {state['sm_mhz']} MHz and {state['power_w']:.0f} W at the end"
            if {"sm_mhz", "power_w"} <= state.keys()
            else ""
        )
    commit = (machine["commit"] or "unknown")[:9] + (
        " with uncommitted changes" if machine["dirty"] else ""
    )
    packages = ", ".join(
        f"{name} {machine['packages'][name]}"
        for name in ("torch", "triton", "timm")
        if name in machine["packages"]
    )
    others = machine["cpu_share_of_others"]
    busy = f"; other processes took {others:.0%} of the cores' time" if others is not None else ""
    return f"Size {record['size']}, {where}; {packages}; commit {commit}, {record['taken'][:10]}{busy}. Record: [{path.name}]({label})"


def markdown(record: Record, path: Path, label: str) -> str:
    """The tables of a record. `label` is its path as a reader of the document follows it."""
    on_cpu = record["machine"]["device"]["kind"] == "cpu"
    peak = peak_tflops(record, path)
    parts = [caption(record, path, label)]
    for comparison in record["comparisons"]:
        rows = table(comparison)
        keep = [i for i in shown_columns(rows) if not on_cpu or COLUMNS[i] in ON_A_CPU]
        heads = [COLUMNS[i] or comparison["name"] for i in keep]
        share = (
            peak is not None and not on_cpu and any("tflops" in row for row in comparison["rows"])
        )
        lines = [[*heads, *(["of a matrix product"] if share else [])]]
        lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
        for cells, row in zip(rows, comparison["rows"], strict=True):
            reached = f"{row['tflops'] / peak:.0%}" if peak and "tflops" in row else ""
            lines.append([*(cells[i] for i in keep), *([reached] if share else [])])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        if len(rows) > 1:
            parts.append(f"ratio to `{comparison['baseline']}`.")
    return "\n\n".join(parts)


def renewed(text: str, document: Path) -> str:
    """`text` with every block filled from its record. ValueError, in one line, for a record that cannot be read."""
    return BLOCK.sub(
        lambda m: (
            f"{m[1]}\n{markdown(read_record(document.parent / m[2]), document.parent / m[2], m[2])}\n\n{m[3]}"
        ),
        text,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--update", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    if bool(given.records) == bool(given.update):
        parser.error("name records, or a file with --update")
    try:
        for path in given.records:
            print(markdown(read_record(path), path, str(path)) + "\n")
        if given.update:
            old = given.update.read_text(encoding="utf-8")
            new = renewed(old, given.update)
            if given.check:
                print(
                    f"{given.update}: {'as its records say' if new == old else 'not as its records say; run --update'}"
                )
                return int(new != old)
            given.update.write_text(new, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
