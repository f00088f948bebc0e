"""Commands killed at random moments: the final folder is the same, and no file is ever torn.

2 kills by default. `--fault-cycles 100` is the long form, with 50 kills of report and export.
`--fault-record FILE` adds the results of each job to that file, under a lock, so that `-k train`
and `-k "not train"` may run side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from harness import Job, kill_cycles, run_to_the_end, shim

SMALL = [
    "data.batch_size=20",
    "data.workers=0",
    "log_every=4",
    "eval.every_epochs=0",
    "eval.suites=[]",
    "variants={}",
    "device=cpu",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "schedule.epochs=1",
    "max_steps=12",
]
SETS = [part for item in SMALL for part in ("--set", item)]
OF_THE_CLOCK = {
    "time",
    "img_per_s",
    "data_wait",
    "seconds",
    "train_seconds",
    "metrics_offset",
    "sha256",
    "git",
    # Names each start.
    "commands",
    # Runs that were killed before a common checkpoint are trained apart.
    "shared_by",
    "shares_batches_with",
}
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .+")


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in OF_THE_CLOCK}
    if isinstance(value, list):
        return list(map(timeless, value))
    return value


def content(path: Path) -> Any:
    """Return what must be equal of a file: its bytes, or all except times.

    Of train.log, which records each start, the form.
    """
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_dir():
        return "a folder"
    if path.name == "metrics.jsonl":
        rows = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        # The checks of the first batch run once per start.
        return [row for row in rows if row["kind"] not in ("attack", "discretizer")]
    if path.name == "train.log":
        return all(map(LOG_LINE.fullmatch, path.read_text().splitlines()))
    if path.name in ("results.json", "run.json", "state.json"):
        return timeless(json.loads(path.read_text()))
    if path.name == "report.html":
        # The page shows throughput.
        return path.read_text().rstrip().endswith("</html>")
    if path.name == "table.md":
        # So does the table, in seconds.
        return len(path.read_text().splitlines()) > 2
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, Any]:
    """Return the content of every file: an additional (temporary) file is a difference, too."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def checkpoints_are_whole(folder: Path) -> None:
    """Assert that `latest` points to a folder with its last file, at any time."""
    for latest in folder.rglob("checkpoints/latest"):
        assert json.loads((latest / "state.json").read_text())["sha256"]


def export_is_whole(folder: Path) -> None:
    """Assert that the earlier or the new export is whole.

    Between two renames there may be none; the next export restores it.
    """
    record = folder / "export" / "export.json"
    if record.exists():
        for name, digest in json.loads(record.read_text())["files"].items():
            assert hashlib.sha256((record.parent / name).read_bytes()).hexdigest() == digest


def page_is_whole(folder: Path) -> None:
    page = folder / "page.html"
    assert not page.exists() or page.read_text().rstrip().endswith("</html>")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "run"
    run_to_the_end(
        ["train", "--preset", "demo", "--method", "kd", *SETS, "-o", str(folder)], **shim()
    )
    return folder


@pytest.fixture
def jobs(finished_run: Path) -> dict[str, Job]:
    train = [
        *shlex.split("train --preset demo --method dad"),
        *SETS,
        *shlex.split("--set checkpoint.every_steps=4 --resume auto -o"),
    ]
    students = [*train[:-1], "--student", "resnet18", "resnet26", "-o"]
    store = [
        *shlex.split("precompute --preset demo --images raw --block-size 50 --shard-blocks 3"),
        *SETS,
    ]
    store += ["--set", "data.train_split=val", "-o"]
    report = ["report", str(finished_run), "-o"]
    export = ["export", str(finished_run), "--overwrite", "-o"]
    return {
        "train": Job(
            "train", lambda folder: [*train, str(folder)], contents, checkpoints_are_whole
        ),
        "students": Job(
            "students", lambda folder: [*students, str(folder)], contents, checkpoints_are_whole
        ),
        "precompute": Job("precompute", lambda folder: [*store, str(folder)], contents),
        "report": Job(
            "report",
            lambda folder: [*report, str(folder / "page.html")],
            contents,
            page_is_whole,
            rewrites=True,
        ),
        "export": Job(
            "export",
            lambda folder: [*export, str(folder / "export")],
            contents,
            export_is_whole,
            rewrites=True,
        ),
    }


def add_to_record(path: Path, job: dict[str, Any]) -> None:
    """Add the job's row to the file, or replace it, under a lock for other processes."""
    from dad_fast.files import atomic_write_json
    from dad_fast.locks import locked
    from dad_fast.loggers.environment import environment

    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), wait=True):
        rows = json.loads(path.read_text())["jobs"] if path.exists() else []
        rows = [row for row in rows if row["job"] != job["job"]]
        rows.append({**job, "environment": environment()})
        atomic_write_json(path, {"jobs": sorted(rows, key=lambda row: row["job"])})


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    [
        "train",
        pytest.param("students", marks=pytest.mark.slow),
        "precompute",
        "report",
        "export",
    ],
)
def test_result_after_kills_is_bit_exact(
    name: str, jobs: dict[str, Job], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cycles = request.config.getoption("--fault-cycles")
    record = request.config.getoption("--fault-record")
    if name in ("report", "export"):
        cycles = max(1, cycles // 2)
    found = kill_cycles(jobs[name], tmp_path, cycles, seed=0)
    if record:
        add_to_record(Path(record), found.to_dict())
