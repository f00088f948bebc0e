"""Loading of run folders: finished, unfinished, old and damaged ones; labels; grouping of seeds."""

from __future__ import annotations

import json
import math
import shutil
from random import Random

import pytest
import report_runs as made

from dad_fast.cli import main as cli
from dad_fast.errors import DataError
from dad_fast.report.page import page
from dad_fast.report.run_files import number
from dad_fast.report.runs import load


def labels(*folders):
    return [(group.label, len(group.runs)) for group in load(folders).groups]


def test_a_comparison_has_a_column_per_variant(tmp_path):
    folder = made.write_comparison(tmp_path / "demo", seeds=2)
    loaded = load([folder])
    assert labels(folder) == [("ce", 2), ("kd", 2), ("kd-long", 2), ("dad", 2)]
    assert loaded.problems == []
    assert loaded.groups[3].setting("schedule.epochs") == 2
    assert loaded.groups[3].runs[1].record["seed"] == 1
    assert len(loaded.record["runs"]) == 8 and loaded.record["environment"]["cpu"] == "A CPU"


def test_labels_are_the_shortest_unique_paths(tmp_path):
    one, two = made.write_comparison(tmp_path / "a"), made.write_comparison(tmp_path / "b")
    assert [label for label, _ in labels(one, two)][::4] == ["a/ce", "b/ce"]
    assert labels(one / "kd/seed-0", one / "dad/seed-0") == [("kd", 1), ("dad", 1)]
    assert labels(one / "kd/seed-0", two / "kd/seed-0") == [("a/kd", 1), ("b/kd", 1)]
    assert labels(one / "kd/seed-0", one / "kd/seed-0") == [("kd", 1)] == labels(one / "kd/seed-0")
    assert labels(one, one / "kd/seed-0")[1] == ("kd", 1)  # named twice, shown once
    made.write_run(tmp_path / "mine")
    made.write_run(tmp_path / "yours")
    assert labels(tmp_path / "mine", tmp_path / "yours") == [("mine", 1), ("yours", 1)]


def test_seeds_named_one_by_one_are_one_column(tmp_path):
    folder = made.write_comparison(tmp_path / "demo", seeds=3)
    assert labels(*(folder / f"dad/seed-{seed}" for seed in range(3)), folder / "kd/seed-0") == [
        ("dad", 3),
        ("kd", 1),
    ]


def test_run_in_progress_is_shown_and_reported(tmp_path):
    folder = made.write_comparison(tmp_path / "demo")
    (folder / "results.json").unlink()
    (folder / "dad/seed-0/results.json").unlink()
    assert [label for label, _ in labels(folder)] == ["ce", "dad", "kd", "kd-long"]
    (folder / "config.toml").write_text("variants = { ce = {}, kd = {}, kd-long = {}, dad = {} }")
    assert [label for label, _ in labels(folder)] == ["ce", "kd", "kd-long", "dad"]
    loaded = load([folder])
    shown = page(loaded)
    assert "demo: no results.json of the whole comparison" in shown
    assert (
        "dad/seed-0: no results yet: in progress, or stopped. Last logged: step 20 (epoch 2) at 20"
        in shown
    )
    assert len(loaded.record["runs"]) == 3 and "Training loss" in shown


def test_a_run_before_its_first_step(tmp_path):
    made.write_run(tmp_path, finished=False)
    (tmp_path / "metrics.jsonl").unlink()
    loaded = load([tmp_path])
    assert "no results and no logged step yet" in page(loaded) and loaded.record["runs"] == []


