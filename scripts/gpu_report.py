"""Markdown tables from benchmark records of a GPU or a CPU, and targets for one H200.

scripts/gpu_report.py RECORD.json [...]   prints a table per comparison
scripts/gpu_report.py --targets DIR       prints the targets next to what records in DIR have
scripts/gpu_report.py --update FILE.md    renews the text between <!-- records: FOLDER/GROUP.json
                                          --> and <!-- end records --> (path relative to the file)
scripts/gpu_report.py --check --update FILE.md   only reports whether the text is up to date

Numbers in documents come from committed records by this script. Needs no packages.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import COLUMNS, Record, number, read_record, remarks, shown_columns, table

BLOCK = re.compile(r"(<!-- records: (\S+) -->\n).*?(<!-- end records -->)", re.DOTALL)
# Columns of CPU records; rates of a CPU are of no use to readers.
ON_A_CPU = {"", "ms", "ratio", "quartiles", "predicted", "n"}


def peak_tflops(record: Record, path: Path) -> float | None:
    """Return the rate of a plain matrix product on that machine, by the record of the ceilings in
    the same folder (in older records, by that of the stages).
    """
    found = [record]
    for name in ("ceilings.json", "stages.json"):
        try:
            found.append(read_record(path.parent / name))
        except ValueError:
            continue
    for one in found:
        for comparison in one["comparisons"]:
            if comparison["name"] == "matrix product":
                return comparison["rows"][0].get("tflops")
    return None


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
        below = [f"ratio to `{comparison['baseline']}`."] if len(rows) > 1 else []
        if below := [*below, *remarks(comparison)]:
            parts.append("\n".join(below))
    return "\n\n".join(parts)


def renewed(text: str, document: Path) -> str:
    """Return `text` with every block filled from its record.

    Raises ValueError for an unreadable record.
    """

    def fill(block: re.Match[str]) -> str:
        path = document.parent / block[2]
        return f"{block[1]}\n{markdown(read_record(path), path, block[2])}\n\n{block[3]}"

    return BLOCK.sub(fill, text)


# --- targets for one H200 at size paper ---

PAPER = "dad, paper's order"
AUTHORS = "dad, authors' order"
IMAGENET = 1_281_167  # images
# Stages of a step of DAD in the paper's order, and their number per step.
STAGES = {
    "teacher forward": 2,
    "teacher forward + input gradient": 1,
    "attack arithmetic": 1,
    "encode": 1,
    "lookup": 1,
    "decode": 1,
    "student forward + backward": 2,
    "optimizer, EMA": 1,
}
# Value of (group, comparison, row, key); raises KeyError where no record has it.
Lookup = Callable[[str, str, str, str], float]


class Target(NamedTuple):
    name: str
    limit: float
    unit: str  # "img/s" is at least the limit, any other at most, but for "x faster"
    measure: Callable[[Lookup], float]


def of(group: str, comparison: str, row: str, key: str) -> Callable[[Lookup], float]:
    return lambda found: found(group, comparison, row, key)


def stage_rate(stage: str) -> Callable[[Lookup], float]:
    return of("stages", "batch 256", stage, "per_second")


def over_stages(found: Lookup) -> float:
    sum_of_stages = sum(n * found("stages", "batch 256", name, "ms") for name, n in STAGES.items())
    return found("steps", "batch 256, plain and graphs", f"{PAPER}, graphs", "ms") / sum_of_stages


def graphs_gain(found: Lookup) -> float:
    comparison = "batch 32, plain and graphs"
    plain, graphs = (found("steps", comparison, PAPER + end, "ms") for end in ("", ", graphs"))
    return plain / graphs


STORED = "batch 256"  # the comparison of the group stored: the preset's batch
TARGETS = (
    Target(
        "dad, paper's order, kernels and graphs, ViT-B/16",
        5.3,
        "x",
        of("steps", "batch 256, kernels and graphs", f"{PAPER}, kernels, graphs", "ratio"),
    ),
    Target(
        "the same, images a second",
        315,
        "img/s",
        of("steps", "batch 256, kernels and graphs", f"{PAPER}, kernels, graphs", "per_second"),
    ),
    Target("dad, authors' order, ViT-B/16", 7.5, "x", of("steps", "batch 256", AUTHORS, "ratio")),
    Target(
        "dad, paper's order, ResNet-50",
        6.5,
        "x",
        of("steps", "ResNet-50, batch 256", PAPER, "ratio"),
    ),
    Target(
        "dad, authors' order, ResNet-50",
        9.0,
        "x",
        of("steps", "ResNet-50, batch 256", AUTHORS, "ratio"),
    ),
    Target("step in graphs / sum of its stages, batch 256", 1.02, "x", over_stages),
    Target("graphs against none, batch 32", 1.5, "x faster", graphs_gain),
    Target(
        "stored images, teacher online, per image seen",
        1.03,
        "x",
        lambda found: found("stored", STORED, "dad, stored images", "ratio") / 2,
    ),
    Target(
        "stored images and outputs",
        0.90,
        "x",
        of("stored", STORED, "dad, stored images and outputs", "ratio"),
    ),
    Target(
        "stored codes decoded on the GPU",
        3.5,
        "x",
        of("stored", STORED, "dad, stored codes", "ratio"),
    ),
    Target(
        "ImageNet-1k's adversarial images",
        35,
        "min",
        lambda found: (
            IMAGENET / 60 / found("stored", STORED, "filling: adversarial images", "per_second")
        ),
    ),
    Target("teacher ViT-L/14, forward", 3280, "img/s", stage_rate("teacher forward")),
    Target(
        "teacher ViT-L/14, forward + input gradient",
        1485,
        "img/s",
        stage_rate("teacher forward + input gradient"),
    ),
    Target("VQGAN f8, encode", 2430, "img/s", stage_rate("encode")),
    Target("VQGAN f8, decode", 1400, "img/s", stage_rate("decode")),
    Target(
        "student ViT-B/16, forward + backward",
        4440,
        "img/s",
        stage_rate("student forward + backward"),
    ),
    Target("codebook lookup, 256 images", 0.25, "ms", of("stages", "batch 256", "lookup", "ms")),
    Target(
        "AdamW and EMA, ViT-B/16", 0.85, "ms", of("stages", "batch 256", "optimizer, EMA", "ms")
    ),
)


def read_folder(folder: Path) -> Iterator[Record]:
    """Read every record below `folder`, without files that are none."""
    for path in sorted(folder.glob("**/*.json")):
        try:
            yield read_record(path)
        except ValueError:
            continue


def targets(folder: Path) -> list[str]:
    """Return a line per target, or none without a record of size paper from a GPU."""
    comparisons = {
        (record["group"], comparison["name"]): comparison
        for record in read_folder(folder)
        if record["size"] == "paper" and record["machine"]["device"]["kind"] == "cuda"
        for comparison in record["comparisons"]
    }
    if not comparisons:
        return []

    def found(group: str, comparison: str, name: str, key: str) -> float:
        rows = {row["name"]: row for row in comparisons[group, comparison]["rows"]}
        value = rows[name][key]
        return value["median"] if isinstance(value, dict) else value

    lines = [f"{'target':<50} {'wanted':>13}  measured"]
    for target in TARGETS:
        at_least = target.unit in ("img/s", "x faster")
        try:
            value = target.measure(found)
        except KeyError:
            measured = "-"
        else:
            met = value >= target.limit if at_least else value <= target.limit
            measured = f"{number(value)} {target.unit}, {'met' if met else 'not met'}"
        wanted = f"{'>=' if at_least else '<='} {number(target.limit)} {target.unit}"
        lines.append(f"{target.name:<50} {wanted:>13}  {measured}")
    return lines


def measured(folder: Path) -> list[str]:
    """Return a line per measured function below `folder`: time, ratio, rate."""
    lines = []
    for record in read_folder(folder):
        for comparison in record["comparisons"]:
            lines.append(f"{record['group']}: {comparison['name']}")
            for row in comparison["rows"]:
                values = [f"{number(row['ms']['median'])} ms", f"{row['ratio']['median']:.2f}x"]
                values.append(f"{number(row['per_second'])} {comparison['unit']}/s")
                if "tflops" in row:
                    values.append(f"{number(row['tflops'])} TFLOP/s")
                lines.append(f"  {row['name']}: {', '.join(values)}")
            lines += [f"  {line}" for line in remarks(comparison)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--update", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--targets", type=Path, metavar="DIR")
    given = parser.parse_args(arguments)
    if sum(map(bool, (given.records, given.update, given.targets))) != 1:
        parser.error("name records, a file with --update, or a folder with --targets")
    try:
        for path in given.records:
            print(markdown(read_record(path), path, str(path)) + "\n")
        if given.targets:
            nothing = f"no record of size paper from a GPU in {given.targets}"
            print("\n".join(targets(given.targets) or [nothing]))
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
