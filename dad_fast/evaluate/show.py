"""Results of `dad-fast eval` as lines of text and as a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.evaluate.metrics.ood_detection import METRICS as DETECTION
from dad_fast.evaluate.metrics.result import Result
from dad_fast.files import atomic_write_text

# Classes shown by `class_lines`.
MOST_CLASSES = 20
HEADER = (
    f"{'suite':<24} {'images':>8} {'top-1 %':>7} {'95 %':>13} {'top-5 %':>7} "
    f"{'ECE %':>6} {'NLL':>7} {'Brier':>6} {'agree %':>7}"
)
COLUMNS = [
    "num_images",
    "skipped",
    "non_finite",
    "top1",
    "top1_low",
    "top1_high",
    "balanced_accuracy",
    "top5",
    "ece",
    "ece_low",
    "ece_high",
    "ece_adaptive",
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
    "effective_robustness",
    "protocol",
]


def row(result: Result) -> str:
    """Format a result as a row below HEADER."""
    low, high = result.top1_interval or (float("nan"), float("nan"))
    interval = f"{low:.1f} – {high:.1f}"
    return (
        f"{result.name:<24} {result.num_images:>8} {result.top1:>7.1f} {interval:>13} "
        f"{_number(result.top5, 1):>7} {result.ece:>6.1f} {result.nll:>7.3f} "
        f"{_number(result.brier, 3):>6} {_number(result.agreement, 1):>7}"
    )


def notes(results: Mapping[str, Result]) -> list[str]:
    """Return the notes below the table: preprocessing, outputs, missing images, the mCE."""
    lines = []
    by_protocol: dict[str, list[str]] = {}
    for name, result in results.items():
        by_protocol.setdefault(result.protocol, []).append(name)
    for protocol, names in by_protocol.items():
        lines.append(f"{', '.join(names)}: {protocol}")
    for name, result in results.items():
        if result.skipped:
            lines.append(f"{name}: {result.skipped:,} unreadable images left out")
        if warning := non_finite_note(result):
            lines.append(warning)
        if result.mce is not None and result.mce_interval is not None:
            low, high = result.mce_interval
            lines.append(
                f"{name}: mCE {result.mce:.1f} ({low:.1f} – {high:.1f}), relative to AlexNet"
            )
        elif result.by_corruption:
            lines.append(
                f"{name}: no mCE, which needs 15 corruptions of five severities and ImageNet's "
                "1000 classes"
            )
    return lines


def non_finite_note(result: Result) -> str | None:
    """Return a note on images with non-finite logits, or None without any."""
    if not result.non_finite:
        return None
    return (
        f"{result.name}: {result.non_finite:,} of {result.num_images:,} images have non-finite "
        "logits: they count as wrong, and are left out of ECE, NLL and Brier score"
    )


def class_lines(results: Mapping[str, Result], names: Sequence[str]) -> list[str]:
    """Format the balanced accuracy, and the accuracy of each class from the lowest on.

    names: of the classes, in their order. Of many classes, the MOST_CLASSES lowest are shown.
    """
    lines = []
    for suite, result in results.items():
        found = [
            (accuracy, name)
            for accuracy, name in zip(result.per_class or (), names, strict=False)
            if accuracy is not None
        ]
        shown = sorted(found, key=lambda item: item[0])[:MOST_CLASSES]
        more = f", the {len(shown)} lowest" if len(shown) < len(found) else ""
        lines.append(
            f"{suite}: balanced accuracy {_number(result.balanced_accuracy, 1)} %, "
            f"top-1 % of its {len(found):,} classes{more}:"
        )
        lines += [f"  {accuracy:>6.1f}  {name}" for accuracy, name in shown]
    return lines


def detection_lines(
    id_suite: str, ood: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[str]:
    """Format the detection metrics: a row per set of unknown images and score."""
    title = f"unknown, against {id_suite}"
    headings = [name.upper().replace("_", "-") for name in DETECTION]
    lines = [f"{title:<40} {'score':<12}" + "".join(f" {text:>9}" for text in headings)]
    for name, scores in ood.items():
        for score, found in scores.items():
            numbers = "".join(f" {found[metric]:>9.1f}" for metric in DETECTION)
            lines.append(f"{name:<40} {score:<12}{numbers}")
    return lines


def calibration_lines(facts: Mapping[str, Any]) -> list[str]:
    """Format ECE and NLL before and after calibration."""
    before, after = facts["nll"]
    lines = [
        f"temperature {facts['temperature']:.4g}, fitted on {facts['num_images']:,} images of "
        f"{facts['split']} (NLL {before:.3f} before, {after:.3f} after)",
        f"{'ECE %':<24} {'before':>7} {'after':>7}",
    ]
    for suite, (old, new) in facts["ece"].items():
        fitted = "  (fitted on it)" if suite == facts["split"] else ""
        lines.append(f"{suite:<24} {old:>7.1f} {new:>7.1f}{fitted}")
    return lines


def robustness_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format effective robustness by suite, with the baselines' line."""
    return [
        f"{suite}: effective robustness {_number(one['effective'], 1)} points "
        f"(baselines with its {one['id']} accuracy reach {_number(one['expected'], 1)} %; "
        f"line through {one['num_baselines']}, R² {one['r2']:.2f})"
        for suite, one in found.items()
    ]


def comparison_lines(names: tuple[str, str], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the paired comparison of two models: a row per suite."""
    lines = [f"A = {names[0]}", f"B = {names[1]}", ""]
    lines.append(
        f"{'suite':<24} {'images':>8} {'A %':>6} {'B %':>6} {'A - B':>6} {'95 %':>15} "
        f"{'only A':>7} {'only B':>7} {'p':>9}"
    )
    for suite, one in found.items():
        a, b = one["top1"]
        low, high = one["interval"]
        interval = f"{low:+.1f} – {high:+.1f}"
        p = "–" if one["p_value"] is None else f"{one['p_value']:.2g}"
        lines.append(
            f"{suite:<24} {one['num_images']:>8} {a:>6.1f} {b:>6.1f} {one['difference']:>+6.1f} "
            f"{interval:>15} {one['only_first']:>7} {one['only_second']:>7} {p:>9}"
        )
    lines += [
        f"{suite}: {one['non_finite']:,} images with non-finite logits are wrong in A - B, and left "
        "out of the differences of NLL and Brier score"
        for suite, one in found.items()
        if one["non_finite"]
    ]
    lines.append(
        "95 %: paired bootstrap over images. p: McNemar's exact test, two-sided; none over several "
        "corruptions of an image."
    )
    return lines


def write_csv(path: str | Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a row per model and suite. models: the JSON record of each, by name."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "suite", *COLUMNS))
    for model, found in models.items():
        for suite, one in found["suites"].items():
            values = dict(one)
            for metric in ("top1", "ece", "nll", "brier", "mce"):
                low, high = one.get(f"{metric}_interval") or ("", "")
                values |= {f"{metric}_low": low, f"{metric}_high": high}
            robustness = found.get("effective_robustness", {}).get(suite, {})
            values["effective_robustness"] = robustness.get("effective")
            cells = ["" if values.get(name) is None else values[name] for name in COLUMNS]
            writer.writerow((model, suite, *cells))
    atomic_write_text(path, text.getvalue())


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
