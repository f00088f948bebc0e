"""The comparison table: means and spreads, what is bold, what stands under it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from dad_fast.evaluation import tables as table
from dad_fast.files import atomic_write_json
from dad_fast.loggers.environment import environment

ROOT = Path(__file__).parents[2]
TEACHER = {"name": "embedded:digits", "seen": "MNIST and optdigits", "suites": {}}


def result(top1: float) -> dict:
    return {
        "name": "s",
        "num_images": 1000,
        "top1": top1,
        "top5": 99.0,
        "ece": 2.0,
        "nll": 0.5,
        "skipped": 0,
        "by_severity": [],
    }


TEACHER["suites"] = {"test": result(99.5), "fog": result(97.0)}


def run(variant: str, seed: int, test: float, fog: float, **more) -> dict:
    suites = {"test": result(test), "fog": result(fog)}
    return {
        "variant": variant,
        "method": variant,
        "seed": seed,
        "epochs": 20.0,
        "seconds": 90.0 + seed,
        "suites": suites,
        "teacher": None,
    } | more


@pytest.fixture
def runs() -> list[dict]:
    return [
        *(run("ce", seed, 98.0 + 0.2 * seed, 40 + 5 * seed) for seed in range(3)),
        *(
            run("kd", seed, 98.1 + 0.2 * seed, 70 + seed, teacher=TEACHER, epochs=60.0)
            for seed in range(3)
        ),
    ]


def test_rows_means_spreads_and_bold(runs):
    header, rows, best = table.rows({"runs": runs}, "top1")
    assert header == ["", "seeds", "epochs", "train s", "test", "fog"]
    assert rows[0] == ["teacher embedded:digits", "", "", "", "99.5", "97.0"]
    assert rows[1] == ["ce", "3", "20", "91 ± 1", "98.2 ± 0.2", "45.0 ± 5.0"]
    assert rows[2] == ["kd", "3", "60", "91 ± 1", "98.3 ± 0.2", "71.0 ± 1.0"]
    assert statistics.stdev([98.0, 98.2, 98.4]) == pytest.approx(0.2)
    assert best == {
        (1, 4),
        (2, 4),
        (2, 5),
    }  # test: 0.1 apart with a spread of 0.2; the teacher does not compete


def test_best_epoch_is_a_column_where_a_run_has_it(runs):
    for one in runs[:3]:
        one["best_epoch"] = 15.0 + one["seed"]
    header, rows, best = table.rows({"runs": runs}, "top1")
    assert header == ["", "seeds", "epochs", "best", "train s", "test", "fog"]
    assert [row[3] for row in rows] == ["", "16", ""] and best == {(1, 5), (2, 5), (2, 6)}
    assert any(line.startswith("Best: epochs") for line in table.notes({"runs": runs}, "top1"))


def test_lower_is_better_for_errors(runs):
    for one in runs:
        for suite in one["suites"].values():
            suite["ece"] = suite["top1"]
    _, rows, best = table.rows({"runs": runs}, "ece")
    assert (1, 5) in best and (2, 5) not in best and rows[1][5] == "45.0 ± 5.0"


def test_one_seed_has_no_spread_and_no_bold():
    record = {"runs": [run("ce", 0, 98.0, 40.0), run("dad", 0, 97.0, 80.0)]}
    _, rows, best = table.rows(record, "top1")
    assert (
        rows == [["ce", "1", "20", "90", "98.0", "40.0"], ["dad", "1", "20", "90", "97.0", "80.0"]]
        and not best
    )
    assert "One seed shows no spread" in table.markdown(record)


def test_missing_suites_and_nan(runs):
    del runs[1]["suites"]["fog"]
    runs[3]["suites"]["fog"]["top1"] = "nan"
    _, rows, best = table.rows({"runs": runs}, "top1")
    assert best == {(1, 4), (2, 4)}
    assert rows[1][5] == "–" and "nan" in rows[2][5]


def test_markdown_has_notes(runs):
    runs[0]["suites"]["test"]["skipped"] = 2
    for one in runs:
        one["suites"]["fog"]["protocol"] = "resize 28 bicubic, crop 28; logits of the 200 classes"
        one["suites"]["test"]["protocol"] = "resize 28 bicubic, crop 28"
    runs[3]["discretizer"], runs[3]["bn"] = {"name": "some.ckpt", "seen": ""}, "joint"
    assert "Batch norm" not in table.markdown(
        {"runs": runs, "environment": {}}
    )  # these saw no attacked images
    runs[3]["method"] = "dad"
    runs[0]["variant"] = runs[1]["variant"] = runs[2]["variant"] = "ce|long"
    text = table.markdown(
        {"runs": runs, "environment": {"gpus": [], "cpu": "Some CPU", "threads": 2}}
    )
    lines = text.splitlines()
    assert lines[1] == "|---|---:|---:|---:|---:|---:|" and len(lines[2].split("|")) == len(
        lines[0].split("|")
    )
    assert "| **98.3 ± 0.2** | **71.0 ± 1.0** |" in text and "ce\\|long" in text
    for words in (
        "3 seeds of the student",
        "over student seeds only",
        "applied to `test`",
        "Teacher embedded:digits, trained on: MNIST and optdigits.",
        "Discretizer some.ckpt, trained on: not recorded in the weights.",
        "clean and attacked images: joint.",
        "test: 2 unreadable images are left out.",
        "fog: resize 28 bicubic, crop 28; logits of the 200 classes.",
        "on Some CPU, 2 threads",
    ):
        assert words in text
    assert "test: resize" not in text


def test_table_from_a_written_record(tmp_path, runs, capsys):
    record = {"config": "", "environment": environment(), "runs": runs}
    atomic_write_json(tmp_path / "results.json", record)
    table.print_table(table.read_record(tmp_path / "results.json"))
    shown = capsys.readouterr().out
    assert "98.3 ± 0.2" in shown and "Teacher embedded:digits, trained on" in shown
    done = subprocess.run(
        [sys.executable, "-m", "dad_fast.evaluation.tables", str(tmp_path / "results.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == table.markdown(record) + "\n"


def test_seconds_of_stores_have_a_column(runs):
    assert "stores s" not in table.markdown({"runs": runs})
    stored = [run | {"store_seconds": 12.4 if run["variant"] == "kd" else 0.0} for run in runs]
    header, rows, best = table.rows({"runs": stored}, "top1")
    assert header[4] == "stores s" and {row[0]: row[4] for row in rows[1:]} == {
        "ce": "",
        "kd": "12",
    }
    assert best == {(row, column + 1) for row, column in table.rows({"runs": runs}, "top1")[2]}
    assert "Stores s: seconds to fill the stores" in table.markdown({"runs": stored})


def test_single_run_and_bad_files(tmp_path, capsys):
    record = run("dad", 0, 97.0, 80.0)
    record["suites"]["test"]["brier"] = 0.12
    atomic_write_json(tmp_path / "one.json", record)
    assert table.main([str(tmp_path / "one.json"), "nll"]) == 0
    assert "| dad | 1 | 20 | 90 | 0.50 | 0.50 |" in capsys.readouterr().out
    assert table.main([str(tmp_path / "one.json"), "brier"]) == 0
    assert (
        "| dad | 1 | 20 | 90 | 0.120 | – |" in capsys.readouterr().out
    )  # a record from before there was a Brier score
    assert table.main([str(tmp_path / "one.json"), "agreement"]) == 4
    assert "none of its results has Agreement with the teacher" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    for arguments, code in (
        ([str(tmp_path / "bad.json")], 4),
        ([str(tmp_path / "none.json")], 4),
        (["a", "top9"], 2),
        ([], 2),
    ):
        assert table.main(arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("dad-fast: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("columns", [80, 160])
def test_table_of_the_demo_fits_a_terminal(columns, monkeypatch, capsys):
    """On 80 columns it is turned and compact: a row for each suite, so that no line wraps."""
    monkeypatch.setenv("COLUMNS", str(columns))
    record = table.read_record(Path(__file__).parents[2] / "docs" / "records" / "demo-5-seeds.json")
    header, *rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in table.markdown(record).splitlines()
        if line.startswith("|") and "---" not in line
    ]

    table.print_table(record)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    if columns == 80:
        contrast = header.index("contrast")
        expected = ["contrast", *(row[contrast].replace(" ", "") for row in rows)]
        assert next(line for line in lines if "contrast" in line).split() == expected
    else:
        dad = next(row for row in rows if row[0] == "dad")
        line = next(line for line in lines if "│ dad " in line)
        assert [cell.strip() for cell in line.strip("│").split("│")] == dad
