"""Our online steps against the DAD authors' own code, with equal weights, batch and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.authors import COMMIT, AuthorsStep
from benchmarks.bench import Bench
from benchmarks.test_steps import STEPS, one_step
from benchmarks.workload import make_workload

# Row -> the step of the group `steps`.
OURS = {
    "ours, authors' order": "dad, authors' order",
    "ours, paper's order": "dad, paper's order",
}


def test_authors(bench: Bench, request: pytest.FixtureRequest) -> None:
    clone = request.config.getoption("authors_code")
    if not clone:
        pytest.skip("needs --authors-code DIR: a clone of the authors' repository")
    if bench.size == "tiny":
        pytest.skip("the authors' group norms need 32 channels: sizes base and paper")
    pytest.importorskip("einops", reason="the authors' VQGAN needs einops")
    cuda = bench.device.type == "cuda"
    work = make_workload(bench.size, bench.device, bench.session.batch_size or (64 if cuda else 4))
    baseline = "the authors' code"
    steps: dict[str, Callable[[], object]] = {baseline: AuthorsStep(work, Path(clone))}
    if cuda:
        steps["the authors' code, autocast, channels_last"] = AuthorsStep(
            work, Path(clone), fast=True
        )
    for name, step in OURS.items():
        steps[name] = one_step(work, step)

    flops = work.flops
    # Their step also runs the teacher forward once more, for a filter that never filters.
    counted = {name: flops.of_step(*STEPS[step][:2]) for name, step in OURS.items()}
    theirs = flops.of_step("dad", "authors") + flops.of["teacher"]
    counted |= {name: theirs for name in steps if name not in OURS}
    bench.compare(
        f"batch {len(work.batch.labels)}",
        steps,
        baseline=baseline,
        work=len(work.batch.labels),
        config=work.describe() | {"authors_commit": COMMIT},
        flops=counted,
        energy=True,
        seconds=25,
    )
