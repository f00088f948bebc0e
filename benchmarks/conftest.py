"""`pytest benchmarks/ --benchmark`: options, the `bench` fixture, tables and records. Without
--benchmark all tests skip.

pytest-benchmark may be installed as well: its options start with --benchmark- and its fixture is
`benchmark`, so nothing collides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import overhead
from benchmarks.record import SIZES, Record, as_text, read_record, record_path
from dad_fast.allocator import use_expandable_segments

if TYPE_CHECKING:  # torch is imported when the first benchmark runs
    from benchmarks.bench import Bench, Session

HERE = Path(__file__).parent
# As in a run, before torch is imported.
use_expandable_segments()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dad-fast benchmarks")
    group.addoption(
        "--benchmark",
        dest="run_benchmarks",
        action="store_true",
        help="run the benchmarks of benchmarks/",
    )
    group.addoption("--bench-size", choices=SIZES, help="models and inputs [what fits the device]")
    group.addoption(
        "--bench-batch",
        type=int,
        default=0,
        metavar="N",
        help="images of a batch in steps and stored [each group's own]",
    )
    group.addoption("--bench-device", default="auto", help="auto, cpu or cuda[:N]")
    group.addoption(
        "--bench-out",
        default="runs/benchmarks",
        metavar="DIR",
        help="folder of the records [runs/benchmarks]",
    )
    group.addoption(
        "--bench-rounds",
        type=int,
        default=0,
        metavar="N",
        help="rounds of every comparison, without energy; 0 = by time [0]",
    )
    group.addoption(
        "--authors-code",
        metavar="DIR",
        help="clone of the DAD authors' repository, for the group authors",
    )
    group.addoption(
        "--overhead-compare",
        metavar="RECORD",
        help="exit 1 if DAD's overhead over KD grew since this record of steps",
    )
    group.addoption("--fail-over", default="5%", metavar="SHARE", help="allowed growth [5%%]")
    group.addoption(
        "--append-history",
        action="store_true",
        help="append the overheads to benchmarks/history.jsonl",
    )


@dataclass
class State:
    session: Session | None = None
    before: Record | None = None  # the record of --overhead-compare
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


STATE = pytest.StashKey[State]()


def pytest_configure(config: pytest.Config) -> None:
    state = config.stash[STATE] = State()
    # The option is absent when pytest finds this file late, as with `pytest .`.
    if not config.getoption("run_benchmarks", False):
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark: timings need the whole machine; leave out -n")
    try:
        overhead.parse_share(config.getoption("fail_over"))
        if config.getoption("overhead_compare"):
            state.before = read_record(config.getoption("overhead_compare"))
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
    from benchmarks.bench import Session, default_size
    from dad_fast.distributed.device import resolve_device

    config = request.config
    device = resolve_device(config.getoption("bench_device"))
    session = Session(
        device,
        config.getoption("bench_size") or default_size(device),
        Path(config.getoption("bench_out")),
        batch_size=config.getoption("bench_batch"),
        rounds=config.getoption("bench_rounds"),
    )
    config.stash[STATE].session = session
    return session


@pytest.fixture
def bench(request: pytest.FixtureRequest, _bench_session: Session) -> Iterator[Bench]:
    """Time functions for the group of the file test_<group>.py."""
    from benchmarks.bench import Bench
    from dad_fast.engine.choices import fast_convolutions

    with fast_convolutions(_bench_session.device):
        yield Bench(_bench_session, request.path.stem.removeprefix("test_"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config, state = session.config, session.config.stash[STATE]
    if not config.getoption("run_benchmarks", False) or config.option.collectonly:
        return
    bench = state.session
    if bench is not None:
        state.records = bench.write()
        if config.getoption("append_history"):
            for record in state.records:
                overhead.append_history(record, bench.machine.slug)
    steps = next((record for record in state.records if record["group"] == "steps"), None)
    if steps is None and any(item.path.stem == "test_steps" for item in session.items):
        state.problems.append("no step benchmark ran")
    if state.before is not None:
        state.problems += overhead.grown(
            state.before, steps, overhead.parse_share(config.getoption("fail_over"))
        )
    if state.problems and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    state, write = config.stash[STATE], terminalreporter.write_line
    for record in state.records:
        assert state.session is not None
        slug = state.session.machine.slug
        terminalreporter.section(f"{record['group']}, size {record['size']}, {slug}")
        for comparison in record["comparisons"]:
            write(as_text(comparison) + "\n")
        if record["machine"]["device"]["kind"] == "cpu":
            write(
                "On a CPU only the ratios of these models count; they do not carry over to a GPU."
            )
        others = record["machine"]["cpu_share_of_others"]
        if others is not None and others > 0.1:
            write(f"Other processes took {others:.0%} of all cores' time: check the quartiles.")
        write(f"record: {record_path(config.getoption('bench_out'), record, slug)}")
    for problem in state.problems:
        write(f"benchmarks: {problem}", red=True)
