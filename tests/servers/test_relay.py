"""The relay in a real gunicorn worker, against servers that follow a script to the byte."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.gunicorns import Gunicorn, gunicorn
from tests.support.upstreams import Upstream, Visit, chunk, event_head, plain_answer
from tests.support.wire import PAGE, request

EVENTS = [b"data: %d\n\n" % number for number in range(50)]
STREAM = event_head() + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"


@pytest.fixture(scope="module", params=["framework", "plain"])
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gunicorn]:
    """A proxy whose application sees every request, and one that decides on plain ones itself."""
    env = {"RELAY_TEST_PLAIN": "1"} if request.param == "plain" else {}
    with gunicorn(tmp_path_factory.mktemp("relay"), env=env) as started:
        yield started
        if env:
            assert started.health()["plain"] > 0


def answering(data: bytes) -> Upstream:
    return Upstream(lambda visit: visit.send(data))


# --- bytes -----------------------------------------------------------------------------------


def test_request_and_json_answer_pass_unchanged(proxy: Gunicorn) -> None:
    body = json.dumps({"answer": "x" * 5000}).encode()
    with answering(plain_answer(body, extra=b"X-Own: 1\r\n")) as upstream, proxy.connect() as wire:
        sent = json.dumps({"model": str(upstream.port), "n": 1}).encode()
        answer = wire.post("/v1/completions?a=%20b", sent, "X-Request-ID: r1\r\n").read_answer()
        assert (answer.status, answer.body) == (200, body)
        assert answer.header("x-own") == "1"
        assert answer.header("date")
        assert answer.header("connection") == "keep-alive"
        visit = upstream.visit()
        assert visit.body == sent
        assert visit.request_line == b"POST /v1/completions?a=%20b HTTP/1.1"
        assert visit.headers[b"x-request-id"] == b"r1"
        assert visit.headers[b"authorization"] == b"Bearer server-key"
        assert visit.headers[b"host"] == b"127.0.0.1:%d" % upstream.port


def test_event_stream_keeps_its_chunks(proxy: Gunicorn) -> None:
    with answering(STREAM) as upstream, proxy.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port), "stream": True}).read_answer()
    assert answer.body == b"".join(EVENTS)
    assert answer.chunks == [len(event) for event in EVENTS]
    assert answer.header("x-accel-buffering") == "no"
    assert answer.header("keep-alive") is None


def test_an_answer_that_comes_byte_by_byte_is_the_same(proxy: Gunicorn) -> None:
    data = event_head() + b"".join(map(chunk, EVENTS[:3])) + b"0\r\n\r\n"

    def script(visit: Visit) -> None:
        for position in range(len(data)):
            visit.send(data[position : position + 1])

    with Upstream(script) as upstream, proxy.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port), "stream": True}).read_answer()
    assert answer.chunks == [len(event) for event in EVENTS[:3]]


def test_each_event_arrives_before_the_next_is_made(proxy: Gunicorn) -> None:
    seen = threading.Semaphore(0)

    def script(visit: Visit) -> None:
        visit.send(event_head())
        for event in EVENTS:
            visit.send(chunk(event))
            assert seen.acquire(timeout=15)
        visit.send(b"0\r\n\r\n")

    with Upstream(script) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port), "stream": True}).read_head()
        for event in EVENTS:
            assert wire.read_chunk() == event
            seen.release()
        assert wire.read_chunk() == b""


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body_end_with_their_head(proxy: Gunicorn, status: bytes) -> None:
    with answering(b"HTTP/1.1 " + status + b"\r\n\r\n") as upstream, proxy.connect() as wire:
        for _ in range(2):
            answer = wire.post("/x", {"model": str(upstream.port)}).read_answer()
            assert answer.status == int(status[:3])
        assert wire.rest == b""


def test_head_gets_the_length_and_no_body(proxy: Gunicorn) -> None:
    answering_head = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
    with answering_head as upstream, proxy.connect() as wire:
        head = f"HEAD /x?model={upstream.port} HTTP/1.1\r\nHost: p\r\n\r\n".encode()
        for _ in range(2):
            answer = wire.send(head).read_answer(head_only=True)
            assert (answer.status, answer.header("content-length")) == (200, "99")
        refused = b"HEAD /x?model=!pool_busy HTTP/1.1\r\nHost: p\r\n\r\n"
        assert wire.send(refused + head).read_answer(head_only=True).status == 503
        assert wire.read_answer(head_only=True).status == 200


def test_interim_answers_are_not_taken_for_the_answer(proxy: Gunicorn) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nA: b\r\n\r\n" + plain_answer(b"{}")
    with answering(data) as upstream, proxy.connect() as wire:
        assert wire.post("/x", {"model": str(upstream.port)}).read_answer().body == b"{}"


def test_a_body_that_ends_with_the_connection_is_chunked_for_http_11(proxy: Gunicorn) -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\nhello") as upstream, proxy.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port)}).read_answer()
        assert answer.body == b"hello"
        assert answer.chunks is not None
        assert answer.header("connection") == "keep-alive"


@pytest.mark.parametrize("data", [STREAM, b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(EVENTS)])
def test_an_http_10_client_gets_no_chunks(proxy: Gunicorn, data: bytes) -> None:
    with answering(data) as upstream, proxy.connect() as wire:
        sent = request("/x", {"model": str(upstream.port)}).replace(b"HTTP/1.1", b"HTTP/1.0")
        answer = wire.send(sent).read_answer()
        assert answer.body == b"".join(EVENTS)
        assert answer.header("transfer-encoding") is None


def test_chunked_upload_arrives_with_a_length(proxy: Gunicorn) -> None:
    with answering(plain_answer(b"{}")) as upstream, proxy.connect() as wire:
        body = json.dumps({"model": str(upstream.port), "text": "é" * 9000}).encode()
        chunks = b"".join(chunk(body[i : i + 1000]) for i in range(0, len(body), 1000))
        head = b"POST /x HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert wire.send(head + chunks + b"0\r\n\r\n").read_answer().status == 200
        assert upstream.visit().body == body
        assert upstream.visit().headers[b"content-length"] == b"%d" % len(body)


def test_expect_continue_is_answered_here(proxy: Gunicorn) -> None:
    with answering(plain_answer(b"{}")) as upstream, proxy.connect() as wire:
        whole = request("/x", {"model": str(upstream.port)}, "Expect: 100-continue\r\n")
        head, _, body = whole.partition(b"\r\n\r\n")
        wire.send(head + b"\r\n\r\n")
        assert wire.read_head()[0] == 100
        assert wire.send(body).read_answer().status == 200
        assert b"expect" not in upstream.visit().headers


# --- connections -----------------------------------------------------------------------------


def test_one_connection_serves_many_requests_of_all_kinds(proxy: Gunicorn) -> None:
    with (
        answering(STREAM) as stream,
        answering(plain_answer(b"{}")) as plain,
        proxy.connect() as wire,
    ):
        for _ in range(5):
            assert wire.post("/x", {"model": str(plain.port)}).read_answer().body == b"{}"
            answer = wire.post("/x", {"model": str(stream.port), "stream": True}).read_answer()
            assert answer.body == b"".join(EVENTS)
            health = wire.send(b"GET /health HTTP/1.1\r\nHost: p\r\n\r\n").read_answer()
            assert health.status == 200


def test_pipelined_requests_are_answered_in_order(proxy: Gunicorn) -> None:
    def script(visit: Visit) -> None:
        visit.send(plain_answer(visit.body))

    with Upstream(script) as upstream, proxy.connect() as wire:
        bodies = [json.dumps({"model": str(upstream.port), "n": n}).encode() for n in range(6)]
        wire.send(b"".join(request("/x", body) for body in bodies))
        assert [wire.read_answer().body for _ in bodies] == bodies


def test_a_request_sent_during_a_stream_is_answered_after_it(proxy: Gunicorn) -> None:
    asked = threading.Event()

    def script(visit: Visit) -> None:
        visit.send(event_head() + chunk(EVENTS[0]))
        assert asked.wait(15)
        visit.send(b"0\r\n\r\n")

    with (
        Upstream(script, lambda v: v.send(plain_answer(b"{}"))) as upstream,
        proxy.connect() as wire,
    ):
        wire.post("/x", {"model": str(upstream.port), "stream": True}).read_head()
        next_one = request("/x", {"model": str(upstream.port), "pad": "x" * 200_000})
        wire.send(next_one[:1000])
        sending = threading.Thread(target=wire.send, args=(next_one[1000:],))
        sending.start()  # more than is read ahead: the rest waits in the kernel
        assert wire.read_chunk() == EVENTS[0]
        asked.set()
        assert wire.read_chunk() == b""
        assert wire.read_answer().body == b"{}"
        sending.join()


def test_connection_close_is_kept(proxy: Gunicorn) -> None:
    with answering(plain_answer(b"{}")) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port)}, "Connection: close\r\n")
        answer = wire.read_answer()
        assert answer.header("connection") == "close"
        assert wire.is_closed()


# --- a slow client ---------------------------------------------------------------------------


def test_a_slow_reader_slows_the_server_down(proxy: Gunicorn) -> None:
    block = os.urandom(1 << 20)
    total_bytes = 64 << 20
    blocked = threading.Event()
    sent_bytes = 0

    def script(visit: Visit) -> None:
        nonlocal sent_bytes
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total_bytes)
        visit.sock.settimeout(0.5)
        while sent_bytes < total_bytes:
            try:
                sent_bytes += visit.sock.send(block[sent_bytes % len(block) :])
            except TimeoutError:
                blocked.set()

    with Upstream(script) as upstream, proxy.connect() as wire:
        wire.post("/x", {"model": str(upstream.port)}).read_head()
        assert blocked.wait(20), "the server could send everything though nobody read it"
        assert sent_bytes < 24 << 20
        assert proxy.health()["held"] == {str(upstream.port): 1}
        digest = hashlib.sha256(wire.read_exactly(total_bytes)).digest()
        assert digest == hashlib.sha256(block * 64).digest()


def test_a_large_upload_reaches_a_server_that_reads_slowly(proxy: Gunicorn) -> None:
    def script(visit: Visit) -> None:
        left, digest = int(visit.headers[b"content-length"]), hashlib.sha256(visit.body)
        left -= len(visit.body)
        while left:
            piece = visit.sock.recv(min(left, 100_000))
            digest.update(piece)
            left -= len(piece)
        visit.send(plain_answer(digest.hexdigest().encode()))

    with Upstream(script, read_body=False) as upstream, proxy.connect() as wire:
        body = b'{"model": "%d", "pad": "%b"}' % (upstream.port, b"y" * (64 << 20))
        answer = wire.post("/x", body).read_answer()
    assert answer.body.decode() == hashlib.sha256(body).hexdigest()


# --- what reaches whom -----------------------------------------------------------------------


def test_credentials_and_internal_headers_stay_here(proxy: Gunicorn) -> None:
    secret = b"X-Accel-Redirect: /etc\r\nX-Smartproxy-Error: forged\r\n"
    with answering(plain_answer(b"{}", extra=secret)) as upstream, proxy.connect() as wire:
        extra = (
            "Authorization: Bearer client\r\nX-Api-Key: client\r\nX-Smartproxy-Retry: 1\r\n"
            "X-Smartproxy-Data-Plane: nginx\r\nX-Accel-Limit-Rate: 1\r\nConnection: X-Mine\r\n"
            "X-Mine: 1\r\n"
        )
        answer = wire.post("/x", {"model": str(upstream.port)}, extra).read_answer()
        assert answer.header("x-accel-redirect") is None
        assert answer.header("x-smartproxy-error") is None
        head = upstream.visit().head.lower()
        for gone in (b"bearer client", b"x-api-key", b"x-smartproxy", b"x-accel", b"x-mine"):
            assert gone not in head


# --- without RelayWorker ---------------------------------------------------------------------


def test_plain_gthread_serves_the_same_bytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("gthread")
    with gunicorn(folder, "--worker-class", "gthread") as proxy, answering(STREAM) as upstream:
        with proxy.connect() as wire:
            for _ in range(2):
                body = {"model": str(upstream.port), "stream": True}
                assert wire.post("/x", body).read_answer().body == b"".join(EVENTS)
            refused = wire.post("/x", {"model": "!pool_busy"}).read_answer()
            assert (refused.status, refused.header("retry-after")) == (503, "10")
        proxy.wait_idle()


def test_a_server_does_not_open_itself_to_pages(proxy: Gunicorn) -> None:
    said = b"HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: 2\r\n\r\n{}"
    page = f"Origin: {PAGE}\r\n"
    other = "Content-Type: application/json\r\nOrigin: https://other.example\r\n"
    for extra, reader in (("", None), (other, None), (page, PAGE)):
        with Upstream(lambda visit: visit.send(said)) as upstream, proxy.connect() as wire:
            answer = wire.post("/x", {"model": str(upstream.port)}, extra).read_answer()
        assert answer.header("access-control-allow-origin") == reader


def test_a_servers_redirect_is_passed_on_and_not_followed_with_a_key(proxy: Gunicorn) -> None:
    said = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n"
    keys = "Authorization: Bearer client\r\nX-Api-Key: client\r\nCookie: a=b\r\n"
    with Upstream(lambda visit: visit.send(said)) as upstream, proxy.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port)}, keys).read_answer()
        assert (answer.status, answer.header("location")) == (302, "http://127.0.0.1:1/x")
        assert len(upstream.visits) == 1
        assert upstream.visits[0].headers[b"authorization"] == b"Bearer server-key"
        assert b"client" not in upstream.visits[0].head
