"""What the log says of something that does not work for a while."""

from __future__ import annotations

import logging

import pytest

from smartproxy.log import Outage

ERROR = OSError("no such file")


@pytest.fixture
def outage() -> Outage:
    return Outage(
        logging.getLogger("smartproxy.test"), what="can't be read", over="is back", after_s=5.0
    )


def test_a_short_one_is_not_told(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    for now in (100.0, 102.0, 104.9):
        outage.failed(ERROR, now)
    outage.worked(105.0)
    outage.failed(ERROR, 106.0)  # begins anew
    outage.failed(ERROR, 110.0)
    assert caplog.messages == []


def test_a_long_one_is_told_once_and_its_end_once(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for now in (100.0, 105.0, 106.0, 200.0):
        outage.failed(ERROR, now)
    outage.worked(201.0)
    outage.worked(202.0)
    assert caplog.messages == [
        "can't be read, for 5 s now: no such file",
        "is back, after 101 s",
    ]


def test_what_works_now_and_then_is_not_over(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage(
        logging.getLogger("smartproxy.test"), what="fails", over="works", after_s=0, calm_s=2.0
    )
    for now in (100.0, 101.0, 102.0):
        outage.failed(ERROR, now)
        outage.worked(now + 0.5)
    assert caplog.messages == ["fails, for 0 s now: no such file"]
    outage.worked(104.0)
    assert caplog.messages[1:] == ["works, after 4 s"]
