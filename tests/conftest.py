"""What all tests share."""

from __future__ import annotations

import pytest

from tests.support import system_packages


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were skipped for want of Debian packages; pytest's own line comes after."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    skipped = {
        name: count
        for name in system_packages.PACKAGES
        if (count := sum(system_packages.reason(name) in reason for reason in reasons))
    }
    if skipped:
        terminalreporter.section("Debian packages that are missing")
        for line in system_packages.advice(skipped):
            terminalreporter.line(line)
