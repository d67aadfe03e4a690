"""Hostile bytes on a socket: each gets its status or a clean end in time; others are served."""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.gunicorns import gunicorn
from tests.support.nginxes import nginx
from tests.support.running import fake_model, running
from tests.support.upstreams import Upstream, plain_answer
from tests.support.wire import Wire, request

DEADLINE_S = 20.0
P = b"POST /v1/chat/completions HTTP/1.1\r\nHost: p\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
BODY = json.dumps({"model": "m", "messages": [], "max_tokens": 1}).encode()
FORM = b"Content-Type: multipart/form-data; boundary=b\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def post(body: bytes, extra: bytes = b"") -> bytes:
    return P + b"Content-Length: %d\r\n%b\r\n%b" % (len(body), extra, body)


def get(target: bytes, extra: bytes = b"") -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: p\r\n%b\r\n" % (target, extra)


def chunks(rest: bytes, extra: bytes = b"") -> bytes:
    return P + CHUNKED + extra + b"\r\n" + rest


def ask_of(model: str) -> bytes:
    return post(json.dumps({"model": model, "messages": []}).encode())


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    #: of the only answer; without one it may end without a word
    statuses: tuple[int, ...]


LENGTH = b"Content-Length: 5\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: p\r\n\r\n"

CASES = [
    # two readers of one message
    Case("cl_te", P + LENGTH + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED, (400,)),
    Case("te_cl", P + CHUNKED + LENGTH + b"\r\n5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, (400,)),
    Case("te_twice", chunks(b"0\r\n\r\n" + SMUGGLED, CHUNKED), (400, 501)),
    Case("te_list", P + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    Case("te_unknown", P + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", (400, 501)),
    Case("te_gzip", P + b"Transfer-Encoding: gzip\r\n\r\nabc" + SMUGGLED, (400, 501)),
    Case("te_space_before_colon", P + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", (400,)),
    Case("te_folded", P + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    Case("te_vertical_tab", P + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", (400, 501)),
    Case("te_in_http_10", P.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n", (400,)),
    Case("cl_twice", P + LENGTH * 2 + b"\r\nabcde", (400,)),
    Case("cl_differs", P + LENGTH + b"Content-Length: 6\r\n\r\nabcdef", (400,)),
    Case("cl_list", P + b"Content-Length: 5, 5\r\n\r\nabcde", (400,)),
    Case("cl_plus", P + b"Content-Length: +5\r\n\r\nabcde", (400,)),
    Case("cl_negative", P + b"Content-Length: -5\r\n\r\nabcde", (400,)),
    Case("cl_hex", P + b"Content-Length: 0x5\r\n\r\nabcde", (400,)),
    Case("cl_huge", P + b"Content-Length: 99999999999999999999\r\n\r\nabcde", (400, 413)),
    Case("cl_large", P + b"Content-Length: 999999999999999\r\n\r\nabcde", (413,)),
    Case("cl_space_before_colon", P + b"Content-Length : 5\r\n\r\nabcde", (400,)),
    Case("cl_folded", P + b"Content-Length:\r\n 5\r\n\r\nabcde", (400,)),
    Case("cl_empty", P + b"Content-Length:\r\n\r\nabcde", (400,)),
    Case("folded", P + b"X-A: a\r\n b\r\n" + LENGTH + b"\r\nabcde", (400,)),
    Case("bare_line_feeds", b"GET / HTTP/1.1\nHost: p\n\n", (400,)),
    Case("bare_line_feed_in_a_header", P + b"X: a\nContent-Length: 5\r\n\r\nabcde", (400,)),
    Case("bare_return_in_a_header", P + b"X: a\rb\r\n" + LENGTH + b"\r\nabcde", (400,)),
    Case("cut_short", P + b"Content-Length: 50\r\n\r\nabc", (400,)),
    # chunks
    Case("chunk_size_no_number", chunks(b"xyz\r\n"), (400,)),
    Case("chunk_size_negative", chunks(b"-1\r\n"), (400,)),
    Case("chunk_size_empty", chunks(b"\r\nabc"), (400,)),
    Case("chunk_size_huge", chunks(b"f" * 16 + b"\r\nabc"), (400, 413)),
    Case("chunk_size_large", chunks(b"f" * 15 + b"\r\nabc"), (400, 413)),
    Case("chunk_size_line_feed", chunks(b"3\nabc\r\n0\r\n\r\n"), (400,)),
    Case("chunk_too_long", chunks(b"3\r\nabcdefgh"), (400,)),
    Case("chunk_extension_huge", chunks(b"3;" + b"x" * 9000), (400,)),
    Case("chunks_endless", chunks(chunk(b"x" * 65536) * 40), (413,)),
    Case("trailers_endless", chunks(chunk(BODY) + b"0\r\n" + b"X: 1\r\n" * 20000), (400,)),
    Case("trailer_of_framing", chunks(chunk(BODY) + b"0\r\n" + LENGTH + b"\r\n"), (200,)),
    # heads
    Case("nul_in_a_header", P + b"X: a\x00b\r\n" + LENGTH + b"\r\nabcde", (400,)),
    Case("space_in_a_name", P + b"X A: b\r\n" + LENGTH + b"\r\nabcde", (400,)),
    Case("two_hosts", P + b"Host: q\r\n" + LENGTH + b"\r\nabcde", (400,)),
    Case("cookie_of_17_kb", get(b"/health", b"Cookie: " + b"x" * 17_000 + b"\r\n"), (431, 400)),
    Case("101_headers", get(b"/health", b"X-A: 1\r\n" * 110), (431, 400)),
    Case("long_target", get(b"/" + b"x" * 9000), (414, 400)),
    Case("very_long_target", get(b"/" + b"x" * 70_000), (431, 414, 400)),
    Case("control_in_the_target", get(b"/a\x01b"), (400,)),
    Case("letters_in_the_target", get(b"/\xc3\xa9"), (400,)),
    Case("absolute_form", get(b"http://evil.test/health"), (200, 400, 403, 404)),
    Case("connect", b"CONNECT evil.test:80 HTTP/1.1\r\nHost: p\r\n\r\n", (400, 404, 405)),
    Case("asterisk", b"OPTIONS * HTTP/1.1\r\nHost: p\r\n\r\n", (200, 400, 404)),
    Case("http_9", b"GET / HTTP/9.9\r\nHost: p\r\n\r\n", (400, 505)),
    Case("http_2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 405, 505)),
    Case("proxy_protocol", b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\nGET / HTTP/1.1\r\n\r\n", (400,)),
    Case("small_method", b"get / HTTP/1.1\r\nHost: p\r\n\r\n", (400,)),
    Case("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)), (400,)),
    Case("noise", bytes((n * 37) % 256 for n in range(3000)), (400,)),
    Case("expectation", P + LENGTH + b"Expect: tea\r\n\r\nabcde", (417, 400)),
    # names and paths
    Case("traversal", get(b"/upstream/../../etc/passwd"), (400, 404)),
    Case("traversal_encoded", get(b"/upstream/%2e%2e%2f%2e%2e%2fetc/passwd"), (400, 404)),
    Case("traversal_twice_encoded", get(b"/upstream/%252e%252e/etc/passwd"), (404,)),
    Case("traversal_behind_a_model", get(b"/upstream/m/..%2f..%2fetc/passwd"), (400, 404)),
    Case("overlong_letters", get(b"/upstream/%c0%ae%c0%ae/etc/passwd"), (404,)),
    Case("bytes_of_no_text", get(b"/v1/models/%ff%fe"), (404,)),
    Case("nul_in_a_name", get(b"/v1/models/m%00"), (400, 404)),
    Case("model_of_traversal", ask_of("../../etc/passwd"), (404,)),
    Case("model_with_nul", ask_of("m\x00"), (404,)),
    Case("model_of_a_flag", ask_of("--model=/etc/passwd"), (404,)),
    Case("model_of_sql", ask_of("m'; DROP TABLE servers; --"), (404,)),
    # answers that could be split
    Case("split_by_path", get(b"/v1/models/a%0d%0aX-Injected:%201"), (404,)),
    Case("split_by_query", get(b"/x?model=a%0d%0aX-Injected:%201"), (404,)),
    Case("split_by_model", ask_of("a\r\nX-Injected: 1"), (404,)),
    # bodies
    Case("deep", post(b'{"model":"m","x":' + b"[" * 100_000), (400,)),
    Case("number_of_100_kb", post(b'{"model":"zzz","n":' + b"9" * 100_000 + b"}"), (400, 404)),
    Case("gzip_bomb", post(gzip.compress(bytes(50 << 20)), b"Content-Encoding: gzip\r\n"), (400,)),
    Case("form_of_many_parts", post(b"--b\r\nX: 1\r\n\r\n\r\n" * 30_000, FORM), (400,)),
    Case("form_without_end", post(b"--b\r\n" + b"x" * 500_000, FORM), (400,)),
    Case("nothing_but_line_ends", b"\r\n" * 500, ()),
]


@dataclass(frozen=True)
class Target:
    address: tuple[str, int]
    #: asks for something that is relayed
    plain: bytes
    #: nginx answers much of it itself, each version in its own way
    strict: bool


@pytest.fixture(scope="module", params=["direct", "nginx"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("hostile")
    if request.param == "direct":
        with running(folder, {"m": fake_model()}, max_body_mb=1, allowed_hosts=["p"]) as proxy:
            yield Target(("127.0.0.1", proxy.port), post(BODY), strict=True)
        return
    with (
        gunicorn(folder, unix=True) as control,
        nginx(folder, str(control.address)) as address,
        Upstream(lambda visit: visit.send(plain_answer(b"{}"))) as upstream,
    ):
        yield Target(address, asked(upstream.port), strict=False)


def asked(port: int) -> bytes:
    return request("/x", {"model": str(port)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_bytes_harm_nobody(target: Target, case: Case) -> None:
    answer = everything(target, case.data)
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]
    final = [status for status in statuses if status != 100]
    assert b"x-injected" not in answer.lower().split(b"\r\n\r\n")[0]
    assert b"root:" not in answer
    if target.strict:
        assert final[0:1] == [] if not case.statuses else final[0] in case.statuses, answer[:500]
        assert len(final) == bool(case.statuses), "one message, two answers"
    with Wire(target.address) as wire:
        assert wire.send(target.plain).read_answer().status == 200


def everything(target: Target, data: bytes) -> bytes:
    """Send bytes and no more, and return all that comes until the other side ends."""
    pieces = []
    with socket.create_connection(target.address, timeout=DEADLINE_S) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # refused before all was sent
        try:
            while piece := sock.recv(65536):
                pieces.append(piece)
        except ConnectionResetError:
            assert not target.strict or pieces, "reset without an answer"
    return b"".join(pieces)


@pytest.mark.parametrize("later_s", [0.0, 0.3])
def test_a_client_that_sends_no_more_gets_its_answer(tmp_path: Path, later_s: float) -> None:
    def script(visit):  # type: ignore[no-untyped-def]
        visit.gone.wait(later_s)
        visit.send(plain_answer(b"{}"))

    with gunicorn(tmp_path) as proxy, Upstream(script) as upstream:
        assert isinstance(proxy.address, tuple)
        answer = everything(Target(proxy.address, b"", strict=True), asked(upstream.port))
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert answer.endswith(b"{}")
