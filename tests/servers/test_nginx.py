"""The shipped nginx.conf in a real nginx, before a real worker on a unix socket."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.gunicorns import Gunicorn, gunicorn
from tests.support.nginxes import nginx
from tests.support.ports import free_port
from tests.support.upstreams import (
    Upstream,
    Visit,
    chunk,
    event_head,
    plain_answer,
    wait_until,
)
from tests.support.wire import PAGE, Wire

EVENTS = [b"data: %d\n\n" % number for number in range(20)]
STREAM = event_head() + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"


@dataclass(frozen=True)
class Front:
    control: Gunicorn
    address: tuple[str, int]

    def connect(self) -> Wire:
        return Wire(self.address)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("nginx")
    env = {"RELAY_TEST_COMMENT_AFTER_S": "0.2"}
    with gunicorn(folder, unix=True, env=env) as control:
        assert isinstance(control.address, str)
        with nginx(folder, control.address) as address:
            yield Front(control, address)


def answering(data: bytes) -> Upstream:
    return Upstream(lambda visit: visit.send(data))


def test_nginx_itself_talks_to_the_server(front: Front) -> None:
    with answering(plain_answer(b'{"a": 1}')) as upstream, front.connect() as wire:
        sent = json.dumps({"model": str(upstream.port), "pad": "y" * 300_000}).encode()
        extra = "Authorization: Bearer client\r\nX-Api-Key: client\r\nX-Request-ID: r1\r\n"
        answer = wire.post("/v1/completions?a=%20b", sent, extra).read_answer()
        assert (answer.status, answer.body) == (200, b'{"a": 1}')
        assert answer.header("content-type") == "application/json"
        visit = upstream.visit()
        assert visit.request_line == b"POST /v1/completions?a=%20b HTTP/1.1"
        assert visit.body == sent
        assert visit.headers[b"authorization"] == b"Bearer server-key"
        assert visit.headers[b"x-request-id"] == b"r1"
        assert visit.headers[b"host"] == b"127.0.0.1:%d" % upstream.port
        assert b"x-api-key" not in visit.headers
        assert b"smartproxy" not in visit.head.lower()
        # nginx sent it, not Python: Python always closes
        assert b"connection" not in visit.headers
        assert not [name for name, _ in answer.headers if name.lower().startswith("x-smart")]


def test_events_pass_one_by_one(front: Front) -> None:
    seen = threading.Semaphore(0)

    def script(visit: Visit) -> None:
        visit.send(event_head())
        for event in EVENTS:
            visit.send(chunk(event))
            assert seen.acquire(timeout=15)
        visit.send(b"0\r\n\r\n")

    with Upstream(script) as upstream, front.connect() as wire:
        wire.post("/x", {"model": str(upstream.port), "stream": True}).read_head()
        for event in EVENTS:
            assert wire.read_chunk() == event
            seen.release()
        assert wire.read_chunk() == b""


def test_one_connection_serves_many_requests(front: Front) -> None:
    with (
        answering(STREAM) as stream,
        answering(plain_answer(b"{}")) as plain,
        front.connect() as wire,
    ):
        for _ in range(10):
            assert wire.post("/x", {"model": str(plain.port)}).read_answer().body == b"{}"
            answer = wire.post("/x", {"model": str(stream.port), "stream": True}).read_answer()
            assert answer.body == b"".join(EVENTS)


def test_a_servers_errors_pass(front: Front) -> None:
    for status in (b"400 Bad Request", b"502 Bad Gateway", b"503 Unavailable"):
        with answering(plain_answer(b'{"own": 1}', status)) as upstream, front.connect() as wire:
            answer = wire.post("/x", {"model": str(upstream.port)}).read_answer()
            assert (answer.status, answer.body) == (int(status[:3]), b'{"own": 1}')
            assert len(upstream.visits) == 1


def test_our_errors_pass(front: Front) -> None:
    with front.connect() as wire:
        answer = wire.post("/x", {"model": "!pool_busy", "stream": True}).read_answer()
        assert (answer.status, answer.header("retry-after")) == (503, "10")
        assert answer.header("x-smartproxy-error") == "pool_busy"


def test_head_and_get_reach_the_server(front: Front) -> None:
    with answering(plain_answer(b"{}")) as upstream, front.connect() as wire:
        target = f"/props?model={upstream.port}"
        answer = wire.send(f"GET {target} HTTP/1.1\r\nHost: p\r\n\r\n".encode()).read_answer()
        assert answer.body == b"{}"
        assert upstream.visit().request_line == f"GET {target} HTTP/1.1".encode()
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n") as upstream,
        front.connect() as wire,
    ):
        head = f"HEAD /props?model={upstream.port} HTTP/1.1\r\nHost: p\r\n\r\n"
        answer = wire.send(head.encode()).read_answer(head_only=True)
        assert answer.header("content-length") == "9"


# --- failures --------------------------------------------------------------------------------


def test_a_server_that_can_not_be_reached_is_replaced_once(front: Front) -> None:
    for stream in (False, True):
        answer_data = STREAM if stream else plain_answer(b"{}")
        with answering(answer_data) as good, front.connect() as wire:
            body = {"model": f"{free_port()},{good.port}", "stream": stream}
            answer = wire.post("/x", body).read_answer()
            assert answer.status == 200
            assert answer.body == (b"".join(EVENTS) if stream else b"{}")
            assert len(good.visits) == 1


def test_a_server_that_hangs_up_is_replaced_once(front: Front) -> None:
    with (
        Upstream(lambda _visit: None) as bad,
        answering(plain_answer(b"{}")) as good,
        front.connect() as wire,
    ):
        body = {"model": f"{bad.port},{good.port}", "pad": "y" * 300_000}
        assert wire.post("/x", body).read_answer().body == b"{}"
        assert good.visit().body == bad.visit().body


def test_two_failures_are_backend_failed(front: Front) -> None:
    with Upstream(lambda _visit: None) as bad, front.connect() as wire:
        answer = wire.post("/x", {"model": str(bad.port)}).read_answer()
        assert (answer.status, answer.json()["error"]["code"]) == (502, "backend_failed")
        assert len(bad.visits) == 2


def test_a_silent_server_is_an_upstream_timeout_and_not_tried_again(
    tmp_path: Path, front: Front
) -> None:
    assert isinstance(front.control.address, str)
    short = {"proxy_read_timeout 600s;": "proxy_read_timeout 1s;"}
    with (
        nginx(tmp_path, front.control.address, short) as address,
        Upstream(Visit.wait_gone) as up,
        Wire(address) as wire,
    ):
        answer = wire.post("/x", {"model": str(up.port)}).read_answer()
        assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        assert answer.header("x-smartproxy-error") == "upstream_timeout"
        assert len(up.visits) == 1


def test_a_body_over_the_limit_is_refused_in_openai_shape(tmp_path: Path, front: Front) -> None:
    assert isinstance(front.control.address, str)
    small = {"client_max_body_size 64m;": "client_max_body_size 1k;"}
    with nginx(tmp_path, front.control.address, small) as address, Wire(address) as wire:
        answer = wire.post("/x", b"x" * 2000).read_answer()
        assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_without_a_proxy_behind_it_nginx_says_so(tmp_path: Path) -> None:
    with nginx(tmp_path, str(tmp_path / "nobody")) as address, Wire(address) as wire:
        answer = wire.post("/x", {"model": "1"}).read_answer()
        assert (answer.status, answer.json()["error"]["code"]) == (502, "internal_error")


def test_a_client_that_goes_stops_the_server(front: Front) -> None:
    for sent_first in (b"", event_head() + chunk(EVENTS[0])):

        def script(visit: Visit, data: bytes = sent_first) -> None:
            visit.send(data)
            visit.wait_gone()

        with Upstream(script) as upstream, front.connect() as wire:
            wire.post("/x", {"model": str(upstream.port), "stream": True})
            upstream.visit()
            wire.sock.close()
            wait_until(upstream.visit().gone.is_set, "the server's connection closed")


def test_a_client_that_goes_while_its_model_loads_is_forgotten(
    front: Front, tmp_path: Path
) -> None:
    before = front.control.health().get("cancelled", 0)
    with front.connect() as wire:
        wire.post("/x", {"model": f"1@{tmp_path}/never"})
        asked = front.control.health().get("asked", 0)
        wait_until(lambda: front.control.health().get("asked", 0) >= asked, "acquire")
        wire.sock.close()
        wait_until(lambda: front.control.health().get("cancelled", 0) > before, "cancelled")


# --- waiting and holding ---------------------------------------------------------------------


def test_a_waiting_stream_gets_comments_and_then_its_tokens(front: Front, tmp_path: Path) -> None:
    with answering(STREAM) as upstream, front.connect() as wire:
        body = {"model": f"{upstream.port}@{tmp_path}/gate", "stream": True}
        assert wire.post("/x", body).read_head()[0] == 200
        assert wire.read_chunk().startswith(b": ")
        (tmp_path / "gate").touch()
        payload = b""
        while piece := wire.read_chunk():
            payload += piece if not piece.startswith(b": ") else b""
        assert payload == b"".join(EVENTS)


def test_a_waiting_request_is_carried_by_nginx_too(front: Front, tmp_path: Path) -> None:
    with answering(plain_answer(b"{}")) as upstream, front.connect() as wire:
        wire.post("/x", {"model": f"{upstream.port}@{tmp_path}/gate"})
        (tmp_path / "gate").touch()
        assert wire.read_answer().body == b"{}"
        assert b"connection" not in upstream.visit().headers


def test_the_hold_outlasts_the_hand_over_and_ends(front: Front) -> None:
    with Upstream(Visit.wait_gone) as upstream, front.connect() as wire:
        wire.post("/x", {"model": str(upstream.port)})
        upstream.visit()
        port = str(upstream.port)
        assert front.control.health()["held"][port] == 1
        wait_until(lambda: port not in front.control.health()["held"], "the hold released")


# --- nobody else's word ----------------------------------------------------------------------


def test_a_clients_internal_headers_mean_nothing(front: Front) -> None:
    with answering(plain_answer(b"{}")) as good, answering(plain_answer(b"evil")) as evil:
        with front.connect() as wire:
            extra = (
                f"X-Accel-Redirect: @llama\r\nX-Smartproxy-Backend: 127.0.0.1:{evil.port}\r\n"
                f"X-Smartproxy-Retry: {good.port}\r\nX-Smartproxy-Data-Plane: python\r\n"
                "X-Smartproxy-Target: /evil\r\nX-Smartproxy-Authorization: Bearer evil\r\n"
            )
            body = {"model": f"{good.port},{evil.port}"}
            assert wire.post("/x", body, extra).read_answer().body == b"{}"
            assert b"connection" not in good.visit().headers  # still carried by nginx
        assert not evil.visits


def test_a_servers_internal_headers_mean_nothing(front: Front) -> None:
    secret = b"X-Accel-Redirect: /health\r\nX-Accel-Limit-Rate: 1\r\nX-Smartproxy-Error: forged\r\n"
    with answering(plain_answer(b"{}", extra=secret)) as upstream, front.connect() as wire:
        answer = wire.post("/x", {"model": str(upstream.port)}).read_answer()
        assert answer.body == b"{}"
        assert not [n for n, _ in answer.headers if n.lower().startswith(("x-acc", "x-smart"))]


def test_a_port_outside_the_range_is_refused(tmp_path: Path, front: Front) -> None:
    assert isinstance(front.control.address, str)
    narrow = {"[1-9][0-9]{4}$": "80[89][0-9]$"}
    with (
        nginx(tmp_path, front.control.address, narrow) as address,
        answering(plain_answer(b"{}")) as upstream,
        Wire(address) as wire,
    ):
        assert wire.post("/x", {"model": str(upstream.port)}).read_answer().status == 500
        assert not upstream.visits


def test_a_tcp_client_can_not_pass_for_nginx(tmp_path: Path) -> None:
    with (
        gunicorn(tmp_path) as control,
        answering(plain_answer(b"{}")) as upstream,
        control.connect() as wire,
    ):
        extra = "X-Smartproxy-Data-Plane: nginx\r\n"
        answer = wire.post("/x", {"model": str(upstream.port)}, extra).read_answer()
        assert answer.body == b"{}"
        assert not [name for name, _ in answer.headers if name.lower().startswith("x-")]


def test_large_bodies_arrive_whole(front: Front) -> None:
    body = b'{"pad": "%b", "model": ' % os.urandom(3 << 20).hex().encode()
    with answering(plain_answer(b"{}")) as upstream, front.connect() as wire:
        sent = body + b'"%d"}' % upstream.port
        assert wire.post("/x", sent).read_answer().status == 200
        assert upstream.visit().body == sent


#: how a server opens itself to every page
PERMISSIVE = (
    b"Access-Control-Allow-Origin: https://other.example\r\n"
    b"Access-Control-Allow-Credentials: true\r\nAccess-Control-Allow-Headers: *\r\n"
)


@pytest.mark.parametrize(
    ("origin", "reader"),
    [(PAGE, PAGE), ("http://localhost:1", "http://localhost:1"), ("https://other.example", None)],
)
def test_pages_that_are_allowed_may_read_what_nginx_brings(
    front: Front, origin: str, reader: str | None
) -> None:
    said = b"HTTP/1.1 200 OK\r\n" + PERMISSIVE + b"Content-Length: 2\r\n\r\n{}"
    extra = f"Content-Type: application/json\r\nOrigin: {origin}\r\n"
    with answering(said) as upstream, front.connect() as wire:
        relayed = wire.post("/x", {"model": str(upstream.port)}, extra).read_answer()
        refused = wire.post("/x", {"model": "!pool_busy"}, extra).read_answer()
    for answer in (relayed, refused):
        assert answer.header("access-control-allow-origin") == reader
        assert answer.header("access-control-allow-credentials") is None
        assert answer.header("vary") == ("Origin" if reader else None)
    assert (relayed.status, refused.status) == (200, 503)
