"""train, precompute and report, killed at random moments: in the end the same bytes, and never a torn file on the way.

5 kills of each by default; `make test-faults` makes 100 (--fault-cycles) and can keep a record (--fault-record).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from harness import Job, kill_cycles, run_to_the_end  # noqa: E402

SMALL = [
    "data.batch_size=50", "data.workers=0", "log_every=4", "eval.every_epochs=0", "eval.suites=[]", "variants={}", "device=cpu",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}", "schedule.epochs=1", "max_steps=36",
]  # fmt: skip
SETS = [part for item in SMALL for part in ("--set", item)]
OF_THE_CLOCK = {"time", "img_per_s", "data_wait", "seconds", "train_seconds"}


def digests(folder: Path, *patterns: str) -> dict[str, Any]:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    assert files
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in OF_THE_CLOCK}
    return value


def of_a_run(folder: Path) -> dict[str, Any]:
    """Weights, optimizer and generators bit for bit; logs and results but for what the clock said."""
    rows = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "attack"]  # the check of the attack's strength, once a start
    found = digests(folder, "model.safetensors", "checkpoints/step-*/*.safetensors", "sheet.png")
    return found | {"metrics": rows, "results": timeless(json.loads((folder / "results.json").read_text()))}


def checkpoints_are_whole(folder: Path) -> None:
    """`latest` points at a folder that has its last file, whatever happened."""
    latest = folder / "checkpoints" / "latest"
    if latest.is_symlink():
        assert json.loads((latest / "state.json").read_text())["sha256"]


def page_is_whole(folder: Path) -> None:
    page = folder / "page.html"
    assert not page.exists() or page.read_text().rstrip().endswith("</html>")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "run"
    run_to_the_end(["train", "--preset", "demo", "--method", "kd", *SETS, "-o", str(folder)])
    return folder


@pytest.fixture
def jobs(request: pytest.FixtureRequest) -> dict[str, Job]:
    train = ["train", "--preset", "demo", "--method", "dad", *SETS, "--set", "checkpoint.every_steps=4", "--resume", "auto", "-o"]
    store = ["precompute", "--preset", "demo", "--images", "raw", "--block-size", "50", "--shard-blocks", "3", *SETS]
    store += ["--set", "data.train_split=val", "-o"]
    return {
        "train": Job("train", lambda folder: [*train, str(folder)], of_a_run, checkpoints_are_whole),
        "precompute": Job("precompute", lambda folder: [*store, str(folder)], lambda folder: digests(folder, "*")),
        "report": Job(
            "report",
            lambda folder: ["report", str(request.getfixturevalue("finished_run")), "-o", str(folder / "page.html")],
            lambda folder: digests(folder, "*"),
            page_is_whole,
        ),
    }


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    made: list[dict[str, Any]] = []
    yield made
    path = request.config.getoption("--fault-record")
    if path and made:
        from dad_fast.files import atomic_write_json
        from dad_fast.observe.runlog import environment

        atomic_write_json(path, {"jobs": made, "environment": environment()})


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["train", "precompute", "report"])
def test_killed_at_random_moments(
    name: str, jobs: dict[str, Job], tmp_path: Path, request: pytest.FixtureRequest, record: list[dict[str, Any]]
) -> None:
    cycles = request.config.getoption("--fault-cycles")
    found = kill_cycles(jobs[name], tmp_path, cycles if name != "report" else max(1, cycles // 2), seed=0)
    record.append(found.to_dict())
