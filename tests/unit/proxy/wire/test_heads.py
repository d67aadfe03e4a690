"""Heads on the wire: what a server must not get, and answers that are not HTTP."""

from __future__ import annotations

import pytest

from smartproxy.proxy.wire.heads import (
    BadAnswer,
    Framing,
    client_head,
    end_to_end,
    header_bytes,
    parse_head,
    request_bytes,
)


def sent(headers: list[tuple[str, str]], **change: object) -> list[bytes]:
    request = {"method": "POST", "target": "/v1/x?y=%20", "host": "127.0.0.1:9", "api_key": "key"}
    data = request_bytes(**{**request, "headers": header_bytes(headers), "body": b"{}", **change})  # type: ignore[arg-type]
    assert data.endswith(b"\r\n\r\n")
    return data[:-4].split(b"\r\n")


def test_a_request_carries_the_servers_key_and_not_the_clients() -> None:
    lines = sent([("Authorization", "Bearer mine"), ("X-Api-Key", "mine"), ("Accept", "a/b")])
    assert lines == [
        b"POST /v1/x?y=%20 HTTP/1.1",
        b"Host: 127.0.0.1:9",
        b"Accept: a/b",
        b"Authorization: Bearer key",
        b"Content-Length: 2",
        b"Connection: close",
    ]


def test_without_a_key_no_authorization_is_sent() -> None:
    lines = sent([("Authorization", "Bearer mine")], api_key=None)
    assert not any(line.lower().startswith(b"authorization") for line in lines)


@pytest.mark.parametrize(
    "header",
    [
        ("Connection", "x-mine, close"),
        ("X-Mine", "named by Connection"),
        ("Keep-Alive", "5"),
        ("TE", "trailers"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "h2c"),
        ("Proxy-Authorization", "x"),
        ("Expect", "100-continue"),
        ("X-Smartproxy-Retry", "1"),
        ("X-Accel-Redirect", "/x"),
        ("X-Evil", "a\r\nX-Injected: 1"),
        ("X-Evil", "a\nb"),
        ("X-Evil", "a\x00b"),
        ("X-Evil\r\nX-Injected", "1"),
        ("", "empty name"),
    ],
)
def test_these_headers_never_reach_a_server(header: tuple[str, str]) -> None:
    lines = sent([("Connection", "x-mine"), header, ("Accept", "a/b")])
    assert len(lines) == 6
    assert b"Accept: a/b" in lines
    assert not any(b"njected" in line for line in lines)


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: 1", "/a\x00", "", "http://other/"])
def test_a_target_that_breaks_the_line_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="request target"):
        sent([], target=target)


def test_a_get_without_body_announces_none() -> None:
    lines = sent([], method="GET", body=b"")
    assert not any(line.startswith(b"Content-Length") for line in lines)


@pytest.mark.parametrize(
    ("head", "method", "framing", "length"),
    [
        (b"200 OK\r\nContent-Length: 5", "POST", Framing.LENGTH, 5),
        (b"200 OK\r\nContent-Length: 5\r\nContent-Length: 5", "POST", Framing.LENGTH, 5),
        (b"200 OK\r\nTransfer-Encoding: Chunked", "POST", Framing.CHUNKED, None),
        (
            b"200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
            "GET",
            Framing.CHUNKED,
            None,
        ),
        (b"200 OK\r\nServer: x", "POST", Framing.CLOSE, None),
        (b"200 OK\r\nContent-Length: 5", "HEAD", Framing.NONE, None),
        (b"204 No Content", "POST", Framing.NONE, None),
        (b"304 Not Modified\r\nContent-Length: 5", "GET", Framing.NONE, None),
        (b"200", "POST", Framing.CLOSE, None),
    ],
)
def test_framing_follows_rfc_9112(
    head: bytes, method: str, framing: Framing, length: int | None
) -> None:
    parsed = parse_head(b"HTTP/1.1 " + head + b"\r\n\r\n", method)
    assert (parsed.framing, parsed.length_bytes) == (framing, length)


@pytest.mark.parametrize(
    ("head", "method"),
    [
        (b"204 No Content\r\nContent-Length: x", "POST"),
        (b"304 Not Modified\r\nContent-Length: 5\r\nContent-Length: 6", "GET"),
        (b"200 OK\r\nContent-Length: -1", "HEAD"),
    ],
)
def test_a_length_is_checked_where_no_body_follows(head: bytes, method: str) -> None:
    with pytest.raises(BadAnswer):
        parse_head(b"HTTP/1.1 " + head + b"\r\n\r\n", method)


def test_an_answer_of_no_content_has_no_length() -> None:
    head = parse_head(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", "POST")
    assert b"ength" not in client_head(head, Framing.NONE, keep_alive=True)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/2 200 OK",
        b"HTTP/1.1 20 OK",
        b"SSH-2.0-x",
        b"HTTP/1.1 200 OK\r\nNo colon",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded",
        b"HTTP/1.1 200 OK\r\nBad name: b",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
        b"HTTP/1.1 200 OK\r\nA: b\x00c",
    ],
)
def test_a_head_that_is_not_http_is_refused(head: bytes) -> None:
    with pytest.raises(BadAnswer):
        parse_head(head + b"\r\n\r\n", "POST")


def test_a_client_gets_end_to_end_headers_and_our_connection() -> None:
    head = parse_head(
        b"HTTP/1.1 200 Fine\r\nServer: llama.cpp\r\nKeep-Alive: timeout=5\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\nAccess-Control-Allow-Origin: *\r\nDate: today\r\n"
        b"Access-Control-Allow-Credentials: true\r\nX-Accel-Redirect: /secret\r\n"
        b"X-Smartproxy-Error: forged\r\n\r\n",
        "POST",
    )
    assert client_head(head, Framing.CHUNKED, keep_alive=True) == (
        b"HTTP/1.1 200 Fine\r\nServer: llama.cpp\r\nDate: today\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
    )


def test_an_event_stream_tells_nginx_not_to_buffer() -> None:
    head = parse_head(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n", "POST"
    )
    assert (b"X-Accel-Buffering", b"no") in end_to_end(head, Framing.CHUNKED)
