"""Markdown tables from benchmark records of a GPU or a CPU.

scripts/gpu_report.py RECORD.json [...]   prints a table per comparison
scripts/gpu_report.py --update FILE.md    renews the text between <!-- records: FOLDER/GROUP.json
                                          --> and <!-- end records --> (path relative to the file)
scripts/gpu_report.py --check --update FILE.md   only reports whether the text is up to date

Numbers in documents come from committed records by this script. Needs no packages.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import COLUMNS, Record, read_record, shown_columns, table

BLOCK = re.compile(r"(<!-- records: (\S+) -->\n).*?(<!-- end records -->)", re.DOTALL)
# Columns of CPU records; rates of a CPU are of no use to readers.
ON_A_CPU = {"", "ms", "ratio", "quartiles", "predicted", "n"}


def peak_tflops(record: Record, path: Path) -> float | None:
    """Return the rate of a plain matrix product on that machine, from the stages record in the same
    folder.
    """
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
    """Return one line: size, machine, versions, commit, date, load of the machine."""
    machine = record["machine"]
    device = machine["device"]
    if device["kind"] == "cpu":
        where = f"{device['cpu']}, threads: {device['threads']}"
    else:
        where = f"{device['name']}, driver {device.get('driver', 'unknown')}"
        state = machine["end"]
        if {"sm_mhz", "power_w"} <= state.keys():
            where += f", {state['sm_mhz']} MHz and {state['power_w']:.0f} W at the end"
    commit = (machine["commit"] or "unknown")[:9]
    if machine["dirty"]:
        commit += " with uncommitted changes"
    packages = ", ".join(
        f"{name} {machine['packages'][name]}"
        for name in ("torch", "triton", "timm")
        if name in machine["packages"]
    )
    others = machine["cpu_share_of_others"]
    busy = f"; other processes took {others:.0%} of the cores' time" if others is not None else ""
    return f"Size {record['size']}, {where}; {packages}; commit {commit}, {record['taken'][:10]}{busy}. Record: [{path.name}]({label})"


def markdown(record: Record, path: Path, label: str) -> str:
    """Return the tables of a record. `label`: its path relative to the document."""
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
    """Return `text` with every block filled from its record.

    Raises ValueError for an unreadable record.
    """

    def fill(block: re.Match[str]) -> str:
        path = document.parent / block[2]
        return f"{block[1]}\n{markdown(read_record(path), path, block[2])}\n\n{block[3]}"

    return BLOCK.sub(fill, text)


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
                state = "up to date" if new == old else "differs from its records; run --update"
                print(f"{given.update}: {state}")
                return int(new != old)
            given.update.write_text(new, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
