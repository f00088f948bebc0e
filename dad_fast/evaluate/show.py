"""The results of `dad-fast eval` as lines for people and as a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dad_fast.evaluate.metrics.ood_detection import METRICS as DETECTION
from dad_fast.evaluate.metrics.result import Result
from dad_fast.files import atomic_write_text

HEADER = f"{'suite':<24} {'images':>8} {'top-1 %':>7} {'95 %':>13} {'top-5 %':>7} {'ECE %':>6} {'NLL':>7} {'Brier':>6} {'agree %':>7}"
COLUMNS = (
    *(
        "num_images",
        "skipped",
        "top1",
        "top1_low",
        "top1_high",
        "top5",
        "ece",
        "ece_low",
        "ece_high",
        "ece_adaptive",
    ),
    *(
        "nll",
        "nll_low",
        "nll_high",
        "brier",
        "brier_low",
        "brier_high",
        "agreement",
        "mce",
        "mce_low",
        "mce_high",
    ),
    *("effective_robustness", "protocol"),
)


def row(result: Result) -> str:
    low, high = result.top1_interval or (float("nan"), float("nan"))
    numbers = f"{result.num_images:>8} {result.top1:>7.1f} {f'{low:.1f} – {high:.1f}':>13} {_number(result.top5, 1):>7}"
    numbers += f" {result.ece:>6.1f} {result.nll:>7.3f} {_number(result.brier, 3):>6} {_number(result.agreement, 1):>7}"
    return f"{result.name:<24} {numbers}"


def notes(results: Mapping[str, Result]) -> list[str]:
    """What stands below the table: how images became pixels, which outputs competed, what is missing; the mCE."""
    lines = []
    by_protocol: dict[str, list[str]] = {}
    for name, result in results.items():
        by_protocol.setdefault(result.protocol, []).append(name)
    for protocol, names in by_protocol.items():
        lines.append(f"{', '.join(names)}: {protocol}")
    for name, result in results.items():
        if result.skipped:
            lines.append(f"{name}: {result.skipped:,} unreadable images left out")
        if result.mce is not None and result.mce_interval is not None:
            lines.append(
                f"{name}: mCE {result.mce:.1f} ({result.mce_interval[0]:.1f} – {result.mce_interval[1]:.1f}), relative to AlexNet"
            )
        elif result.by_corruption:
            lines.append(
                f"{name}: no mCE, which takes 15 corruptions of five severities and ImageNet's 1000 classes"
            )
    return lines


def detection_lines(
    id_suite: str, ood: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[str]:
    lines = [
        f"{f'unknown, against {id_suite}':<40} {'score':<12}"
        + "".join(f" {name.upper().replace('_', '-'):>9}" for name in DETECTION)
    ]
    for name, scores in ood.items():
        lines += [
            f"{name:<40} {score:<12}" + "".join(f" {found[metric]:>9.1f}" for metric in DETECTION)
            for score, found in scores.items()
        ]
    return lines


def robustness_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Effective robustness by suite, with the line that it is measured from."""
    return [
        f"{suite}: effective robustness {_number(one['effective'], 1)} points "
        f"(baselines of its {one['id']} accuracy have {_number(one['expected'], 1)} %; "
        f"line through {one['num_baselines']}, R² {one['r2']:.2f})"
        for suite, one in found.items()
    ]


def comparison_lines(names: tuple[str, str], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"A = {names[0]}", f"B = {names[1]}", ""]
    lines.append(
        f"{'suite':<24} {'images':>8} {'A %':>6} {'B %':>6} {'A - B':>6} {'95 %':>15} {'only A':>7} {'only B':>7} {'p':>9}"
    )
    for suite, one in found.items():
        (a, b), (low, high) = one["top1"], one["interval"]
        p = "–" if one["p_value"] is None else f"{one['p_value']:.2g}"
        lines.append(
            f"{suite:<24} {one['num_images']:>8} {a:>6.1f} {b:>6.1f} {one['difference']:>+6.1f} {f'{low:+.1f} – {high:+.1f}':>15} "
            f"{one['only_first']:>7} {one['only_second']:>7} {p:>9}"
        )
    lines.append(
        "95 %: paired bootstrap over images. p: McNemar's exact test, two-sided; none over several corruptions of an image."
    )
    return lines


def write_csv(path: str | Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each model and suite. models: by name what the record holds of each."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "suite", *COLUMNS))
    for model, found in models.items():
        for suite, one in found["suites"].items():
            low_high = {
                f"{metric}_{end}": (one.get(f"{metric}_interval") or ("", ""))[i]
                for metric in ("top1", "ece", "nll", "brier", "mce")
                for i, end in enumerate(("low", "high"))
            }
            beyond = found.get("effective_robustness", {}).get(suite, {}).get("effective")
            values = {**one, **low_high, "effective_robustness": beyond}
            writer.writerow(
                (
                    model,
                    suite,
                    *("" if values.get(name) is None else values[name] for name in COLUMNS),
                )
            )
    atomic_write_text(path, text.getvalue())


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
