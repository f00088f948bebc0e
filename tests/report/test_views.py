"""Views of the page: looks, axes, severities, classes, curves and cost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import report_runs as made

from dad_fast.loggers.run_log import RunLog
from dad_fast.report.chart import HEIGHT, PERCENT, Scale, Series, line_chart
from dad_fast.report.classes import MATRIX_BYTES, MAX_ROWS, classes_view
from dad_fast.report.looks import COLORS, color_number, looks
from dad_fast.report.page import page
from dad_fast.report.run_files import Run
from dad_fast.report.runs import Group, load
from dad_fast.report.severity import severity_view
from dad_fast.report.sheet import spread_over_classes


def section(shown: str, heading: str) -> str:
    return shown.split(f"{heading}</h2>")[1].split("</section>")[0]


def rows_of(shown: str, caption: str) -> dict[str, list[str]]:
    """Return the cells of the table with this caption, by the first column."""
    body = re.search(rf"<caption><span>{re.escape(caption)}</span></caption>(.*?)</table>", shown)
    assert body is not None, caption
    found = {}
    for name, cells in re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', body[1]):
        found[name] = re.findall(r"<td[^>]*>(.*?)</td>", cells)
    return found


def record_of(**by_variant: dict) -> dict:
    """Return a record of one suite "test"; values are further keys of its result, or a list."""
    runs = []
    for name, extra in by_variant.items():
        for seed, more in enumerate(extra if isinstance(extra, list) else [extra]):
            record = made.record(name, name, seed, 90.0)
            suites = {"test": made.result(90.0) | more}
            runs.append(record | {"suites": suites, "teacher": None, "classes": ["ant", "bee"]})
    return {"runs": runs}


def groups_of(**methods: str) -> list[Group]:
    return [
        Group(name, Path("x"), [Run(Path(name), settings={"method": method})])
        for name, method in methods.items()
    ]


def test_a_method_has_one_colour_on_every_page():
    every = looks(groups_of(a="dad", b="kd", c="kd", d="other:method"))
    few = looks(groups_of(c="kd", a="dad", d="other:method"))
    assert all(few[name][0] == every[name][0] for name in few)
    assert every["b"][0] == every["c"][0] and every["b"][1] != every["c"][1]
    assert few["c"] == every["b"]
    assert len({color for color, _ in every.values()}) == 3
    assert color_number("other:method") not in COLORS.values()


def test_runs_of_one_method_are_told_apart():
    names = {f"run-{number}": "dad" for number in range(9)}
    assert len(set(looks(groups_of(**names)).values())) == 9


def test_flat_curve_does_not_fill_the_chart():
    wiggle = [(step, 90.0 + 0.1 * (step % 2)) for step in range(10)]
    chart = line_chart("top-1", "%", "step", [Series("kd", "red", wiggle)], PERCENT)
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", chart.split('points="')[1])]
    assert max(heights) - min(heights) < 0.02 * HEIGHT


@pytest.mark.parametrize(
    ("scale", "values", "expected"),
    [
        (PERCENT, [50.0, 51.0], (45.5, 55.5)),
        (PERCENT, [99.9, 99.8], (90.0, 100.0)),
        (PERCENT, [0.2], (0.0, 10.0)),
        (PERCENT, [20.0, 90.0], (20.0, 90.0)),
        (PERCENT, [90.0, 120.0], (90.0, 120.0)),
        (Scale(share=0.5, low=0.0), [1000.0, 1000.0], (750.0, 1250.0)),
        (Scale(), [3.0, 3.0], (3.0, 3.0)),
    ],
)
def test_scale(scale, values, expected):
    assert scale.range(values) == pytest.approx(expected)


def test_severities_of_a_suite_start_at_the_clean_images():
    tops = [{"by_severity": [80.0, 70.0, 60.0]}, {"by_severity": [60.0, 50.0, 40.0]}]
    record = record_of(kd=tops)
    for run in record["runs"]:
        run["suites"] = {"val": made.result(90.0), "fog": run["suites"]["test"]}
    shown = severity_view(record, {"kd": ("red", "")})
    assert rows_of(shown, "Top-1 accuracy by severity, in %") == {
        "fog: kd": ["90.0", "70.0", "60.0", "50.0"]
    }
    assert shown.count("<circle class=") == 4 and "kd: 50.0 % at severity 3" in shown


def test_severities_of_single_suites_and_of_corrupted_copies():
    suites = {f"fog:{i}": made.result(90.0 - 10 * i) for i in (1, 3, 5)}
    copies = {name: {"top1": [50.0, 40, 30, 20, 10], "ce": None} for name in ("snow", "frost")}
    # Incomplete: the severities of its accuracies are not known.
    copies["blur"] = {"top1": [50.0, 40.0], "ce": None}
    suites["imagenet-c"] = made.result(30.0) | {"by_corruption": copies}
    record = record_of(kd={})
    record["runs"][0]["suites"] = suites
    shown = severity_view(record, {})
    assert rows_of(shown, "Top-1 accuracy by severity, in %") == {
        "snow: kd": ["50.0", "40.0", "30.0", "20.0", "10.0"],
        "frost: kd": ["50.0", "40.0", "30.0", "20.0", "10.0"],
        "fog: kd": ["80.0", "–", "60.0", "–", "40.0"],
    }
    assert severity_view(record_of(kd={}), {}) == ""


def test_accuracy_of_each_class_is_the_mean_over_seeds():
    record = record_of(kd=[{"per_class": [100.0, 50.0]}, {"per_class": [80.0, None]}], ce={})
    assert rows_of(classes_view(record, {}), "Accuracy of each class, in %") == {
        "ant": ["90.0"],
        "bee": ["50.0"],
    }
    assert classes_view(record_of(ce={}), {}) == ""


def test_of_many_classes_the_least_accurate_are_listed():
    count = MAX_ROWS + 20
    shown = classes_view(record_of(kd={"per_class": [float(i) for i in range(count)]}), {})
    caption = f"Accuracy of the {MAX_ROWS} least accurate of {count} classes, in %"
    names = list(rows_of(shown, caption))
    # The record has two names for these classes; the others are numbered.
    assert names == ["ant", "bee", *(f"class {i}" for i in range(2, MAX_ROWS))]


def test_confused_pairs_are_pooled_over_seeds_and_sorted():
    counts = {"all": True, "images": {"0": 10, "1": 20}, "wrong": {"0": {"1": 1}, "1": {"0": 6}}}
    other = {"all": True, "images": {"0": 10, "1": 20}, "wrong": {"0": {"1": 3}}}
    record = record_of(kd=[{"confusion": counts}, {"confusion": other}], dad={"confusion": other})
    shown = classes_view(record, {})
    pairs = rows_of(shown, "Most confused: class → prediction, in % of the class&#x27;s images")
    assert list(pairs.items()) == [("ant → bee", ["20.0", "30.0"]), ("bee → ant", ["15.0", "0.0"])]
    assert "Confusion matrices" in shown and shown.count("<svg") == 2


def test_incomplete_confusion_has_no_matrix_and_no_zeros():
    part = {"all": False, "images": {"0": 10}, "wrong": {"0": {"1": 1}}}
    whole = {"all": True, "images": {"0": 10, "1": 20}, "wrong": {}}
    shown = classes_view(record_of(kd={"confusion": part}, dad={"confusion": whole}), {})
    caption = "Most confused: class → prediction, in % of the class&#x27;s images"
    assert rows_of(shown, caption) == {"ant → bee": ["10.0", "0.0"]}
    assert shown.count("<svg") == 1
    broken = {"all": True, "images": {"0": 10}, "wrong": {"0": {"x": 1}}}
    assert classes_view(record_of(kd={"confusion": broken}), {}) == ""


def test_large_matrix_is_small_and_without_names():
    images = {str(i): 100 for i in range(200)}
    wrong = {str(i): {str((i + j) % 200): 1 for j in range(1, 20)} for i in range(200)}
    view = {"confusion": {"all": True, "images": images, "wrong": wrong}}
    shown = classes_view(record_of(kd=view), {})
    assert shown.count("<svg") == 1 and len(shown) < 120_000
    assert "class 150" not in shown.split("<svg")[1]


def test_matrices_of_a_page_have_a_budget():
    wrong = {str(i): {str(j): 1 for j in range(12) if j != i} for i in range(12)}
    images = {str(i): 20 for i in range(12)}
    whole = {"confusion": {"all": True, "images": images, "wrong": wrong}}
    record = record_of(**{f"run-{number}": whole for number in range(10)})
    for run in record["runs"]:
        run["suites"] = {f"suite-{i}": run["suites"]["test"] for i in range(10)}
    shown = classes_view(record, {})
    assert 10 <= shown.count("<svg") < 100 and shown.count("Left out, to keep") >= 1
    assert len(shown) < MATRIX_BYTES + 100_000
    assert shown.count("Most confused") == 2 * 10  # each table, and its label


def test_best_validation_is_marked(tmp_path):
    made.write_run(tmp_path)
    with RunLog(tmp_path) as log:
        for step, top1 in ((30, 94.0), (40, 96.5), (50, 95.0)):
            log.metrics("val", step=step, epoch=step, top1=top1, nll=0.3, ece=1.0)
    training = section(page(load([tmp_path])), "Training")
    assert re.findall(r"<title>([^<]*best[^<]*)</title>", training) == ["kd: best, 96.5 at step 40"]
    (cells,) = rows_of(training, "Validation top-1, mean over seeds").values()
    assert cells == ["96.5", "40", "95.0", "4"]
    assert ">step</text>" in training


def test_stores_have_their_share_of_the_cost(tmp_path):
    record = made.write_run(tmp_path, seconds=75.0)
    made.write_json(tmp_path / "results.json", record | {"store_seconds": 25.0})
    cost = section(page(load([tmp_path])), "Throughput, energy and overhead")
    headings = re.findall(r'<th scope="col">(.*?)</th>', cost)
    cells = dict(zip(headings[1:], re.findall(r"<td>(.*?)</td>", cost), strict=True))
    assert cells["stores,&nbsp;s"] == "25" and cells["stores&#x27;&nbsp;share,&nbsp;%"] == "25"


def test_examples_are_of_different_classes_and_always_the_same():
    labels = np.arange(10).repeat(50)
    rows = spread_over_classes(labels, 8)
    assert len(set(labels[rows])) == 8 and sorted(labels[rows]) == list(labels[rows])
    assert np.array_equal(rows, spread_over_classes(labels, 8))
    # Not the first images of each class.
    assert not set(rows) <= {50 * i for i in range(10)}
    few = labels[spread_over_classes(labels[:150], 8)]
    assert sorted(np.bincount(few)) == [2, 3, 3]
    assert sorted(spread_over_classes(np.array([4, 4, 1]), 8)) == [0, 1, 2]


def test_older_records_lack_the_views(tmp_path):
    folder = made.write_comparison(tmp_path / "x")
    shown = page(load([folder]))
    for heading in ("Accuracy by severity", "Accuracy by class"):
        assert heading not in shown
    run = folder / "kd/seed-0"
    record = json.loads((run / "results.json").read_text())
    for result in record["suites"].values():
        result |= {"per_class": [90.0] * 3, "by_severity": [90.0, 80.0]}
    made.write_json(run / "results.json", record | {"classes": [made.HOSTILE, "two", "three"]})
    shown = page(load([run]))
    for heading in ("Accuracy by severity", "Accuracy by class"):
        assert heading in shown
    assert "<script" not in shown
