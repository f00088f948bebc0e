"""Tables and a plot of the record of benchmarks/test_nearest_code.py.

    python -m benchmarks.search_report RECORD.json [--document FILE.md]

Renews the text between <!-- codebook search --> and <!-- end codebook search --> in the document,
and FILE.svg in the same folder.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import Record, number, read_record

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- codebook search -->\n).*?(<!-- end codebook search -->)", re.DOTALL)
# Comparisons named "K = ..." vary the codebook's size, "N = ..." the number of latents.
SWEEPS = {"K": "num_codes", "N": "num_latents"}


def nanoseconds(comparison: Record, row: Record) -> float:
    return row["ms"]["median"] * 1e6 / comparison["work"]


def table(comparison: Record) -> list[str]:
    config = comparison["config"]
    lines = [
        f"| {comparison['name']} | ns a query | quartiles | × {comparison['baseline']} | quartiles | wrong codes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(comparison["rows"], key=lambda row: -row["ms"]["median"]):
        scale = 1e6 / comparison["work"]
        ms, ratio = row["ms"], row["ratio"]
        times = f"{number(ms['median'] * scale)} | {number(ms['q1'] * scale)}–{number(ms['q3'] * scale)}"
        ratios = f"{number(ratio['median'])} | {number(ratio['q1'])}–{number(ratio['q3'])}"
        lines.append(
            f"| {row['name']} | {times} | {ratios} | {row['note'].removesuffix(' wrong')} |"
        )
    built = ""
    if "grid_bytes" in config:
        seconds, megabytes = config["grid_build_seconds"], config["grid_bytes"] / 1e6
        built = f" The grid: built in {seconds} s, {megabytes:.1f} MB."
    checked = config["wrong_codes_are_of_the_first"]
    lines += [
        "",
        f"{config['num_latents']} latents, {config['num_codes']} codes, D = {config['dim']}; wrong among the first {checked}.{built}",
        "",
    ]
    return lines


def is_sweep(comparison: Record) -> bool:
    return comparison["name"].partition(" = ")[0] in SWEEPS


def caption(record: Record, path: Path) -> str:
    machine = record["machine"]
    device = machine["device"]
    on_cpu = device["kind"] == "cpu"
    where = f"{device['cpu']}, threads: {device['threads']}" if on_cpu else device["name"]
    others = machine["cpu_share_of_others"]
    busy = f"; other processes took {others:.0%} of the cores' time" if others is not None else ""
    versions = f"torch {machine['packages']['torch']}, commit {(machine['commit'] or 'unknown')[:9]}, {record['taken'][:10]}"
    return f"{where}, {versions}{busy}. Record: [{path.name}](../benchmarks/results/{path.parent.name}/{path.name})."


def markdown(record: Record, path: Path) -> str:
    lines = [caption(record, path), ""]
    for comparison in record["comparisons"]:
        if not is_sweep(comparison):
            lines += table(comparison)
    return "\n".join(lines)


def plot(record: Record, path: Path) -> None:
    """Plot ns a query against K (left) and N (right), both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "codebook search"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (letter, key) in zip(axes, SWEEPS.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for comparison in record["comparisons"]:
            if comparison["name"].startswith(f"{letter} = "):
                for row in comparison["rows"]:
                    name = re.sub(r" in chunks.*", ", best chunk", row["name"])
                    lines.setdefault(name, []).append(
                        (comparison["config"][key], nanoseconds(comparison, row))
                    )
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel={"K": "codes K", "N": "latents N"}[letter])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ns a query, D = 4")
    if axes[0].lines:
        axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--document", type=Path, help="Markdown file to renew; without it the tables are printed"
    )
    options = parser.parse_args(arguments)
    record = read_record(options.record)
    text = markdown(record, options.record)
    if options.document is None:
        print(text)
        return
    document = options.document.read_text()
    if not BLOCK.search(document):
        parser.error(
            f"{options.document}: no <!-- codebook search --> ... <!-- end codebook search -->"
        )
    options.document.write_text(BLOCK.sub(lambda match: match[1] + text + match[2], document))
    plot(record, options.document.with_suffix(".svg"))


if __name__ == "__main__":
    main()