def test_old_records_may_lack_keys(tmp_path):
    old = made.write_run(tmp_path, full=False)
    for key in (
        "variant",
        "epochs",
        "seconds",
        "seed",
        "num_parameters",
        "bn",
        "discretizer",
        "teacher",
    ):
        del old[key]
    del old["suites"]["fog"]["nll"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    (tmp_path / "run.json").unlink()
    (tmp_path / "config.toml").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    loaded = load([tmp_path])
    assert loaded.problems == []
    assert "90.0" in page(loaded)
    assert "Calibration</h2>" not in page(loaded)


# (file, content, whether a problem is reported)
DAMAGE = [
    *(
        ("results.json", text, True)
        for text in (
            "",
            "{",
            "[]",
            '{"suites": 3}',
            '{"suites": {"test": 5}}',
            '{"runs": [1, {"suites": {}}]}',
        )
    ),
    *(("results.json", text, False) for text in ("null", '{"suites": {}}')),
    *(
        ("run.json", text, text in ("", "[" * 100_000))
        for text in ("", "[1]", '{"gpus": {}}', "[" * 100_000)
    ),
    (
        "run.json",
        '{"gpus": [1], "cpu": 2, "threads": "x", "packages": 7, "teacher": 3, "variant": [2]}',
        False,
    ),
    *(("config.toml", text, True) for text in ("=", "seed = ", "\udcff")),
    ("config.toml", "method = [[1], {a = 2}]", False),
    (
        "config.toml",
        "[attack]\neps = 'x'\nnorm = 3\n[data]\nbatch_size = 'many'\ndata_dir = 1\n[schedule]\nepochs = 'x'",
        False,
    ),
    *(("metrics.jsonl", text, True) for text in ("{", "5\n", "{}\n", '{"kind": 5}\n')),
    *(
        ("metrics.jsonl", text, False)
        for text in (
            "",
            '{"kind": "train"}\n',
            '{"kind": "train", "step": "a", "img_per_s": [1]}\n',
        )
    ),
    ("metrics.jsonl", '{"kind": "train", "epoch": 1, "loss": "nan", "gpu": 3}\n', False),
    (
        "metrics.jsonl",
        '{"kind": "train", "epoch": 1, "step": 1, "loss": 1e999, "time": 1e300, "img_per_s": 0}\n',
        False,
    ),
    *(("sheet.safetensors", text, True) for text in ("", "x" * 50)),
]


@pytest.mark.parametrize(("name", "text", "reported"), DAMAGE)
def test_damage_is_reported_on_the_page(tmp_path, name, text, reported, capsys):
    folder = made.write_comparison(tmp_path / "demo")
    damaged = folder / "dad/seed-0"
    (damaged / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    folders = [str(damaged), str(folder / "kd/seed-0")]
    assert cli.main(["report", *folders, "-o", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr()
    shown = (tmp_path / "page.html").read_text()
    assert printed.out.strip().endswith("page.html")
    assert "Traceback" not in printed.err
    assert "Top-1 accuracy" in shown
    assert (name in printed.err, name in shown.partition("<section")[0]) == (reported, reported)


def test_torn_log_line_keeps_the_other_lines(tmp_path):
    made.write_run(tmp_path)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0][:20] + "\n", *lines[1:], '{"kind": "tra']))
    loaded = load([tmp_path])
    assert loaded.problems == [
        f"{tmp_path.name}/metrics.jsonl: 1 of 5 lines are damaged and left out, "
        "the last line is torn and left out"
    ]
    assert len(loaded.groups[0].runs[0].kind("train")) == 3


def test_record_cannot_lead_out_of_its_folder(tmp_path):
    folder = made.write_comparison(tmp_path / "demo")
    made.write_run(tmp_path / "secret/seed-0")
    whole = json.loads((folder / "results.json").read_text())
    whole["runs"][0]["variant"] = "../secret"
    (folder / "results.json").write_text(json.dumps(whole))
    assert load([folder]).groups[0].runs[0].rows == []


NO_RUN = [
    ("missing", "no such file"),
    ("file", "is a file, and no result of dad-fast eval"),
    ("empty", "no run has written to it"),
]


