"""What the relay makes of servers that die, clients that go, and models that take their time."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.gunicorns import Gunicorn, gunicorn
from tests.support.ports import free_port
from tests.support.upstreams import (
    Upstream,
    Visit,
    chunk,
    event_head,
    plain_answer,
    wait_until,
)
from tests.support.wire import PAGE, Answer, Wire

TIMES = {"RELAY_TEST_REQUEST_TIMEOUT_S": "1", "RELAY_TEST_COMMENT_AFTER_S": "0.15"}


@pytest.fixture(scope="module", params=["framework", "plain"])
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gunicorn]:
    """A proxy whose application sees every request, and one that decides on plain ones itself."""
    env = {"RELAY_TEST_PLAIN": "1"} if request.param == "plain" else {}
    with gunicorn(tmp_path_factory.mktemp("faults"), env=env) as started:
        yield started
        if env:
            assert started.health()["plain"] > 0


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A proxy with short times."""
    with gunicorn(tmp_path_factory.mktemp("hasty"), env=TIMES) as started:
        yield started


def error_code(answer: Answer) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.header("x-smartproxy-error") == error["code"]
    return str(error["code"])


def final_event(answer: Answer) -> bytes:
    return answer.body.rstrip(b"\n").rpartition(b"\n\n")[2]


def is_well(wire: Wire) -> bool:
    """Whether the connection still serves a request."""
    return wire.send(b"GET /health HTTP/1.1\r\nHost: p\r\n\r\n").read_answer().status == 200


# --- servers that fail before they answer ----------------------------------------------------


def drop(visit: Visit) -> None:
    """Close without a word."""


def stop_in_the_head(visit: Visit) -> None:
    visit.send(b"HTTP/1.1 200 OK\r\nContent-")


def speak_nonsense(visit: Visit) -> None:
    visit.send(b"220 smtp.example.org\r\n\r\n")


def switch_protocols(visit: Visit) -> None:
    visit.send(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n")


BAD_STARTS = [drop, stop_in_the_head, speak_nonsense, switch_protocols, Visit.reset]


@pytest.mark.parametrize("script", BAD_STARTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_sent_again_to_another_server(
    proxy: Gunicorn, script: Callable[[Visit], None], stream: bool
) -> None:
    with Upstream(script) as bad, Upstream(lambda v: v.send(plain_answer(b"{}"))) as good:
        with proxy.connect() as wire:
            body = {"model": f"{bad.port},{good.port}", "stream": stream}
            assert wire.post("/x", body).read_answer().body == b"{}"
            assert is_well(wire)
        assert good.visit().body == bad.visit().body
    proxy.wait_idle()


def test_a_server_that_refuses_connections_is_avoided_too(proxy: Gunicorn) -> None:
    with Upstream(lambda v: v.send(plain_answer(b"{}"))) as good, proxy.connect() as wire:
        answer = wire.post("/x", {"model": f"{free_port()},{good.port}"}).read_answer()
        assert answer.body == b"{}"


@pytest.mark.parametrize("script", BAD_STARTS, ids=lambda script: script.__name__)
def test_a_second_failure_is_backend_failed(
    proxy: Gunicorn, script: Callable[[Visit], None]
) -> None:
    with Upstream(script) as bad, proxy.connect() as wire:
        answer = wire.post("/x", {"model": str(bad.port), "stream": True}).read_answer()
        assert (answer.status, error_code(answer)) == (502, "backend_failed")
        assert is_well(wire)
        assert len(bad.visits) == 2
    proxy.wait_idle()


def test_a_server_that_answers_without_reading_the_body_is_heard(proxy: Gunicorn) -> None:
    def refuse(visit: Visit) -> None:
        visit.send(plain_answer(b'{"error": 1}', status=b"413 Too Large"))
        visit.sock.shutdown(socket.SHUT_WR)
        visit.wait_gone()

    with Upstream(refuse, read_body=False) as upstream, proxy.connect() as wire:
        body = b'{"model": "%d", "pad": "%b"}' % (upstream.port, b"y" * (8 << 20))
        assert wire.post("/x", body).read_answer().status == 413


# --- servers that fail in the middle ---------------------------------------------------------


@pytest.mark.parametrize("end", [drop, Visit.reset], ids=["closes", "resets"])
def test_a_stream_whose_server_dies_ends_with_an_error_event(
    proxy: Gunicorn, end: Callable[[Visit], None]
) -> None:
    def script(visit: Visit) -> None:
        visit.send(event_head() + chunk(b"data: 1\n\n") + b"30\r\ndata: half")
        assert seen.recv(1)
        end(visit)

    seen, tell = socket.socketpair()
    with Upstream(script) as upstream, proxy.connect() as wire, seen, tell:
        wire.post("/x", {"model": str(upstream.port), "stream": True})
        status, headers = wire.read_head()
        assert wire.read_chunk() == b"data: 1\n\n"
        tell.send(b"x")
        answer = Answer(status, headers, wire.read_chunk())
        assert b"half" not in answer.body
        assert b'"code":"backend_failed"' in final_event(answer)
        assert wire.read_chunk() == b""
        assert is_well(wire)
    proxy.wait_idle()


def test_a_huge_chunk_that_breaks_off_closes_the_connection(proxy: Gunicorn) -> None:
    def script(visit: Visit) -> None:
        visit.send(event_head() + b"fffff\r\ndata: " + b"x" * 300_000)

    with Upstream(script) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port), "stream": True}).read_head()
        assert b"error" not in wire.read_to_end()


