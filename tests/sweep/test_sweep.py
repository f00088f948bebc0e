"""Several runs of `dad-fast train` as one sweep, and the stores that a run fills for itself."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny

from dad_fast.cli.main import main
from dad_fast.cli.parser import read_config
from dad_fast.cli.train import make_parser
from dad_fast.config import Config, Launch, to_toml
from dad_fast.errors import Preempted
from dad_fast.loggers import progress as progress_module
from dad_fast.loggers.progress import JobsProgress, report_progress, report_progress_to
from dad_fast.methods.stores import is_filled, store_seconds
from dad_fast.sweep import pool
from dad_fast.sweep import sweep as sweep_module
from dad_fast.sweep.runs import Run
from tests.processes import environment, run_script, wait_until

pytestmark = pytest.mark.usefixtures("forked_workers")


def arguments(parts, out, *more):
    return tiny.train_arguments(parts, out, "--device", "cpu", *more)


def read(path):
    return json.loads(path.read_text())


def stores_in(out):
    return sorted(path for path in (out / "stores").iterdir() if path.is_dir())


def test_run_fills_the_stores_it_asks_for(parts, tmp_path, capsys):
    out = tmp_path / "run"
    given = arguments(parts, out, "--method", "dad", "--stores", "adversarial", "targets:2")
    assert main(given) == 0
    stores = stores_in(out)
    assert [path.name.partition("-")[0] for path in stores] == ["adversarial", "targets"]
    assert all(map(is_filled, stores))
    facts, record = read(out / "run.json"), read(out / "results.json")
    assert [(store["kind"], store["views"]) for store in facts["stores"]] == [
        ("adversarial", 1),
        ("targets", 2),
    ]
    # Not for training; but evaluated, as in an online run.
    assert not facts["teacher_loaded"]
    assert record["teacher"]["suites"].keys() == record["suites"].keys()
    assert record["store_seconds"] == pytest.approx(sum(map(store_seconds, stores)))
    assert record["store_seconds"] > 0
    assert "stores s" in capsys.readouterr().out
    # The same command resumes: the stores exist and add no seconds.
    shutil.rmtree(out / "checkpoints")
    assert main([*given, "--resume", "auto"]) == 0
    assert {**read(out / "results.json"), "seconds": 0} == {**record, "seconds": 0}
    # The store can be given to another run like any other.
    assert main(arguments(parts, tmp_path / "other", "--method", "dad", "--store", *stores)) == 0
    assert read(tmp_path / "other/results.json")["suites"] == record["suites"]


@pytest.mark.slow  # two sweeps
def test_interrupted_store_resumes_and_adds_up_its_seconds(parts, tmp_path, monkeypatch):
    from dad_fast.precompute import run as precompute

    out, fill, calls = tmp_path / "run", precompute.fill, []

    def stopping(*given):
        calls.append(given)
        for number, records in enumerate(fill(*given)):
            yield records
            if number == 1 and len(calls) == 1:
                raise Preempted("stopped")

    monkeypatch.setattr(precompute, "fill", stopping)
    given = arguments(parts, out, "--method", "kd", "--stores", "targets:3", "--resume", "auto")
    assert main(given) == 75
    (store,) = stores_in(out)
    first = store_seconds(store)
    assert not is_filled(store) and first > 0
    assert main(given) == 0
    assert is_filled(store) and store_seconds(store) > first and len(calls) == 2


@pytest.mark.slow  # two sweeps
def test_overwrite_makes_new_stores(parts, tmp_path):
    out = tmp_path / "run"
    given = arguments(parts, out, "--method", "kd", "--stores", "targets:1")
    assert main(given) == 0
    (store,) = stores_in(out)
    made = (store / "manifest.json").stat().st_mtime_ns
    assert main([*given, "--overwrite"]) == 0
    assert (store / "manifest.json").stat().st_mtime_ns > made


def test_overwrite_keeps_the_inputs_of_the_run(parts, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(parts, out, "--method", "kd", "--stores", "targets:1")) == 0
    (store,) = stores_in(out)
    before = sorted(path for path in out.rglob("*"))
    for more in (["--store", store], ["--init-from", out]):
        capsys.readouterr()
        assert main(arguments(parts, out, "--method", "kd", "--overwrite", *more)) == 2
        printed = capsys.readouterr().err
        assert f"--overwrite would remove {more[1]}, which this run reads" in printed
        assert printed.count("\n") == 1
    assert sorted(path for path in out.rglob("*")) == before


def test_several_runs_on_several_processes(parts, tmp_path):
    given = arguments(parts, tmp_path / "out", "--method", "ce", "--seeds", "2")
    for code, _, error in run_script(2, tmp_path, ["-m", "dad_fast", *given]):
        assert code == 0, error
    assert [run["seed"] for run in read(tmp_path / "out/results.json")["runs"]] == [0, 1]
    assert read(tmp_path / "out/ce/seed-1/run.json")["processes"] == 2


def test_variants_share_stores_and_a_table(parts, tmp_path):
    file = tmp_path / "compare.toml"
    file.write_text(
        '[store]\nmake = ["adversarial", "targets:2"]\n'
        '[variants.plain]\nmethod = "ce"\n[variants.distilled]\nmethod = "kd"\n'
        '[variants.full]\nmethod = "dad"\n'
    )
    out = tmp_path / "out"
    given = arguments(parts, out, "--jobs", "1")
    assert main([given[0], str(file), *given[1:]]) == 0
    assert len(stores_in(out)) == 2
    for name, kinds in {
        "plain": [],
        "distilled": ["targets"],
        "full": ["adversarial", "targets"],
    }.items():
        facts = read(out / name / "seed-0/run.json")
        assert [store["kind"] for store in facts.get("stores", [])] == kinds
    record = read(out / "results.json")
    assert {store["kind"]: store["views"] for store in record["stores"]} == {
        "adversarial": 1,
        "targets": 2,
    }
    assert record["failed"] == {} and record["environment"]["side_by_side"] == 1
    assert "stores s" in (out / "table.md").read_text()


@pytest.mark.slow  # two sweeps
def test_stores_that_exist_serve_several_runs(parts, tmp_path):
    assert main(arguments(parts, tmp_path / "one", "--method", "kd", "--stores", "targets:2")) == 0
    (store,) = stores_in(tmp_path / "one")
    given = ["--method", "kd", "--store", store, "--seeds", "2", "--jobs", "2"]
    assert main(arguments(parts, tmp_path / "two", *given)) == 0
    record = read(tmp_path / "two/results.json")
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert record["environment"]["side_by_side"] == 2
    assert all(run["store_seconds"] > 0 for run in record["runs"])


def test_a_run_that_fails_leaves_the_others(parts, tmp_path, capsys):
    file = tmp_path / "compare.toml"
    file.write_text(
        'method = "ce"\n[variants.sound]\noptim.lr = 1e-3\n[variants.wild]\noptim.lr = 1e30\n'
    )
    given = arguments(parts, tmp_path / "out", "--max-steps", "12", "--epochs", "12", "--jobs", "1")
    assert main([given[0], str(file), *given[1:]]) == 1
    printed = capsys.readouterr().err
    assert "failed: wild seed 0: the loss or a gradient was not a number" in printed
    record = read(tmp_path / "out/results.json")
    assert [run["variant"] for run in record["runs"]] == ["sound"]
    assert set(record["failed"]) == {"wild seed 0"}


MISTAKES = {
    "a kind": (["--stores", "target"], "--stores target: no such kind; did you mean targets?"),
    "views": (
        ["--stores", "targets:none"],
        "--stores targets:none: views are a whole number, 1 or more, as in targets:4",
    ),
    "a method": (
        ["--method", "ce", "--stores"],
        "--stores adversarial: --method ce learns from no such store",
    ),
    "both": (["--store", "somewhere", "--stores"], "--store and --stores"),
    "a form of images": (
        ["--stores", "--store-images", "png"],
        "--store-images png: must be none, raw, webp or jpeg:Q",
    ),
    "jobs": (["--jobs", "0"], "--jobs 0: a whole number, 1 or more"),
    "jobs and processes": (
        ["--seeds", "2", "--jobs", "2", "--nproc", "2"],
        "--jobs 2: with --nproc 2 one run at a time",
    ),
    "an old flag": (["--store-views", "4"], "did you mean --stores KIND:VIEWS?"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(parts, tmp_path, capsys, what):
    more, words = MISTAKES[what]
    assert main(arguments(parts, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and words in printed
    assert not (tmp_path / "out").exists()


def test_progress_of_jobs_without_a_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with JobsProgress(live=False) as shown:
        for step in range(31):
            shown.update("dad seed 0", step, 30, "800 img/s")
            now[0] += 1.0
        shown.say("done\x1b[31m")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [f"dad seed 0  {step}/30  800 img/s" for step in (5, 15, 25)]
    assert "\x1b" not in lines[-1]


def test_progress_is_reported_to_the_parent_once_a_second(monkeypatch):
    heard = []
    report_progress(1, 10, "nobody listens")
    monkeypatch.setattr(progress_module, "_listener", None)
    monkeypatch.setattr(progress_module, "_listener_heard", -100.0)
    report_progress_to(lambda *values: heard.append(values))
    for step in range(100):
        report_progress(step, 100, "text")
    assert heard[0] == (0, 100, "text") and len(heard) <= 2


def test_a_worker_whose_parent_reads_no_more_keeps_its_run(parts, tmp_path):
    """After kill -9 of the parent, progress may be reported before the end of stdin is seen."""
    out = tmp_path / "run"
    cfg = read_config(vars(make_parser().parse(arguments(parts, out, "--method", "kd")[1:])), [])
    job = {
        "do": "run",
        "runs": [{"variant": "kd", "config": to_toml(cfg), "folder": str(out)}],
        "launch": sweep_module._launch(Launch()),
        "teacher_results": {},
    }
    pipe = pool.subprocess.PIPE
    with open(tmp_path / "log", "w") as log:
        worker = pool.subprocess.Popen(
            [sys.executable, "-m", pool.WORKER],
            stdin=pipe,
            stdout=pipe,
            stderr=log,
            text=True,
            env=environment(),
            start_new_session=True,
        )
    worker.stdout.close()
    worker.stdin.write(json.dumps(job) + "\n")
    worker.stdin.flush()
    wait_until(lambda: (out / "report.html").exists() or worker.poll() is not None)
    worker.stdin.close()
    worker.wait()
    assert (out / "report.html").exists(), (tmp_path / "log").read_text()


def test_time_left_is_estimated_only_while_runs_wait(tmp_path, monkeypatch):
    """Later each run's own line shows it; epochs that running jobs have done are not known here."""
    cfg = Config(method="ce")
    runs = [Run("ce", seed, cfg, tmp_path / str(seed)) for seed in range(4)]
    sweep = SimpleNamespace(runs=runs, stores=())
    monkeypatch.setattr(sweep_module, "write_tables", lambda *_: None)
    lines = []
    progress = SimpleNamespace(end=lambda job: None, say=lines.append)
    stop = SimpleNamespace(error=None)
    state = sweep_module._State(sweep, Launch(), runs, stop, progress, num_workers=2)
    for job in [state.job_of([run], "") for run in runs]:
        assert state.job_ended(job, {}, 1.0) == []
    assert ["left" in line for line in lines] == [True, False, False, False]
