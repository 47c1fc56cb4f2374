"""In CI a skipped test is a failure, unless `tests/allowed_skips.txt` names it with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ALLOWED = Path(__file__).parents[1] / "allowed_skips.txt"


def allowed() -> set[str]:
    """Node ids that may be skipped: the first word of each line that is not a comment."""
    lines = ALLOWED.read_text().splitlines()
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


class NoSkips:
    """Collects skipped tests, on the controller of a parallel run too."""

    def __init__(self) -> None:
        self.skipped: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped - allowed() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid in sorted(self.skipped - allowed()):
            terminalreporter.write_line(f"SKIPPED IN CI, NOT ALLOWED: {nodeid}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Watch for skips where CI says so; workers of a parallel run report to their controller."""
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(NoSkips(), "no_skips")
