"""A short run: each fault once, as many as fit in the time. `make chaos` is the long one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.chaos.driver import Driver, each_once
from tests.chaos.fault import FAULTS
from tests.chaos.machine import machine
from tests.chaos.not_yet import NOT_YET
from tests.chaos.report import Report

SEED = 10
#: faults that take long by their nature are for the long run
LONG_HOLD_S = 10.0
SECONDS = 150.0


def test_there_are_at_least_45_kinds_of_fault() -> None:
    assert len(FAULTS) - len(NOT_YET) >= 45
    assert NOT_YET.keys() <= FAULTS.keys()


@pytest.mark.timeout(420)
def test_faults_under_load_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    report = Report(SEED, {})
    with machine(tmp_path) as made:
        driver = Driver(made, report, random.Random(SEED))
        short = [fault for fault in each_once(SEED) if fault.hold_s[1] < LONG_HOLD_S]
        driver.run(iter(short), time.monotonic() + SECONDS)
    print(report.table())
    assert report.complaints() == ""
