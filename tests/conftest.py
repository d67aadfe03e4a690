"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler.loadscope import LoadScopeScheduling

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
    """Mark a test by its folder."""
    folder = item.path.relative_to(TESTS).parts[0]
    for mark in MARKS_OF_FOLDERS.get(folder, ()):
        item.add_marker(mark)


class ByFile(LoadScopeScheduling):
    """Gives each of several processes whole files, for what a file starts it starts once.

    One process gets all tests of the real llama-server: its threads take every core there is.
    (xdist's own groups do nothing with pytest 9.2: it no longer takes a name they give a test.)
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        folder = path.removeprefix("tests/").split("/", 1)[0]
        return "real" if "real" in MARKS_OF_FOLDERS.get(folder, ()) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    """Called by xdist; `--dist loadscope` means by file here."""
    return ByFile(config, log) if config.getoption("dist") == "loadscope" else None


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
