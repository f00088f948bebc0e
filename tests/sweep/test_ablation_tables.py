"""Differences from the base, their intervals, tables and plot."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dad_fast.evaluation.tables import read_record
from dad_fast.report.intervals import difference, t_quantile
from dad_fast.sweep.ablation_tables import (
    ablation_markdown,
    axes_markdown,
    axis_rows,
    notes,
    summary,
)
from dad_fast.sweep.forest import forest_plot

DOCS = Path(__file__).parents[2] / "docs"


def run_of(cell, seed, top1, seconds=10.0, **more):
    suite = {"top1": top1, "ece": 1.0, "nll": 0.1, "num_images": 10, "skipped": 0}
    found = {"variant": cell, "method": "dad", "seed": seed, "epochs": 1, "seconds": seconds}
    return (
        found | {"teacher": None, "discretizer": None, "bn": None, "suites": {"test": suite}} | more
    )


def record_of(**tops):
    runs = [
        run_of(cell.replace("_", "="), seed, top1)
        for cell, values in tops.items()
        for seed, top1 in enumerate(values)
    ]
    cells = list(dict.fromkeys(run["variant"] for run in runs))
    ablation = {
        "base": "dad",
        "axes": {"filter": cells, "order": ["dad", "order=authors"]},
        "stores": [],
        "failed": {},
    }
    return {"runs": runs, "ablation": ablation}


def test_intervals_are_student_t_of_paired_differences():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 5, 9, 10, 11, 20, 50):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=0.004)
    base, other = [70.0, 75.0, 81.0], [71.5, 75.5, 83.0]
    record = record_of(dad=base, filter_off=other)
    found = difference(record["runs"][:3], record["runs"][3:], "test")
    expected = stats.ttest_rel(other, base).confidence_interval(0.95)
    assert found.mean == pytest.approx(4 / 3)
    assert found.interval == pytest.approx(tuple(expected), abs=1e-3)


def test_only_seeds_that_both_have_are_paired():
    record = record_of(dad=[70.0, 80.0], filter_off=[71.0, 81.0, 99.0])
    found = difference(record["runs"][:2], record["runs"][2:], "test")
    assert found.pairs == [1.0, 1.0] and found.interval == (1.0, 1.0)
    assert difference(record["runs"][:1], record["runs"][3:], "test") is None
    assert difference(record["runs"][:1], record["runs"][2:3], "test").interval is None


def test_the_table_of_an_axis():
    record = record_of(dad=[70.0, 72.0, 74.0], filter_off=[60.0, 62.1, 64.2])
    header, rows, clear = axis_rows(record, "filter")
    assert header == ["", "seeds", "train s", "× base", "test"]
    assert rows[0] == ["dad (base)", "3", "10", "1.00", "72.0 ± 2.0"]
    assert rows[1] == ["filter=off", "3", "10", "1.00", "−9.9 [−10.1, −9.7]"] and clear == {(1, 4)}
    text = ablation_markdown(record | {"environment": {"gpus": [], "cpu": "a CPU", "threads": 1}})
    assert "**−9.9 [−10.1, −9.7]**" in text and "| order=authors | 0 |" in text
    assert any("Of 1 intervals 1 leave 0 out" in line for line in notes(record))


def test_one_seed_has_no_interval_and_a_note():
    record = record_of(dad=[70.0], filter_off=[60.0])
    assert axis_rows(record, "filter")[1][1][4] == "−10.0"
    assert any("One seed has no spread" in line for line in notes(record))
    assert "one seed: no spread" in forest_plot(record)


def test_unfinished_sweep_may_lack_its_base_and_have_non_finite_numbers():
    record = record_of(filter_off=[60.0, 61.0])
    record["ablation"]["axes"] = {"filter": ["dad", "filter=off"]}
    record["ablation"]["failed"] = {"dad seed 0": "the loss was not a number"}
    assert axis_rows(record, "filter")[1] == [
        ["dad", "0", "", "", "–"],
        ["filter=off", "2", "10", "–", "–"],
    ]
    assert any("dad seed 0 failed: the loss" in line for line in notes(record))
    ElementTree.fromstring(forest_plot(record))
    record = record_of(dad=["nan", 70.0], filter_off=[60.0, 61.0])
    assert "nan" in ablation_markdown(record) and "nan" not in forest_plot(record)


def test_the_summary_has_every_metric():
    cells = summary(record_of(dad=[70.0, 72.0], filter_off=[60.0, 62.0]), "dad")
    assert cells["dad"]["test"]["top1"] == {"mean": 71.0, "sd": pytest.approx(2**0.5), "seeds": 2}
    assert cells["filter=off"]["test"]["top1"]["difference"] == -10.0
    assert cells["filter=off"]["test"]["ece"]["interval"] == (0.0, 0.0)


def test_plot_is_one_svg_within_its_bounds():
    record = record_of(
        dad=[70.0, 72.0, 74.0], filter_off=[60.0, 62.1, 64.2], **{"order_a<b": [90.0, 10.0, 70.0]}
    )
    root = ElementTree.fromstring(forest_plot(record))
    width = float(root.get("width"))
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= width
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"filter", "filter=off", "order=a<b", "test"} <= set(texts)
    assert len(re.findall('class="dot"', forest_plot(record))) == 2


def test_tables_and_plot_in_the_docs_match_their_record():
    record = read_record(DOCS / "records" / "ablate.json")
    assert axes_markdown(record).replace("## ", "### ") in (DOCS / "ablate.md").read_text(
        encoding="utf-8"
    )
    assert forest_plot(record) == (DOCS / "ablate.svg").read_text(encoding="utf-8")
