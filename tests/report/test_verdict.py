"""The verdict of a page: which method is better, by how much, and how certain that is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import report_runs as made

from dad_fast.report.intervals import unpaired
from dad_fast.report.page import page
from dad_fast.report.run_files import Run
from dad_fast.report.runs import Group, load
from dad_fast.report.verdict import verdicts

DOCS = Path(__file__).parents[2] / "docs"


def group_of(label: str, method: str, tops: list[float], *, seconds: float = 10.0, **more):
    """Return a group with one suite "test"; `more` are further suites, a top-1 per seed."""
    runs = []
    for seed, top1 in enumerate(tops):
        record = made.record(label, method, seed, top1, seconds=seconds)
        record["suites"] = {"test": made.result(top1)}
        record["suites"] |= {name: made.result(values[seed]) for name, values in more.items()}
        runs.append(Run(Path(label) / f"seed-{seed}", record))
    return Group(label, Path("x"), runs)


def test_verdict_over_seeds_is_students_t_of_paired_differences():
    kd = group_of("kd", "kd", [90.0, 90.0, 90.0], fog=[50.0, 50.0, 50.0], snow=[60.0, 60.0, 60.0])
    # Differences of 3, 5 and 7: 4.303 * 2 / sqrt(3) = 4.97 around 5.
    dad = group_of(
        "dad", "dad", [88.0, 90.0, 92.0], fog=[53.0, 55.0, 57.0], snow=[55.0, 53.0, 57.0]
    )
    (sentence,), notes = verdicts([kd, dad])
    assert sentence == (
        "dad beats kd (equal training time) on fog by 5.00 points (95 % interval 0.03 to 9.97, "
        "3 seeds); it loses on snow by 5.00 points (95 % interval 0.03 to 9.97, 3 seeds); "
        "no measurable difference on test."
    )
    assert len(notes) == 1 and "paired by seed" in notes[0]


def test_one_seed_has_no_verdict_over_seeds():
    kd, dad = group_of("kd", "kd", [60.0]), group_of("dad", "dad", [80.0])
    (sentence,), notes = verdicts([kd, dad])
    assert "dad scores higher than kd" in sentence and "beats" not in sentence
    assert "over test images, one common seed" in sentence
    assert any("may give another result" in note for note in notes)


def test_no_measurable_difference():
    kd, dad = group_of("kd", "kd", [90.0, 91.0]), group_of("dad", "dad", [91.0, 91.5])
    (sentence,), _ = verdicts([kd, dad])
    assert sentence == (
        "No measurable difference between dad and kd (equal training time) on test (2 seeds)."
    )


def test_partner_has_equal_time_else_equal_epochs_else_the_nearest_time():
    kd, long = group_of("kd", "kd", [90.0]), group_of("long", "kd", [90.0], seconds=42.0)
    dad = group_of("dad", "dad", [80.0], seconds=40.0)
    assert "than long (equal training time)" in verdicts([kd, long, dad])[0][0]
    assert "than kd (equal epochs, in 4 × its training time)" in verdicts([kd, dad])[0][0]
    dad.runs[0].record |= {"epochs": 9.0, "seconds": 84.0}
    assert "than long (in 2 × its training time)" in verdicts([kd, long, dad])[0][0]


def test_suites_of_other_images_are_not_compared():
    kd, dad = group_of("kd", "kd", [60.0]), group_of("dad", "dad", [80.0])
    dad.runs[0].record["suites"]["test"]["num_images"] = 999
    assert verdicts([kd, dad]) == ([], [])


def test_baseline_of_a_page_without_kd():
    ce, dat = group_of("ce", "ce", [60.0]), group_of("dat", "dat", [80.0])
    assert "dat scores higher than ce" in verdicts([ce, dat])[0][0]
    first, second = group_of("a", "dad", [60.0]), group_of("b", "dad", [80.0])
    assert "b scores higher than a" in verdicts([first, second])[0][0]
    assert verdicts([first]) == ([], [])


def test_many_runs_have_few_verdicts_of_the_best():
    groups = [group_of("kd", "kd", [50.0])]
    groups += [group_of(f"dad-{top1}", "dad", [float(top1)]) for top1 in (60, 90, 70, 80, 65)]
    sentences, _ = verdicts(groups)
    assert [sentence.split()[0] for sentence in sentences] == ["dad-90", "dad-80", "dad-70"]


def test_interval_of_unpaired_results_is_newcombes():
    """56 of 70 against 48 of 80: 0.0524 to 0.3339 (Newcombe 1998, table II, method 10)."""
    few, many = ({"top1": 80.0, "num_images": 70}, {"top1": 60.0, "num_images": 80})
    found = unpaired([many], [few])
    assert found.mean == pytest.approx(20.0)
    assert found.interval == pytest.approx((5.24, 33.39), abs=0.01)


def test_verdict_in_the_docs_is_that_of_its_record(tmp_path):
    shutil.copy(DOCS / "records/demo-5-seeds.json", tmp_path / "results.json")
    quoted = re.sub(r"(?<=\S)\n> ", " ", (DOCS / "report.md").read_text())
    assert f"> {verdicts(load([tmp_path]).groups)[0][1]}\n" in quoted


def test_summary_of_a_comparison(tmp_path):
    facts = made.CPU | {"commands": ["dad-fast train --preset demo -o 'my runs'"]}
    folder = made.write_comparison(tmp_path / "x", seeds=3, facts=facts)
    shown = page(load([folder])).split("Summary</h2>")[1].split("</section>")[0]
    assert "dad beats kd-long (equal training time) on test by 4.0 points" in shown
    assert "resnet18 on digits by ce, kd, dad; teacher T&lt;1&gt;; 12 runs" in shown
    assert "dad-fast train --preset demo -o &#x27;my runs&#x27;" in shown
    assert "test: dad 96.0 · optdigits: dad 86.0 · fog: dad 76.0" in shown
    assert "UTC" in shown


def test_summary_of_one_run(tmp_path):
    made.write_run(tmp_path, top1=91.0)
    shown = page(load([tmp_path])).split("Summary</h2>")[1].split("</section>")[0]
    shown = shown.replace("\N{NO-BREAK SPACE}", " ")
    assert "91.0 % on test (95 % interval 89.5 to 92.0, teacher 98.0)" in shown
    assert "lowest of the other suites, 71.0 % on fog (95 % interval 69.5 to 72.0" in shown
    assert "(one seed; intervals over test images)." in shown and "highest" not in shown
    # Runs from before the command was recorded.
    assert "<pre" not in shown
