"""Make docs/records/lp-clip.json: LP-CLIP on the embedded digits, with two teachers.

One teacher knows the shifts, the other does not.

    # The second teacher, about four minutes of one core; then about fifteen:
    python scripts/make_demo_weights.py --see mnist --teacher-only -o blind
    python scripts/lp_clip_record.py --blind blind/digits-clip.safetensors

Settings, each evaluated over seeds next to the teacher's zero-shot head:

    seen        preset lp-clip-demo: the embedded teacher, trained on both kinds of digits and
                families of the corruptions
    blind       the same with a teacher trained on MNIST alone
    unlabelled  the blind teacher, and a probe trained on images of the other kind (optdigits-train)
                without their labels
    sweep       preset lp-clip-sweep with the blind teacher: strength of the strong view, threshold

`--table` prints the record's tables as markdown and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a bare checkout too

from dad_fast.cli.main import main as dad_fast
from dad_fast.evaluation.tables import spread
from dad_fast.files import atomic_write_text, plain
from dad_fast.loggers.environment import environment
from dad_fast.models.weights.files import sha256_file
from dad_fast.tools.probe import checks as probe_checks

METRICS = ("top1", "top1_interval", "ece", "nll", "brier")
CALIBRATION = {"ece": 1, "nll": 2, "brier": 3}  # digits in the tables; lower is better
SHORT = ["--suite", "test", "optdigits"]
CORRUPTED = ["gaussian_noise:3", "defocus_blur:3", "contrast:3", "invert"]
SETTINGS = {
    "seen": ["--preset", "lp-clip-demo", *SHORT, *CORRUPTED],
    "blind": ["--preset", "lp-clip-demo", "--teacher", "BLIND", *SHORT, *CORRUPTED],
    "unlabelled": [
        "--preset",
        "lp-clip-demo",
        "--teacher",
        "BLIND",
        "--train-split",
        "optdigits-train",
        "--epochs",
        "78",
        *SHORT,
    ],
    "sweep": ["--preset", "lp-clip-sweep", "--teacher", "BLIND", *SHORT],
}


def train(name: str, blind: str, seeds: int, work: Path) -> dict[str, Any]:
    """Run or resume one comparison; return its part of the record."""
    out = work / name
    arguments = ["train", *SETTINGS[name], "--seeds", str(seeds)]
    code = dad_fast(
        [
            *(blind if word == "BLIND" else word for word in arguments),
            "--resume",
            "auto",
            "-o",
            str(out),
        ]
    )
    if code:
        raise SystemExit(code)
    runs = json.loads((out / "results.json").read_text())["runs"]
    return {
        "command": " ".join(
            ["dad-fast", *(Path(blind).name if word == "BLIND" else word for word in arguments)]
        ),
        "teacher_seen": runs[0]["teacher"]["seen"],
        "zero_shot": {
            suite: _kept(result) for suite, result in runs[0]["teacher"]["suites"].items()
        },
        "runs": [
            {"variant": run["variant"], "seed": run["seed"], "seconds": run["seconds"]}
            | {"suites": {suite: _kept(result) for suite, result in run["suites"].items()}}
            for run in runs
        ],
    }


def _kept(result: dict[str, Any]) -> dict[str, Any]:
    return {metric: result[metric] for metric in METRICS}


def check(name: str, seeds: int, work: Path) -> dict[str, Any]:
    """Run the probe checks on the ensemble of a comparison's lp-clip runs."""
    out = work / f"{name}-checks.json"
    code = probe_checks.main(
        [
            *(str(work / name / "lp-clip" / f"seed-{seed}") for seed in range(seeds)),
            "--json",
            str(out),
        ]
    )
    if code:
        raise SystemExit(code)
    record = json.loads(out.read_text())
    return {key: record[key] for key in ("probes", "train", "few_labels", "suites")}


def tables(record: dict[str, Any]) -> str:
    lines = []
    for name, found in record["settings"].items():
        zero_shot, suites = found["zero_shot"], list(found["zero_shot"])
        variants = list(dict.fromkeys(run["variant"] for run in found["runs"]))
        lines += [
            f"### {name}",
            "",
            f"`{found['command']}`",
            "",
            "| top-1 % | " + " | ".join(suites) + " |",
        ]
        lines += [
            "|---" + "|---:" * len(suites) + "|",
            _row("zero-shot", [f"{zero_shot[suite]['top1']:.1f}" for suite in suites]),
        ]
        lines += [
            _row(variant, [_accuracy(found, variant, suite) for suite in suites])
            for variant in variants
        ]
        lines += [
            "",
            "| ECE % / NLL / Brier | " + " | ".join(suites) + " |",
            "|---" + "|---:" * len(suites) + "|",
        ]
        plain = [
            " / ".join(
                f"{zero_shot[suite][metric]:.{digits}f}" for metric, digits in CALIBRATION.items()
            )
            for suite in suites
        ]
        lines += [
            _row("zero-shot", plain),
            *(
                _row(variant, [_calibration(found, variant, s) for s in suites])
                for variant in variants
            ),
            "",
        ]
    for name, checks in record["checks"].items():
        lines += [
            f"### {name}: checks of {checks['probes']} probes",
            "",
            probe_checks.markdown(checks),
            "",
        ]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _values(found: dict[str, Any], variant: str, suite: str, metric: str) -> list[float]:
    return [run["suites"][suite][metric] for run in found["runs"] if run["variant"] == variant]


def _accuracy(found: dict[str, Any], variant: str, suite: str) -> str:
    """Format a mean: bold above the zero-shot head's 95 % interval over images, in brackets below."""
    mean, sd = spread(_values(found, variant, suite, "top1"))
    low, high = found["zero_shot"][suite]["top1_interval"]
    text = f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"
    if mean > high:
        return f"**{text}**"
    return f"({text})" if mean < low else text


def _calibration(found: dict[str, Any], variant: str, suite: str) -> str:
    """Format calibration: bold if better than the zero-shot head by more than two standard
    deviations.
    """
    cells = []
    for metric, digits in CALIBRATION.items():
        mean, sd = spread(_values(found, variant, suite, metric))
        better = found["zero_shot"][suite][metric] - mean > 2 * (sd or 0.0)
        cells.append(f"**{mean:.{digits}f}**" if better else f"{mean:.{digits}f}")
    return " / ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blind", help="weights of the teacher trained on MNIST alone")
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="seeds of each setting; at most two for the sweep, which has many cells",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/lp-clip-record"),
        help="folder of the runs, for --resume auto",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/records/lp-clip.json"))
    parser.add_argument("--table", action="store_true", help="print the tables of the record")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(args.output.read_text())))
        return
    if not args.blind:
        parser.error("--blind: make the teacher first, see above")
    seeds = {name: min(args.seeds, 2) if name == "sweep" else args.seeds for name in SETTINGS}
    settings = {name: train(name, args.blind, seeds[name], args.work) for name in SETTINGS}
    checks = {name: check(name, args.seeds, args.work) for name in ("seen", "blind", "unlabelled")}
    facts = {
        "blind_sha256": sha256_file(args.blind),
        "seeds": args.seeds,
        "environment": environment(),
    }
    record = {**facts, "settings": settings, "checks": checks}
    text = json.dumps(plain(record), separators=(",", ":"), ensure_ascii=False)
    atomic_write_text(args.output, text + "\n")
    print(tables(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