@pytest.mark.parametrize(("what", "message"), NO_RUN)
def test_folder_without_a_run_exits_4_with_one_line(tmp_path, capsys, what, message):
    folder = tmp_path / "x"
    if what == "file":
        folder.write_text("")
    elif what == "empty":
        folder.mkdir()
    assert cli.main(["report", str(folder)]) == 4
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    with pytest.raises(DataError, match=message):
        load([folder])


def test_output_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.write_run(tmp_path / "a")
    made.write_run(tmp_path / "b")
    assert cli.main(["report", "a"]) == 0 and (tmp_path / "a/report.html").exists()
    assert cli.main(["report", "a", "b"]) == 0
    assert capsys.readouterr().out.split()[-1] == "runs/report.html"
    assert cli.main(["report", "a", "-o", "new/page.html", "b"]) == 0
    assert (tmp_path / "new/page.html").exists()
    for arguments, message in (
        (["-o", "x.html"], "no run"),
        (["a", "-o", "a/results.json"], "ends in .html"),
        (["a", "-o", "b"], "is a folder"),
    ):
        assert cli.main(["report", *arguments]) == 2 and message in capsys.readouterr().err
    assert json.loads((tmp_path / "a/results.json").read_text())["variant"] == "kd"


def test_teachers_of_one_name_with_different_results_get_two_rows(tmp_path):
    for name, top1 in (("a", 98.0), ("b", 70.0)):
        record = made.write_run(tmp_path / name)
        record["teacher"]["suites"]["test"]["top1"] = top1
        (tmp_path / name / "results.json").write_text(json.dumps(record))
    shown = page(load([tmp_path / "a", tmp_path / "b"]))
    assert "teacher T&lt;1&gt;<" in shown and "teacher T&lt;1&gt; (b)<" in shown
    shutil.rmtree(tmp_path / "b")
    assert "T&lt;1&gt; (" not in page(load([tmp_path / "a"]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        ("2.5", 2.5),
        ("nan", None),
        (math.inf, None),
        (None, None),
        ([1], None),
        (True, None),
        (10**400, None),
    ],
)
def test_number(value, expected):
    assert number({"a": {"b": value}}, "a.b") == expected and number({"a": value}, "a.b") is None


JUNK = [
    None,
    True,
    -1,
    10**30,
    math.nan,
    math.inf,
    "",
    "x",
    "<b>",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    [{}],
    [None],
    {"name": {}},
    {"suites": {}},
]


def test_any_value_in_any_place_makes_a_page(tmp_path):
    """A page is made for any value in any place."""
    run, random = tmp_path / "run", Random(0)
    facts = made.GPU | {"processes": 2, "commands": ["dad-fast train"]}
    record = made.with_classes(made.write_run(run, "dad", "dad", facts=facts, power=500.0))
    record["ood"] = {"textures": {"energy": {"auroc": 91.25, "aupr": 90.0, "fpr95": 30.0}}}
    # Its pictures are not changed here, and take most of the time of a page.
    (run / "sheet.safetensors").unlink()
    files = {
        run / "results.json": record,
        run / "run.json": json.loads((run / "run.json").read_text()),
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for _ in range(150):
        path, value = random.choice([*files.items(), (run / "metrics.jsonl", rows)])
        changed = _with_junk(value, random)
        lines = changed if isinstance(changed, list) and path.suffix == ".jsonl" else [changed]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            page(load([run])).encode()
        finally:
            path.write_text(
                "".join(
                    json.dumps(line) + "\n"
                    for line in (value if path.suffix == ".jsonl" else [value])
                )
            )


def _with_junk(value, random):
    """Return a copy of `value` with junk in one place; all places are equally likely."""
    places = list(_places(value, ()))
    place = random.choice(places)
    if not place:
        return random.choice(JUNK)
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = random.choice(JUNK)
    return copy


def _places(value, path):
    yield path
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    else:
        return
    for key, inner in inside:
        yield from _places(inner, (*path, key))
