"""Who judges the proxy in chaos and soak must see what is wrong."""

from __future__ import annotations

import socket
import threading

import pytest

from bench.vitals import verdict
from tests.chaos.client import Answer, Failure, read_answer
from tests.chaos.judge import OK, WRONG, judge
from tests.chaos.load import Done
from tests.chaos.report import Line, Report

EVENT = b'data: {"choices": []}\n\n'


def read(sent: bytes) -> Answer:
    """Return what the strict client makes of these bytes and the end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=lambda: (theirs.sendall(sent), theirs.close()))
        writer.start()
        answer = read_answer(ours)
        writer.join()
    return answer


@pytest.mark.parametrize(
    ("sent", "failure"),
    [
        (b"", Failure.RESET),
        (b"HTTP/1.1 200 OK\r\nContent-Le", Failure.TORN),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", Failure.TORN),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", Failure.TORN),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", Failure.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", Failure.MALFORMED),
        (b"\x00garbage\r\n\r\n", Failure.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", None),
    ],
)
def test_the_client_sees_how_an_answer_fails(sent: bytes, failure: Failure | None) -> None:
    assert read(sent).failure == failure


def test_who_waits_too_long_hangs() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert read_answer(ours, end=0.0).failure == Failure.LATE


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (EVENT + b"data: [DONE]\n\n", OK),
        (EVENT + b'data: {"error": {"code": "backend_failed"}}\n\n', "backend_failed"),
        (b": a sign of life\n\n" + EVENT + b"data: [DONE]\n\n", OK),
        (EVENT, Failure.TORN),
        (EVENT + b"data: [DONE]", Failure.MALFORMED),
        (EVENT + b'data: {"cho\n\n', Failure.MALFORMED),
        (EVENT + b"nonsense\n\n", Failure.MALFORMED),
        (b"", Failure.MALFORMED),
    ],
)
def test_a_stream_must_end_as_streams_do(body: bytes, word: str) -> None:
    assert judge("stream", Answer(status=200, body=body)).word == word


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (Answer(status=200, body=b'{"choices": [{"message": {"content": "x"}}]}'), OK),
        (Answer(status=200, body=b'{"choices": [{"message": {"content": ""}}]}'), WRONG),
        (Answer(status=200, body=b'{"choices": ['), Failure.MALFORMED),
        (Answer(status=500, body=b"{}"), WRONG),
    ],
)
def test_a_whole_answer_must_be_one(answer: Answer, word: str) -> None:
    assert judge("plain", answer).word == word


def test_an_error_must_say_the_same_in_head_and_body() -> None:
    body = b'{"error": {"message": "m", "code": "pool_busy"}}'
    for code, word in (("pool_busy", "pool_busy"), ("queue_full", WRONG)):
        headers = (("x-smartproxy-error", code),)
        assert judge("plain", Answer(status=503, headers=headers, body=body)).word == word


def test_what_a_fault_does_not_allow_is_lost() -> None:
    line = Line("a fault", "servers")
    failures = [Answer(failure=how) for how in (Failure.TORN, Failure.RESET, Failure.LATE)]
    done = [
        Done(kind="plain", model="m", began=0, ended=1, verdict=judge("plain", answer))
        for answer in failures
    ]
    line.add(done, frozenset({Failure.TORN}))
    assert (line.requests, line.errors.total(), line.lost.total(), line.hung) == (3, 1, 1, 1)
    report = Report(1, {}, lines={"a fault": line})
    assert not report.clean
    assert "servers: a fault: plain m: reset" in report.complaints()


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([50.0] * 40, True),
        ([50.0 + 0.5 * n for n in range(40)], False),
        ([50.0 + min(n, 15) for n in range(40)], True),
        ([50.0 + (n % 2) for n in range(40)], True),
    ],
)
def test_memory_that_goes_on_growing_is_not_level(values: list[float], level: bool) -> None:
    points = [(60.0 * number, value) for number, value in enumerate(values)]
    assert verdict("rss_mb", points)["level"] is level
