"""Results of `dad-fast eval` as lines of text and as a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.evaluation.columns import Layout
from dad_fast.evaluation.metrics.ood_detection import METRICS as DETECTION
from dad_fast.evaluation.metrics.result import Result
from dad_fast.files import atomic_write_text

# Classes shown by `class_lines`.
MOST_CLASSES = 20
AGREEMENT = "agree %"
# Columns of the results, and those that a narrow terminal lacks, the first one first.
WIDTHS = {
    "suite": 24,
    "images": 8,
    "top-1 %": 7,
    "95 %": 13,
    "top-5 %": 7,
    "ECE %": 6,
    "NLL": 7,
    "Brier": 6,
    AGREEMENT: 7,
}
SPARE = ("Brier", "NLL", "top-5 %", "images", "ECE %", AGREEMENT, "95 %")
COMPARED = {
    "suite": 24,
    "images": 8,
    "A %": 6,
    "B %": 6,
    "A - B": 6,
    "95 %": 15,
    "only A": 7,
    "only B": 7,
    "p": 9,
}
SPARE_COMPARED = ("only A", "only B", "images", "p", "A %", "B %")
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


def results_layout(width: int, with_teacher: bool) -> Layout:
    """Return the columns of the results that fit `width`; only a teacher gives an agreement."""
    widths = {title: size for title, size in WIDTHS.items() if with_teacher or title != AGREEMENT}
    return Layout(widths, [title for title in SPARE if title in widths], width)


def row(result: Result, layout: Layout) -> str:
    """Format a result as a row of `layout`."""
    low, high = result.top1_interval or (float("nan"), float("nan"))
    return layout.line(
        {
            "suite": result.name,
            "images": str(result.num_images),
            "top-1 %": f"{result.top1:.1f}",
            "95 %": f"{low:.1f} – {high:.1f}",
            "top-5 %": _number(result.top5, 1),
            "ECE %": f"{result.ece:.1f}",
            "NLL": f"{result.nll:.3f}",
            "Brier": _number(result.brier, 3),
            AGREEMENT: _number(result.agreement, 1),
        }
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
    id_suite: str, ood: Mapping[str, Mapping[str, Mapping[str, float]]], width: int
) -> list[str]:
    """Format the detection metrics in `width` columns: a row per set of unknown images and score."""
    title = f"unknown, against {id_suite}"
    headings = [name.upper().replace("_", "-") for name in DETECTION]
    widths = {title: 40, "score": 12, **dict.fromkeys(headings, 9)}
    layout = Layout(widths, headings[:0:-1], width)
    lines = [layout.header()]
    for name, scores in ood.items():
        for score, found in scores.items():
            numbers = (f"{found[metric]:.1f}" for metric in DETECTION)
            cells = {title: name, "score": score, **dict(zip(headings, numbers, strict=True))}
            lines.append(layout.line(cells))
    return [*lines, layout.note()] if layout.left_out else lines


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


def comparison_lines(
    names: tuple[str, str], found: Mapping[str, Mapping[str, Any]], width: int
) -> list[str]:
    """Format the paired comparison of two models in `width` columns: a row per suite."""
    layout = Layout(COMPARED, SPARE_COMPARED, width)
    lines = [f"A = {names[0]}", f"B = {names[1]}", "", layout.header()]
    for suite, one in found.items():
        a, b = one["top1"]
        low, high = one["interval"]
        cells = {
            "suite": suite,
            "images": str(one["num_images"]),
            "A %": f"{a:.1f}",
            "B %": f"{b:.1f}",
            "A - B": f"{one['difference']:+.1f}",
            "95 %": f"{low:+.1f} – {high:+.1f}",
            "only A": str(one["only_first"]),
            "only B": str(one["only_second"]),
            "p": "–" if one["p_value"] is None else f"{one['p_value']:.2g}",
        }
        lines.append(layout.line(cells))
    if layout.left_out:
        lines.append(layout.note())
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
