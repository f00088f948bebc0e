"""Runs that learn from the same batches: which, in how many groups, and what users see of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny

from dad_fast.cli.main import main
from dad_fast.cli.parser import read_config
from dad_fast.cli.train import make_parser
from dad_fast.config import Launch, from_toml
from dad_fast.config.fields import with_values
from dad_fast.config.resolve import gather
from dad_fast.engine.build import Builder
from dad_fast.sweep import sweep as sweep_module
from dad_fast.sweep.groups import groups, name_of, split
from dad_fast.sweep.runs import make_sweep


def sweep_of(tmp_path, *sets, **flags):
    given = {path.replace("__", "."): value for path, value in flags.items()}
    cfg = gather("demo", None, ["variants={}", *sets], given)
    return make_sweep(cfg, tmp_path / "out")


def names(found):
    return [[run.name for run in group] for group in found]


def grid(tmp_path, count, seeds=1):
    sets = [f"variants.lr{i}.optim.lr={0.01 * (i + 1)}" for i in range(count)]
    return sweep_of(tmp_path, *sets, seeds=seeds)


def test_cells_that_differ_in_the_learner_form_a_group_for_each_seed(tmp_path):
    sets = ["variants.a.optim.lr=1", "variants.b.loss.kd=2", "variants.c.attack.eps=0.3"]
    sweep = sweep_of(tmp_path, *sets, seeds=2)
    assert names(groups(sweep, sweep.runs)) == [
        ["a seed 0", "b seed 0"],
        ["a seed 1", "b seed 1"],
        ["c seed 0"],
        ["c seed 1"],
    ]
    assert [len(group) for group in groups(sweep, sweep.runs, share=False)] == [1] * 6


def test_students_share_in_any_case(tmp_path):
    sweep = sweep_of(tmp_path, student__name=["resnet18", "resnet26"], augment__img_size="0")
    assert [run.folder for run in sweep.runs] == [
        tmp_path / "out/resnet18/seed-0",
        tmp_path / "out/resnet26/seed-0",
    ]
    assert names(groups(sweep, sweep.runs, share=False)) == [["resnet18 seed 0", "resnet26 seed 0"]]


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([9], 1, [9]),
        ([9], 4, [2, 2, 2, 3]),
        ([5, 1], 3, [2, 3, 1]),
        ([2, 1], 9, [1, 1, 1]),
        ([], 4, []),
    ],
)
def test_groups_are_split_evenly_until_workers_are_busy(tmp_path, sizes, count, expected):
    runs = iter(range(sum(sizes)))
    whole = [[next(runs) for _ in range(size)] for size in sizes]
    parts = split(whole, count)
    assert [len(part) for part in parts] == expected
    assert [run for part in parts for run in part] == list(range(sum(sizes)))


def test_a_group_has_a_short_name(tmp_path):
    runs = grid(tmp_path, 5).runs
    assert name_of(runs[:1]) == "lr0 seed 0"
    assert name_of(runs[:3]) == "lr0, lr1, lr2, seed 0"
    assert name_of(runs) == "lr0, lr1 and 3 more, seed 0"


def test_a_core_or_a_job_that_was_asked_for_gets_a_group(tmp_path, monkeypatch):
    sweep = grid(tmp_path, 6)
    monkeypatch.setattr(sweep_module, "num_cores", lambda: 2)

    def sizes(launch, devices):
        return list(map(len, sweep_module.job_groups(sweep, sweep.runs, launch, devices)))

    assert sizes(Launch(), ["cpu"] * 4) == [3, 3]
    assert sizes(Launch(jobs=3), ["cpu"] * 3) == [2, 2, 2]
    assert sizes(Launch(), ["cuda:0"]) == [6]
    assert sizes(Launch(), [f"cuda:{i}" for i in range(4)]) == [1, 2, 1, 2]


def test_a_group_that_fails_is_halved_and_a_single_run_fails(tmp_path, monkeypatch):
    runs = grid(tmp_path, 3).runs
    monkeypatch.setattr(sweep_module, "write_tables", lambda *_: None)
    lines = []
    progress = SimpleNamespace(end=lambda job: None, say=lines.append)
    whole = SimpleNamespace(runs=runs, stores=())
    stop = SimpleNamespace(error=None)
    state = sweep_module._State(whole, Launch(), runs, stop, progress, num_workers=1)
    failure = {"error": "out of memory", "exit_code": 1}
    one, two = state.job_ended(state.job_of(runs, ""), failure, 1.0)
    assert (one.name, two.name) == ("lr0 seed 0", "lr1, lr2, seed 0")
    assert one.message("cpu")["launch"]["resume"] == "auto"
    assert state.job_ended(one, failure, 1.0) == []
    assert state.failed == {"lr0 seed 0": "out of memory"}
    assert lines[-1] == "[1/3] lr0 seed 0: failed: out of memory"
    # Settings that are wrong stay wrong.
    assert state.job_ended(two, {"error": "--lr", "exit_code": 2}, 1.0) == []
    assert set(state.failed) == {run.name for run in runs}


def test_student_seed_decides_the_student_alone(parts, tmp_path):
    def weights(*more):
        given = tiny.train_arguments(parts, tmp_path / "out", "--method", "ce", *more)[1:]
        cfg = read_config(vars(make_parser().parse(given)), [])
        student = Builder().build(with_values(cfg, {"device": "cpu"})).student
        return torch.cat([parameter.flatten() for parameter in student.parameters()])

    assert torch.equal(weights("--student-seed", 3), weights("--seed", 3))
    assert not torch.equal(weights("--student-seed", 3), weights())


def read(path):
    return json.loads(path.read_text())


def test_students_are_trained_in_folders_of_their_own(parts, tmp_path, capsys):
    out = tmp_path / "out"
    given = tiny.train_arguments(parts, out, "--device", "cpu", "--method", "kd")
    given += ["--student", "resnet18", "resnet26"]
    assert main(given) == 0
    assert [run["student"] for run in read(out / "results.json")["runs"]] == [
        "resnet18",
        "resnet26",
    ]
    for name in ("resnet18", "resnet26"):
        record = read(out / name / "seed-0/results.json")
        assert (record["variant"], record["shared_by"]) == (name, 2)
        own = from_toml((out / name / "seed-0/config.toml").read_text())
        assert (own.student.name, own.students) == (name, {})
    assert list(from_toml((out / "config.toml").read_text()).students) == ["resnet18", "resnet26"]
    printed = capsys.readouterr()
    assert "learned from the same batches" in " ".join(printed.out.split())
    assert "shares   its batches with [2/2] resnet26 seed 0" in printed.err
    assert (out / "table.md").exists() and (out / "report.html").exists()

    assert main([*given, "--resume", "auto"]) == 0
    assert "resnet26 seed 0: finished already" in capsys.readouterr().err


@pytest.mark.slow  # two sweeps
@pytest.mark.usefixtures("forked_workers")
def test_sharing_batches_changes_no_result_of_a_sweep(parts, tmp_path):
    def results(name, *more):
        out = tmp_path / name
        vary = ["--axes", "filter", "--vary", "optim.lr=1e-2"]
        given = tiny.train_arguments(parts, out, *vary, verb="ablate")
        assert main([*given, "--devices", "cpu", "--seeds", "1", "--jobs", "1", *more]) == 0
        return out, read(out / "results.json")["runs"]

    shared, found = results("shared")
    _, alone = results("alone", "--no-share-batches")
    assert [run.get("shared_by") for run in found] == [len(found)] * len(found)
    assert not any("shared_by" in run for run in alone)
    assert [run["suites"] for run in found] == [run["suites"] for run in alone]
    for path in shared.glob("*/seed-0/model.safetensors"):
        other = tmp_path / "alone" / Path(*path.parts[-3:])
        assert path.read_bytes() == other.read_bytes()
    assert "learned from the same batches" in (shared / "table.md").read_text()
