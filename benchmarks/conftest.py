"""`pytest benchmarks/ --benchmark`: options, the `bench` fixture, tables and records. Without --benchmark the folder skips.

pytest-benchmark may be installed as well: its options all begin with --benchmark- and its fixture is `benchmark`; neither is touched.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.bench import SIZES, Bench, Session, default_size
from benchmarks.record import as_text, make_record, read_record, record_path, write_record

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dad-fast benchmarks")
    group.addoption("--benchmark", dest="run_benchmarks", action="store_true", help="run the benchmarks of benchmarks/")
    group.addoption("--bench-size", choices=SIZES, help="models and inputs; by default what the device can hold")
    group.addoption("--bench-device", default="auto", help="auto, cpu or cuda[:N]")
    group.addoption("--bench-out", default="runs/benchmarks", metavar="DIR", help="folder of the records [runs/benchmarks]")
    group.addoption("--overhead-compare", metavar="RECORD", help="exit 1 when DAD's overhead over KD grew since this record of steps")
    group.addoption("--fail-over", default="5%", metavar="SHARE", help="how much it may grow [5%%]")
    group.addoption("--append-history", action="store_true", help="append the overheads to benchmarks/history.jsonl")


def pytest_configure(config: pytest.Config) -> None:
    config._bench_session = None  # type: ignore[attr-defined]
    config._bench_problems = []  # type: ignore[attr-defined]
    if not config.getoption("run_benchmarks", False):  # absent when this file is found late, as by `pytest .`
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark: timings need the machine for themselves; leave out -n")
    try:
        overhead.parse_share(config.getoption("fail_over"))
        if config.getoption("overhead_compare"):
            config._bench_before = read_record(config.getoption("overhead_compare"))  # type: ignore[attr-defined]
    except ValueError as error:
        raise pytest.UsageError(f"--benchmark: {error}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("run_benchmarks", False):
        return
    reason = pytest.mark.skip(reason="a benchmark: run with --benchmark")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(reason)


@pytest.fixture(scope="session")
def _bench_session(request: pytest.FixtureRequest) -> Session:
    from dad_fast.engine.build import resolve_device

    config = request.config
    device = resolve_device(config.getoption("bench_device"))
    session = Session(device, config.getoption("bench_size") or default_size(device))
    config._bench_session = session  # type: ignore[attr-defined]
    return session


@pytest.fixture
def bench(request: pytest.FixtureRequest, _bench_session: Session) -> Bench:
    """Times functions for the group that the file test_<group>.py names."""
    return Bench(_bench_session, request.path.stem.removeprefix("test_"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    bench: Session | None = config._bench_session  # type: ignore[attr-defined]
    problems: list[str] = config._bench_problems  # type: ignore[attr-defined]
    if not config.getoption("run_benchmarks", False) or config.option.collectonly:
        return
    wanted = {item.path.stem for item in session.items}
    if "test_steps" in wanted and not (bench and bench.groups.get("steps")):
        problems.append("no step benchmark ran")
    records = [make_record(g, bench.size, rows, bench.machine, bench.seconds) for g, rows in bench.groups.items()] if bench else []
    config._bench_records = records  # type: ignore[attr-defined]
    for record in records:
        assert bench is not None
        write_record(record_path(config.getoption("bench_out"), record, bench.machine.slug), record)
        if config.getoption("append_history"):
            overhead.append_history(record, bench.machine.slug)
    if config.getoption("overhead_compare"):
        steps = [record for record in records if record["group"] == "steps"]
        limit = overhead.parse_share(config.getoption("fail_over"))
        problems += overhead.grown(config._bench_before, steps[0] if steps else None, limit)  # type: ignore[attr-defined]
    if problems and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for record in getattr(config, "_bench_records", []):
        bench: Session = config._bench_session  # type: ignore[attr-defined]
        path = record_path(config.getoption("bench_out"), record, bench.machine.slug)
        terminalreporter.section(f"{record['group']}, size {record['size']}, {bench.machine.slug}")
        for comparison in record["comparisons"]:
            terminalreporter.write_line(as_text(comparison) + "\n")
        if record["machine"]["device"]["kind"] == "cpu":
            terminalreporter.write_line("On a CPU: ratios only, and only for these models; they say nothing about a GPU.")
        others = record["machine"]["cpu_share_of_others"]
        if others is not None and others > 0.1:
            what = "spreads are wide and ratios doubtful"
            terminalreporter.write_line(f"Other processes took {others:.0%} of all cores' time meanwhile: {what}.")
        terminalreporter.write_line(f"record: {path}")
    for problem in config._bench_problems:  # type: ignore[attr-defined]
        terminalreporter.write_line(f"benchmarks: {problem}", red=True)
