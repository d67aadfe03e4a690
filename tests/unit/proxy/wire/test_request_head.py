"""Heads of requests: framing that can be read in one way only, and what is left of it."""

from __future__ import annotations

import pytest

from smartproxy.errors import BadRequest
from smartproxy.proxy.wire.request_head import request_head

LINE = b"POST /v1/x?y=%20 HTTP/1.1\r\nHost: p\r\n"


def head(lines: bytes, first: bytes = LINE) -> bytes:
    return first + lines + b"\r\n"


@pytest.mark.parametrize(
    ("lines", "chunked", "length", "expects"),
    [
        (b"", False, 0, False),
        (b"Content-Length: 12\r\n", False, 12, False),
        (b"transfer-encoding:  Chunked \r\n", True, 0, False),
        (b"Content-Length: 12\r\nExpect: 100-Continue\r\n", False, 12, True),
    ],
)
def test_framing_is_read(lines: bytes, chunked: bool, length: int, expects: bool) -> None:
    read = request_head(head(lines))
    assert (read.chunked, read.length_bytes, read.expects_continue) == (chunked, length, expects)
    assert (read.method, read.target, read.http11) == (b"POST", b"/v1/x?y=%20", True)


def test_http_10_expects_nothing() -> None:
    first = LINE.replace(b"1.1", b"1.0")
    assert not request_head(head(b"Expect: 100-continue\r\n", first)).expects_continue


def test_a_collected_request_has_a_length_and_the_rest_of_its_headers() -> None:
    read = request_head(head(b"X-A: 1\r\nTransfer-Encoding: chunked\r\nTrailer: X-B\r\nX-a: 2\r\n"))
    assert read.with_length(7) == head(b"X-A: 1\r\nX-a: 2\r\nContent-Length: 7\r\n")


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5_0\r\n",
        b"Content-Length: \xb2\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 9999999999999999\r\n",
        b"Content-Length : 5\r\n",
        b" Content-Length: 5\r\n",
        b"X: a\r\n Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked\x0b\r\n",
        b"Transfer-Encoding:\r\n",
        b"Host: q\r\n",
        b"No colon\r\n",
        b": empty\r\n",
        b"X: a\x00b\r\n",
        b"X: a\rb\r\n",
        b"X: a\nb\r\n",
        b"Expect: 200-ok\r\n",
        b"Expect: 100-continue\r\nExpect: 100-continue\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(lines: bytes) -> None:
    with pytest.raises(BadRequest):
        request_head(head(lines))


@pytest.mark.parametrize(
    "first",
    [
        b"POST  /x HTTP/1.1\r\n",
        b"POST /x\r\n",
        b"POST /x HTTP/2.0\r\n",
        b"POST /x HTTP/1.1 \r\n",
        b"POST /x y HTTP/1.1\r\n",
        b"PO ST /x HTTP/1.1\r\n",
        b"POST /\x80 HTTP/1.1\r\n",
        b"\x16\x03\x01 /x HTTP/1.1\r\n",
    ],
)
def test_a_first_line_of_another_form_is_refused(first: bytes) -> None:
    with pytest.raises(BadRequest):
        request_head(head(b"Host: p\r\n", first))


def test_http_10_has_no_chunks() -> None:
    with pytest.raises(BadRequest):
        request_head(head(b"Transfer-Encoding: chunked\r\n", LINE.replace(b"1.1", b"1.0")))
