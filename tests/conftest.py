"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import system_packages

TESTS = Path(__file__).parent
#: the folder of a test says what it needs; tests of the other folders need nothing
MARKS_OF_FOLDERS = {
    "slow": ("slow",),
    "servers": ("servers",),
    "chaos": ("servers",),
    "real": ("servers", "real"),
    "gpu": ("servers", "real", "gpu"),
}

# the stand-ins are started by `env python3`: this Python's own, not a version manager's shim that
# takes ten times as long
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# by --hypothesis-profile; see tests/support/examples.py
# how long a busy machine takes to make examples says nothing of the tests
settings.register_profile("thorough", suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fast", settings.get_profile("thorough"), max_examples=10)
settings.load_profile("thorough")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by its folder; of several processes (--dist loadgroup), one gets a whole file.

    One process gets all tests of the real llama-server: its threads take every core there is.
    """
    folder = item.path.relative_to(TESTS).parts[0]
    for mark in MARKS_OF_FOLDERS.get(folder, ()):
        item.add_marker(mark)
    group = "real" if "real" in MARKS_OF_FOLDERS.get(folder, ()) else str(item.path)
    item.add_marker(pytest.mark.xdist_group(group))


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
