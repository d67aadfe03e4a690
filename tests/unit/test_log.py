"""Logs: one line an event, to stderr."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from smartproxy.log import setup_logging

logger = logging.getLogger("smartproxy.somewhere")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("smartproxy")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])


def test_line_has_time_level_logger_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info")
    logger.info("server %s starting->ready", 7)
    logger.debug("not this")
    line = capsys.readouterr().err
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert re.fullmatch(rf"{moment} INFO smartproxy.somewhere server 7 starting->ready\n", line)


def test_text_from_outside_can_not_start_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    logger.info("model %s not found", "x\r\n2026 ERROR fake\u2028\x1b[31m")
    assert capsys.readouterr().err.endswith("model x 2026 ERROR fake [31m not found\n")


def test_traceback_is_indented_for_errors_and_folded_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging()
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logger.warning("odd", exc_info=True)
        logger.exception("broken")
    warning, error, *trace = capsys.readouterr().err.splitlines()
    assert warning.endswith("WARNING smartproxy.somewhere odd (ValueError: first second)")
    assert error.endswith("ERROR smartproxy.somewhere broken")
    assert trace[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in trace)


def test_other_packages_speak_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("debug")
    logging.getLogger("werkzeug.serving").info("job ran")
    logging.getLogger("werkzeug.serving").warning("job missed")
    logger.debug("ours")
    said = capsys.readouterr().err
    assert "job ran" not in said
    assert "job missed" in said
    assert "ours" in said


def test_level_above_warning_holds_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(logging.ERROR)
    logging.getLogger("urllib3").warning("theirs")
    logger.warning("ours")
    assert capsys.readouterr().err == ""


def test_setting_up_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    logger.info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging("loud")
