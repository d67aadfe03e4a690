"""Which requests go the short way: only those that can be read in one way."""

from __future__ import annotations

import pytest

from smartproxy.proxy.worker.plain import MAX_HEAD_BYTES, MAX_HEADERS, plain_request

LINE = b"POST /v1/chat/completions?a=%20 HTTP/1.1\r\n"
HOST = b"Host: p\r\nContent-Length: 2\r\n"


def test_a_plain_head_is_read() -> None:
    plain = plain_request(LINE + HOST + b"X-Id:  a b \r\nAuthorization: Bearer k\r\n\r\n")
    assert plain
    assert (plain.path, plain.target) == (b"/v1/chat/completions", b"/v1/chat/completions?a=%20")
    assert plain.headers == (
        (b"Host", b"p"),
        (b"Content-Length", b"2"),
        (b"X-Id", b"a b"),
        (b"Authorization", b"Bearer k"),
    )
    assert plain.keep_alive
    assert plain.field(b"authorization") == "Bearer k"


@pytest.mark.parametrize(
    ("value", "keep_alive"), [(b"close", False), (b"Close", False), (b"keep-alive", True)]
)
def test_connection_says_whether_it_goes_on(value: bytes, keep_alive: bool) -> None:
    plain = plain_request(LINE + HOST + b"Connection: %b\r\n\r\n" % value)
    assert plain
    assert plain.keep_alive is keep_alive


@pytest.mark.parametrize(
    "head",
    [
        LINE.replace(b"POST", b"GET") + HOST,
        LINE.replace(b"1.1", b"1.0") + HOST,
        LINE.replace(b"/v1", b"http://p/v1") + HOST,
        LINE.replace(b"%20", b"\x80") + HOST,
        LINE + b"Content-Length: 2\r\n",
        LINE + HOST + b"Content-Length: 2\r\n",
        LINE + HOST + b"Host: q\r\n",
        LINE + HOST + b"Content-Type: a/b\r\nContent-Type: c/d\r\n",
        LINE + HOST + b"Transfer-Encoding: chunked\r\n",
        LINE + HOST + b"Expect: 100-continue\r\n",
        LINE + HOST + b"Upgrade: h2c\r\n",
        LINE + HOST + b"Connection: x-mine\r\n",
        LINE + HOST + b"X_Mine: 1\r\n",
        LINE + HOST + b"X-Mine : 1\r\n",
        LINE + HOST + b": 1\r\n",
        LINE + HOST + b"X-Mine\r\n",
        LINE + HOST + b"X-Mine: a\r\n b\r\n",
        LINE + HOST + b"X-Mine: a\x00\r\n",
        LINE + HOST + b"X-Mine: a\n",
        LINE + HOST + b"X-Mine: a\nX-Other: b\r\n",
        LINE + HOST + b"X-Long: %b\r\n" % (b"x" * MAX_HEAD_BYTES),
        LINE + HOST + b"X-Many: 1\r\n" * MAX_HEADERS,
        LINE,
        b"",
    ],
)
def test_anything_else_is_left_to_gunicorn_and_the_application(head: bytes) -> None:
    assert plain_request(head + b"\r\n") is None
