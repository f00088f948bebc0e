"""`pytest --check-skips`: table of skips by reason; fail on a reason not in allowed_skips.toml."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.markers import Marker

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.toml")


class SkipReport:
    """Plugin of the process that reports. Under xdist, the controller gets the workers' skips."""

    def __init__(self, config: pytest.Config, allowed: Path = ALLOWED_SKIPS) -> None:
        self.config = config
        self.patterns = load_patterns(allowed)

    def counts(self) -> Counter[str]:
        """Return the number of skipped tests, or of test files skipped as a whole, by reason."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        return Counter(reason_of(report) for report in reporter.stats.get("skipped", []))

    def is_allowed(self, reason: str) -> bool:
        return any(pattern.fullmatch(reason) for pattern in self.patterns)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and not all(map(self.is_allowed, self.counts())):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counts = self.counts()
        terminalreporter.section("skips by reason")
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            mark = "" if self.is_allowed(reason) else "NOT ALLOWED: "
            terminalreporter.line(f"{count:5}  {mark}{reason}", red=bool(mark))
        terminalreporter.line(f"{counts.total():5}  in all")
        unknown = sum(not self.is_allowed(reason) for reason in counts)
        if unknown:
            fix = "make these tests run, or add the reason with its why"
            terminalreporter.line(
                f"error: {unknown} reason(s) not in {ALLOWED_SKIPS.name}: {fix}", red=True
            )


def load_patterns(path: Path) -> list[re.Pattern[str]]:
    """Read the reasons for this machine: entries without `when`, or whose marker is true here."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["skip"]
    for entry in entries:
        if not {"reason", "why"} <= entry.keys() <= {"reason", "why", "when"}:
            raise pytest.UsageError(
                f"{path.name}: an entry has reason, why and perhaps when, not {', '.join(entry)}"
            )
    return [
        re.compile(entry["reason"])
        for entry in entries
        if "when" not in entry or Marker(entry["when"]).evaluate()
    ]


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return a skip's reason in one line; pytest stores (file, line, 'Skipped: reason')."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())