@pytest.mark.parametrize(
    "data",
    [plain_answer(b"{}" * 50)[:-1], event_head().replace(b"event-stream", b"plain") + b"5\r\nab"],
    ids=["length", "chunks"],
)
def test_an_answer_that_is_no_stream_and_breaks_off_closes_the_connection(
    proxy: Gunicorn, data: bytes
) -> None:
    with Upstream(lambda visit: visit.send(data)) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port)}).read_head()
        with pytest.raises(AssertionError, match="missing"):
            wire.read_exactly(1000)
        assert len(upstream.visits) == 1
    proxy.wait_idle()


# --- the broker's answers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "retry_after"),
    [("queue_full", 429, "5"), ("model_load_failed", 503, None), ("load_timeout", 504, None)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_status_and_code(
    proxy: Gunicorn, code: str, status: int, retry_after: str | None, stream: bool
) -> None:
    with proxy.connect() as wire:
        answer = wire.post("/x", {"model": f"!{code}", "stream": stream}).read_answer()
        assert (answer.status, error_code(answer)) == (status, code)
        assert answer.header("retry-after") == retry_after
        assert is_well(wire)


ORIGIN = f"Origin: {PAGE}\r\n"
OTHER = "Content-Type: application/json\r\nOrigin: https://other.example\r\n"


@pytest.mark.parametrize(("extra", "allowed"), [(ORIGIN, PAGE), (OTHER, None), ("", None)])
def test_pages_that_are_allowed_may_read_a_refusal_of_the_relay(
    proxy: Gunicorn, extra: str, allowed: str | None
) -> None:
    with proxy.connect() as wire:
        answer = wire.post("/x", {"model": "!queue_full"}, extra).read_answer()
    assert answer.status == 429
    assert answer.header("access-control-allow-origin") == allowed
    assert answer.header("x-smartproxy-error") == "queue_full"


def test_a_stream_that_waits_and_is_refused_can_be_read_by_pages(
    hasty: Gunicorn, tmp_path: Path
) -> None:
    model = f"!model_load_failed@{tmp_path / 'gate'}"
    with hasty.connect() as wire:
        wire.post("/x", {"model": model, "stream": True}, ORIGIN)
        status, headers = wire.read_head()
        assert status == 200
        assert ("Access-Control-Allow-Origin", PAGE) in headers
        (tmp_path / "gate").touch()
        assert b'"code":"model_load_failed"' in rest_of(wire)


def test_a_head_without_end_is_refused_in_our_shape(proxy: Gunicorn) -> None:
    with proxy.connect() as wire:
        head = f"GET / HTTP/1.1\r\n{ORIGIN}X: "
        answer = wire.send(head.encode() + b"x" * 70000).read_answer()
        assert (answer.status, error_code(answer)) == (431, "request_too_large")
        assert answer.header("access-control-allow-origin") == PAGE
        assert answer.header("connection") == "close"


# --- clients that go -------------------------------------------------------------------------


def leave(wire: Wire, how: str) -> None:
    if how == "reset":
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half close":
        wire.sock.shutdown(socket.SHUT_WR)
    else:
        wire.sock.close()


#: a half-closed client may still read until its answer began: test_hostile.py
LEAVING = pytest.mark.parametrize("how", ["close", "reset"])


@LEAVING
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_its_model_loads_is_forgotten(
    proxy: Gunicorn, tmp_path: Path, how: str, stream: bool
) -> None:
    before = proxy.health()
    with proxy.connect() as wire:
        wire.post("/x", {"model": f"1@{tmp_path}/never", "stream": stream})
        wait_until(lambda: proxy.health().get("asked", 0) > before.get("asked", 0), "acquire")
        leave(wire, how)
        cancelled = before.get("cancelled", 0) + 1
        wait_until(lambda: proxy.health().get("cancelled") == cancelled, "acquire cancelled")


BEGUN = (event_head(), plain_answer(b"x" * 10)[:-5])
GOING = [
    *((how, begun) for how in ("close", "reset") for begun in (b"", *BEGUN)),
    *(("half close", begun) for begun in BEGUN),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("how", "sent_first"), GOING)
def test_a_client_that_goes_stops_the_server(
    proxy: Gunicorn, how: str, stream: bool, sent_first: bytes
) -> None:
    def script(visit: Visit) -> None:
        visit.send(sent_first)
        visit.wait_gone()

    with Upstream(script) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port), "stream": stream})
        upstream.visit()
        if sent_first:
            wire.read_head()
        leave(wire, how)
        wait_until(upstream.visit().gone.is_set, "the server's connection closed")
    proxy.wait_idle()


