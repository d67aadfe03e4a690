"""What one client may take of the real worker: memory, threads and time are bounded by the head."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.gunicorns import Gunicorn, gunicorn
from tests.support.running import Proxy, fake_model, running
from tests.support.upstreams import Upstream, Visit, chunk, plain_answer, wait_until
from tests.support.wire import Wire

CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: p\r\n"
LOAD = "POST /api/models/m/load HTTP/1.1\r\nHost: p\r\n"
KEY = "Authorization: Bearer client-key\r\n"
#: gunicorn's parser takes it, the plain way does not
OTHER_WAY = "X_Neutral: 1\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
EXPECT = "Expect: 100-continue\r\n"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    settings: dict[str, Any] = {"max_body_mb": 1, "api_keys": ["client-key"]}
    settings["allowed_hosts"] = ["p"]
    settings["admin_keys"] = ["admin-key"]
    with running(tmp_path_factory.mktemp("limits"), {"m": fake_model()}, **settings) as started:
        yield started


def connect(proxy: Proxy) -> Wire:
    return Wire(("127.0.0.1", proxy.port))


@pytest.mark.parametrize("extra", ["", OTHER_WAY], ids=["plain", "framework"])
@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (CHAT + "Content-Length: 900000\r\n", 401, "invalid_api_key"),
        (CHAT + CHUNKED, 401, "invalid_api_key"),
        (CHAT + "Content-Length: 5\r\n" + EXPECT, 401, "invalid_api_key"),
        (CHAT + KEY + "Content-Length: 900000000000\r\n", 413, "request_too_large"),
        (CHAT + KEY + "Content-Length: 900000000\r\n" + EXPECT, 413, "request_too_large"),
        (LOAD + KEY + "Content-Length: 900000\r\n", 401, "invalid_api_key"),
        (LOAD + KEY + CHUNKED, 401, "invalid_api_key"),
        (LOAD.replace("/api/", "/%61pi/") + KEY + CHUNKED, 401, "invalid_api_key"),
        (CHAT + KEY + CHUNKED + "Content-Length: 5\r\n", 400, "bad_request"),
        (CHAT + KEY + "Transfer-Encoding: gzip\r\n", 501, "bad_request"),
        (CHAT + KEY + "Content-Length: 5\r\nExpect: tea\r\n", 417, "bad_request"),
    ],
)
def test_a_request_is_refused_by_its_head_alone(
    proxy: Proxy, head: str, status: int, code: str, extra: str
) -> None:
    """Nothing of the body is sent: who waited for it would time out."""
    with connect(proxy) as wire:
        answer = wire.send((head + extra + "\r\n").encode()).read_answer()
        assert answer.status == status, answer.body
        assert answer.header("x-smartproxy-error") == answer.json()["error"]["code"] == code
        assert answer.header("connection") == "close"
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.is_closed()


def test_a_refused_client_that_sends_its_whole_body_first_can_read_its_answer(proxy: Proxy) -> None:
    with connect(proxy) as wire:
        wire.send((CHAT + "Content-Length: 30000000\r\n\r\n").encode())
        wire.send(b"x" * 30_000_000)
        assert wire.read_answer().status == 413


def test_chunks_over_the_limit_are_refused_as_soon_as_they_are(proxy: Proxy) -> None:
    with connect(proxy) as wire:
        wire.send((CHAT + KEY + CHUNKED + "\r\n").encode())
        wire.send(chunk(b"x" * 65536) * 17)
        assert wire.read_answer().status == 413


@pytest.mark.parametrize("extra", ["", OTHER_WAY], ids=["plain", "framework"])
def test_a_client_is_told_to_go_on_and_answered(proxy: Proxy, extra: str) -> None:
    body = json.dumps({"model": "m", "messages": [], "max_tokens": 2}).encode()
    with connect(proxy) as wire:
        for framing, data in (
            (f"Content-Length: {len(body)}\r\n", body),
            (CHUNKED, chunk(body[:9]) + chunk(body[9:]) + b"0\r\nX-Sum: 1\r\n\r\n"),
        ):
            wire.send((CHAT + KEY + EXPECT + framing + extra + "\r\n").encode())
            assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            answer = wire.send(data).read_answer()
            assert (answer.status, answer.json()["object"]) == (200, "chat.completion")


def test_a_request_that_ends_too_early_is_told_so(proxy: Proxy) -> None:
    for begun in (CHAT, CHAT + KEY + "Content-Length: 9\r\n\r\n{", CHAT + KEY + CHUNKED + "\r\n5"):
        with connect(proxy) as wire:
            wire.send(begun.encode()).sock.shutdown(socket.SHUT_WR)
            assert wire.read_answer().status == 400


# slow and silent clients: a worker of four threads and windows of one second


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    with gunicorn(tmp_path_factory.mktemp("hasty"), "--keep-alive", "1") as started:
        yield started


def echo(visit: Visit) -> None:
    visit.send(plain_answer(b"%d" % len(visit.body)))


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_lives_as_long_as_it_goes_on(hasty: Gunicorn, chunked: bool) -> None:
    with Upstream(echo) as upstream, hasty.connect() as wire:
        body = json.dumps({"model": str(upstream.port), "pad": "x" * 12_000}).encode()
        framing = CHUNKED if chunked else f"Content-Length: {len(body)}\r\n"
        wire.send(f"POST /x HTTP/1.1\r\nHost: p\r\n{framing}\r\n".encode())
        began = time.monotonic()
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            wire.send(chunk(piece) if chunked else piece)
            time.sleep(0.35)  # what is tested is time: four windows of one second
        answer = wire.send(b"0\r\n\r\n" if chunked else b"").read_answer()
        assert time.monotonic() - began > 4
        assert answer.body == b"%d" % len(body)


@pytest.mark.parametrize(
    "begun",
    [
        b"POST /x HTTP/1.1\r\nHost: p\r\nContent-Length: 9000\r\n\r\n{",
        b"POST /x HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"POST /x HTTP/1.1\r\nHost: p\r\nX: ",
    ],
    ids=["length", "chunks", "head"],
)
def test_a_request_that_stops_is_told_so(hasty: Gunicorn, begun: bytes) -> None:
    with hasty.connect() as wire:
        answer = wire.send(begun).read_answer()
        assert (answer.status, answer.header("connection")) == (408, "close")
        assert answer.json()["error"]["code"] == "request_too_slow"


def test_a_connection_that_says_nothing_is_closed_without_a_word(hasty: Gunicorn) -> None:
    with hasty.connect() as wire:
        assert wire.is_closed()


def test_bodies_that_pause_hold_no_thread(tmp_path: Path) -> None:
    """Four threads; each of these bodies took one before."""
    heads = [CHUNKED, EXPECT + "Content-Length: 100\r\n", "Content-Length: 100\r\n"]
    with gunicorn(tmp_path) as proxy:
        wires = [proxy.connect() for _ in range(30)]
        for number, wire in enumerate(wires):
            wire.send(f"POST /x HTTP/1.1\r\nHost: p\r\n{heads[number % 3]}\r\n".encode())
        with proxy.connect() as wire:
            refused = wire.send(b"GET /nowhere HTTP/1.1\r\nHost: p\r\n\r\n").read_answer()
            assert refused.status == 404
        for wire in wires:
            wire.sock.close()


def test_a_worker_without_files_takes_connections_again(tmp_path: Path) -> None:
    with gunicorn(tmp_path) as proxy:
        worker = int(proxy.health()["pid"])
        highest = max(int(name) for name in os.listdir(f"/proc/{worker}/fd"))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 5, highest + 5))
        wires = [proxy.connect() for _ in range(30)]
        wait_until(lambda: "can't be taken" in proxy.log.read_text(), "accept failed")
        for wire in wires:
            wire.sock.close()
        wait_until(
            lambda: proxy.health()["pid"] == worker and "are taken again" in proxy.log.read_text(),
            "accepts again",
        )
        assert proxy.log.read_text().count("can't be taken") == 1


def test_a_request_without_a_file_for_its_server_waits_for_one(tmp_path: Path) -> None:
    server = Upstream(lambda visit: visit.send(plain_answer(b"{}")))
    with gunicorn(tmp_path) as proxy, proxy.connect() as wire, server as upstream:
        worker = int(proxy.health()["pid"])
        body = {"model": f"{upstream.port}"}
        assert wire.post("/x", body).read_answer().body == b"{}"
        proxy.wait_idle()
        before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (4, before[1]))
        wire.post("/x", body)
        assert not select.select([wire.sock], [], [], 0.3)[0]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
        assert wire.read_answer().body == b"{}"
        assert len(upstream.visits) == 2


# memory

CLIENTS = 50
BODY_BYTES = 64 << 20
MOST_BYTES = 1500 << 20


def test_fifty_clients_with_64_mb_each_stay_under_1500_mb(tmp_path: Path) -> None:
    def swallow(visit: Visit) -> None:
        left = int(visit.headers[b"content-length"]) - len(visit.body)
        while left and (piece := visit.sock.recv(min(left, 1 << 20))):
            left -= len(piece)
        visit.send(plain_answer(b"{}"))

    options = ["--workers", "2"]
    with gunicorn(tmp_path, *options) as proxy, Upstream(swallow, read_body=False) as upstream:
        head = b'{"model": "%d", "pad": "' % upstream.port
        body = head + b"y" * (BODY_BYTES - len(head) - 2) + b'"}'
        statuses: list[int] = []

        def upload() -> None:
            with Wire(proxy.address, timeout_s=100) as wire:
                statuses.append(wire.post("/x", body).read_answer().status)

        threads = [threading.Thread(target=upload) for _ in range(CLIENTS)]
        with PeakRss(proxy) as most_bytes:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert statuses == [200] * CLIENTS
        print(f"at most {most_bytes() >> 20} MB in all workers")
        assert most_bytes() < MOST_BYTES
        wait_until(lambda: rss(proxy) < MOST_BYTES // 3, "memory given back")


class PeakRss:
    """Looks all the time at how much memory the workers have; gives the most it saw."""

    def __init__(self, proxy: Gunicorn) -> None:
        self._proxy = proxy
        self._most_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Callable[[], int]:
        self._thread.start()
        return lambda: self._most_bytes

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._most_bytes = max(self._most_bytes, rss(self._proxy))


def rss(proxy: Gunicorn) -> int:
    """Return the resident bytes of gunicorn's master and workers."""
    master = psutil.Process(proxy.process.pid)
    return sum(one.memory_info().rss for one in (master, *master.children(recursive=True)))
