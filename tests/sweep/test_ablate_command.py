"""`dad-fast ablate`: cells on worker processes, resume after a kill, one table."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny

from dad_fast.cli.main import main
from tests.processes import HANG, environment, one_thread, wait_until

pytestmark = pytest.mark.usefixtures("forked_workers")


def arguments(parts, out, *more):
    return tiny.train_arguments(
        parts, out, "--devices", "cpu", "--jobs", "1", "--seeds", "2", *more, verb="ablate"
    )


def finished(out):
    return {
        str(path.parent.relative_to(out)): path.stat().st_mtime_ns
        for path in out.glob("*/seed-*/results.json")
    }


def test_dry_run_prints_plan_and_cost(parts, tmp_path, capsys):
    out = tmp_path / "out"
    vary = ["--axes", "filter", "--vary", "optim.lr=1e30"]
    assert main(arguments(parts, out, *vary, "--stores", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "3 cells, 6 runs; 0 are done, 6 to do" in printed and "times one run of KD" in printed
    assert f"6 runs learn from {out}/stores/adversarial-" in printed and not out.exists()
    # Of stored images the filter is a part.
    assert "4 runs learn in 2 groups from the same batches: " in printed


def test_sweep_with_a_failed_cell_can_be_extended_and_resumed(parts, tmp_path, capsys):
    out = tmp_path / "out"
    steps = ["--max-steps", "12"]
    # A cell that fails is named, and the others are done.
    assert main(arguments(parts, out, "--axes", "filter", "--vary", "optim.lr=1e30", *steps)) == 1
    printed = capsys.readouterr().err
    assert "failed: lr=1e30 seed 0: the loss or a gradient was not a number" in printed
    before = finished(out)
    assert set(before) == {"dad/seed-0", "dad/seed-1", "filter=off/seed-0", "filter=off/seed-1"}
    record = json.loads((out / "results.json").read_text())
    assert record["ablation"]["axes"] == {
        "filter": ["dad", "filter=off"],
        "optim.lr": ["dad", "lr=1e30"],
    }
    assert set(record["ablation"]["failed"]) == {"lr=1e30 seed 0", "lr=1e30 seed 1"}
    assert record["environment"]["cpu"] and len(record["runs"]) == 4
    assert "interval" in record["ablation"]["cells"]["filter=off"]["val"]["top1"]
    assert "| filter=off | 2 |" in (out / "table.md").read_text()
    assert (out / "plot.svg").exists()
    assert (out / "report.html").exists()

    # Cells are added; finished runs are kept, except a damaged one.
    (out / "dad/seed-1/results.json").write_text("{}")
    more = ["--axes", "order", "filter", "--resume", "auto"]
    assert main(arguments(parts, out, *more, *steps)) == 0
    assert "[4/6] dad seed 1: val" in capsys.readouterr().err
    after = finished(out)
    assert [name for name in before if after[name] != before[name]] == ["dad/seed-1"]
    assert "order=authors/seed-1" in after
    assert json.loads((out / "dad/seed-1/results.json").read_text()) == record["runs"][1]

    # A sweep cannot change its base.
    given = arguments(parts, out, "--axes", "filter", *steps)
    assert main(given) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main([*given, "--resume", "auto", "--temperature", "2"]) == 2
    printed = capsys.readouterr().err
    assert "loss.temperature: 4.0 → 2.0" in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_cell_equals_the_same_run_of_train(parts, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(parts, out, "--axes", "filter")) == 0
    file = tmp_path / "alone.toml"
    file.write_text((out / "filter=off/seed-1/config.toml").read_text())
    with one_thread():
        assert main(["train", str(file), "-o", str(tmp_path / "alone")]) == 0
    ours, alone = (
        json.loads((folder / "results.json").read_text())
        for folder in (out / "filter=off/seed-1", tmp_path / "alone")
    )
    assert ours["suites"] == alone["suites"] and ours["teacher"] == alone["teacher"]
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (out / "filter=off/seed-1", tmp_path / "alone")
    ]
    # The end of the file, after the metadata.
    assert weights[0][-1000:] == weights[1][-1000:]


@pytest.mark.slow
def test_cells_share_stores(parts, tmp_path, capsys):
    out = tmp_path / "out"
    axes = ["--axes", "components", "filter"]
    stores = ["--stores", "adversarial", "targets:2"]
    assert main(arguments(parts, out, *axes, *stores)) == 0
    assert sorted(
        path.name.partition("-")[0] for path in (out / "stores").iterdir() if path.is_dir()
    ) == ["adversarial", "targets"]
    facts = json.loads((out / "filter=off/seed-1/run.json").read_text())
    assert [store["kind"] for store in facts["stores"]] == ["adversarial", "targets"]
    assert not facts["teacher_loaded"]
    table = (out / "table.md").read_text()
    assert "learn from stores (adversarial images, un-augmented and" in table
    assert main(arguments(parts, out, *axes, "--resume", "auto")) == 2
    assert "store.make" in capsys.readouterr().err


@pytest.mark.slow
def test_linear_probes_can_be_swept(parts, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["ablate", "--preset", "lp-clip-demo", "--devices", "cpu", "-o", str(out)]
    given += ["--data-dir", str(parts / "data"), "--teacher", str(parts / "teacher.safetensors")]
    given += ["--set", "eval.suites=[]", "--img-size", str(tiny.SIDE), "--batch-size", "8"]
    given += ["--seeds", "1", "--epochs", "2", "--thresholds", "0.3"]
    assert main([*given, "--dry-run"]) == 0
    assert "2 cells, 2 runs; 0 are done, 2 to do" in capsys.readouterr().out
    assert main(given) == 0
    assert set(finished(out)) == {"lp-clip/seed-0", "threshold=0.3/seed-0"}
    assert main([*given, "--resume", "auto", "--dry-run"]) == 0
    assert "2 are done, 0 to do" in capsys.readouterr().out


# Long enough to be stopped in the middle, with checkpoints only on request.
LONG = ["--axes", "filter", "--epochs", "100", "--max-steps", "0", "--seeds", "1"]
LONG += ["--val-every", "0", "--set", "log_every=5", "--set", "checkpoint.every_steps=100000"]


def start(parts, out, *more):
    command = [sys.executable, "-m", "dad_fast", *arguments(parts, out, *LONG, *more)]
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def kill_the_worker(sweep):
    """Kill the worker of a sweep that has one, as a lack of memory does."""
    (worker,) = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)


def training(out):
    """Return whether a step was logged; the attack on the first batch is logged before it."""
    logs = [path.read_text() for path in out.glob("*/seed-*/metrics.jsonl")]
    return any('"kind": "train"' in log for log in logs)


@pytest.mark.slow
def test_killed_sweep_resumes(parts, tmp_path, capsys):
    """After kill -9 of the parent its workers save and end, and the same command resumes."""
    out = tmp_path / "out"
    sweep = start(parts, out)
    wait_until(lambda: training(out))
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    # At once, while the worker may still be saving.
    assert main(arguments(parts, out, *LONG)) == 2
    assert main(arguments(parts, out, *LONG, "--resume", "auto")) == 0
    begun = re.findall("steps +([0-9]+) to 300", (out / "dad/seed-0/train.log").read_text())
    assert len(begun) == 2 and begun[0] == "0" and 0 < int(begun[1]) < 300
    assert len(finished(out)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stop_signal_saves_running_jobs(parts, tmp_path, number, code):
    out = tmp_path / "out"
    sweep = start(parts, out)
    wait_until(lambda: training(out))
    os.kill(sweep.pid, number)
    _, printed = sweep.communicate(timeout=HANG)
    assert sweep.returncode == code, printed
    assert "0 of 2 runs done; running ones are saved" in printed and "failed" not in printed
    assert list(out.glob("dad/seed-0/checkpoints/latest"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_a_worker_that_dies_fails_its_cell_alone(parts, tmp_path):
    out = tmp_path / "out"
    sweep = start(parts, out, "--no-share-batches")
    wait_until(lambda: training(out))
    kill_the_worker(sweep)
    _, printed = sweep.communicate(timeout=HANG)
    assert sweep.returncode == 1, printed
    reason = "its process died (signal SIGKILL)"
    assert f"failed: dad seed 0: {reason}; see {out}/logs/worker-0.log" in printed
    assert set(finished(out)) == {"filter=off/seed-0"}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_a_group_whose_worker_dies_resumes_in_halves(parts, tmp_path):
    out, apart = tmp_path / "out", tmp_path / "apart"
    often = ["--set", "checkpoint.every_steps=10"]
    sweep = start(parts, out, *often)
    wait_until(lambda: len(list(out.glob("*/seed-0/checkpoints/latest"))) == 2, sweep)
    kill_the_worker(sweep)
    _, printed = sweep.communicate(timeout=HANG)
    assert sweep.returncode == 0, printed
    reason = f"its process died (signal SIGKILL); see {out}/logs/worker-0.log"
    assert f"dad, filter=off, seed 0: {reason}; resuming in two halves" in printed
    assert "failed" not in printed

    assert main(arguments(parts, apart, *LONG, *often, "--no-share-batches")) == 0
    for cell in finished(apart):
        begun = re.findall("steps +([0-9]+) to 300", (out / cell / "train.log").read_text())
        assert len(begun) == 2 and begun[0] == "0" and 0 < int(begun[1]) < 300
        model, alone = (folder / cell / "model.safetensors" for folder in (out, apart))
        assert model.read_bytes() == alone.read_bytes()
        ours, theirs = (
            json.loads((folder / cell / "results.json").read_text()) for folder in (out, apart)
        )
        assert ours["suites"] == theirs["suites"] and ours["teacher"] == theirs["teacher"]


@pytest.mark.slow
def test_one_sweep_at_a_time(parts, tmp_path, capsys):
    out = tmp_path / "out"
    sweep = start(parts, out)
    wait_until(lambda: training(out))
    assert main(arguments(parts, out, *LONG, "--resume", "auto")) == 2
    assert f"process {sweep.pid} on" in capsys.readouterr().err
    sweep.terminate()
    sweep.communicate(timeout=HANG)


MISTAKES = {
    "an unknown axis": (2, "--axes", ["--axes", "filtre"]),
    "an unknown kind of store": (2, "adversarial", ["--stores", "images"]),
    "no such device": (2, "--devices", ["--devices", "gpu"]),
    "a device that is not there": (3, "cuda:7", ["--devices", "cuda:7"]),
    "jobs that are no number": (2, "--jobs", ["--jobs", "many"]),
    "a checkpoint to resume": (2, "--resume auto", ["--resume", "runs/x"]),
    "an unknown flag": (2, "--vary", ["--varies", "x=1"]),
    "a form of stored images": (2, "--store-images", ["--stores", "--store-images", "png"]),
    "one teacher of several is no file": (
        4,
        "teacher=nowhere: ",
        ["--teachers", "nowhere.safetensors"],
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_with_its_exit_code_and_writes_nothing(parts, tmp_path, capsys, what):
    code, word, more = MISTAKES[what]
    assert main(arguments(parts, tmp_path / "out", *more)) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and word in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sweep_is_left_alone(parts, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    for more in ([], ["--resume", "auto"]):
        assert main(arguments(parts, tmp_path, *more)) == 2
        assert "holds no sweep (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_help_fits_a_screen(capsys):
    assert main(["ablate", "-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