def test_a_client_that_goes_with_unread_tokens_stops_the_server(proxy: Gunicorn) -> None:
    def script(visit: Visit) -> None:
        visit.send(event_head())
        while True:  # ends when the relay closes its side: sending fails
            visit.send(chunk(b"data: " + b"x" * 1000 + b"\n\n"))

    with Upstream(script) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port), "stream": True}).read_head()
        wire.sock.close()
        proxy.wait_idle()


# --- time ------------------------------------------------------------------------------------


def test_a_silent_server_is_an_upstream_timeout(hasty: Gunicorn) -> None:
    with Upstream(Visit.wait_gone) as upstream, hasty.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port)}).read_answer()
        assert (answer.status, error_code(answer)) == (504, "upstream_timeout")
        wait_until(upstream.visit().gone.is_set, "the server's connection closed")
        assert len(upstream.visits) == 1


def test_a_stream_that_falls_silent_ends_with_the_timeout(hasty: Gunicorn) -> None:
    def script(visit: Visit) -> None:
        visit.send(event_head() + chunk(b"data: 1\n\n"))
        visit.wait_gone()

    with Upstream(script) as upstream, hasty.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port), "stream": True}).read_answer()
        assert answer.body.startswith(b"data: 1\n\n")
        assert b"upstream_timeout" in final_event(answer)


def test_a_client_that_never_reads_loses_its_server(hasty: Gunicorn) -> None:
    def script(visit: Visit) -> None:
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        visit.send(b"x" * 100_000_000)

    with Upstream(script) as upstream, hasty.connect() as wire:
        wire.post("/x", {"model": str(upstream.port)})
        upstream.visit()
        wait_until(lambda: hasty.health()["held"], "the server held")
        hasty.wait_idle()


# --- waiting streams -------------------------------------------------------------------------


def waiting(proxy: Gunicorn, gate: Path, model: str, extra: str = "") -> Iterator[Wire]:
    with proxy.connect() as wire:
        wire.post("/x", {"model": f"{model}@{gate}", "stream": True}, extra)
        status, headers = wire.read_head()
        assert status == 200
        assert ("Content-Type", "text/event-stream") in headers
        for _ in range(2):
            assert wire.read_chunk().startswith(b": ")
        gate.touch()
        yield wire


def rest_of(wire: Wire) -> bytes:
    payload = b""
    while piece := wire.read_chunk():
        payload += piece if not piece.startswith(b": ") else b""
    return payload


@pytest.mark.parametrize(
    "answer",
    [
        event_head() + chunk(b"data: 1\n\n") + b"0\r\n\r\n",
        event_head().replace(b"Transfer-Encoding: chunked\r\n", b"") + b"data: 1\n\n",
        plain_answer(b"data: 1\n\n").replace(b"application/json", b"text/event-stream"),
    ],
    ids=["chunks", "close", "length"],
)
def test_a_waiting_stream_gets_comments_and_then_its_tokens(
    hasty: Gunicorn, tmp_path: Path, answer: bytes
) -> None:
    with Upstream(lambda visit: visit.send(answer)) as upstream:
        for wire in waiting(hasty, tmp_path / "gate", str(upstream.port)):
            assert rest_of(wire) == b"data: 1\n\n"
            assert is_well(wire)


def test_a_load_that_fails_after_comments_is_an_event(hasty: Gunicorn, tmp_path: Path) -> None:
    for wire in waiting(hasty, tmp_path / "gate", "!model_load_failed"):
        assert b'"code":"model_load_failed"' in rest_of(wire)
        assert is_well(wire)


def test_an_error_of_the_server_after_comments_is_an_event(hasty: Gunicorn, tmp_path: Path) -> None:
    refusal = plain_answer(b'{"error":{\n"message": "too long"}}', status=b"400 Bad Request")
    with Upstream(lambda visit: visit.send(refusal)) as upstream:
        for wire in waiting(hasty, tmp_path / "gate", str(upstream.port)):
            assert rest_of(wire) == b'data: {"error":{"message":"too long"}}\n\n'
            assert is_well(wire)


def test_a_retry_happens_after_comments_too(hasty: Gunicorn, tmp_path: Path) -> None:
    stream = event_head() + chunk(b"data: 1\n\n") + b"0\r\n\r\n"
    with Upstream(drop) as bad, Upstream(lambda visit: visit.send(stream)) as good:
        for wire in waiting(hasty, tmp_path / "gate", f"{bad.port},{good.port}"):
            assert rest_of(wire) == b"data: 1\n\n"


def test_a_quick_failure_of_a_stream_keeps_its_status(hasty: Gunicorn) -> None:
    with hasty.connect() as wire:
        answer = wire.post("/x", {"model": "!pool_busy", "stream": True}).read_answer()
        assert answer.status == 503
