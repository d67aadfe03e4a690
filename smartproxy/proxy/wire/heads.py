"""HTTP/1.1 heads: the request a server gets, its answer's head, what a client gets of that.

Bytes in, bytes out; no sockets, no decisions about retries. Bodies are in `bodies`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate
from enum import StrEnum
from functools import lru_cache

#: an answer's head beyond this is not llama-server's
MAX_HEAD_BYTES = 65536

TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
#: field-content of RFC 9110 5.5: no control character but tab, so no CR, LF or NUL
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
#: a request target has no blank and no control character (RFC 9112 3.2)
TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]+")
STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")

LENGTH = re.compile(rb"[0-9]{1,15}")

#: meant for one hop only (RFC 9110 7.6.1), beside what a Connection header names
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",  # we pass none on
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
#: set anew by us, or the client's credentials, which are for us and not for the server
REPLACED = frozenset({b"host", b"content-length", b"expect", b"authorization", b"x-api-key"})
#: what only we and our nginx may say
INTERNAL_PREFIXES = (b"x-smartproxy-", b"x-accel-")
#: what only we may say in an answer: a server opens itself to every page
OURS_IN_ANSWERS = (*INTERNAL_PREFIXES, b"access-control-")


class BadAnswer(Exception):
    """What the server sent is not valid HTTP/1.1; the relay treats it as a server that died."""


class Framing(StrEnum):
    """How a message's end is known."""

    NONE = "none"  # it has no body (HEAD, 204, 304)
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"  # it ends with the connection


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """Status line and headers, as the server (or the relay itself) gave them."""

    status: int
    reason: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    framing: Framing
    #: of the body; None unless framing is LENGTH
    length_bytes: int | None = None
    is_event_stream: bool = False


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the first value of a header (name in lower case), or nothing."""
    for key, value in headers:  # a generator would cost twice as much, on every request
        if key.lower() == name:
            return value
    return b""


def request_bytes(
    *,
    method: str,
    target: str,
    headers: Iterable[tuple[bytes, bytes]],
    host: str,
    api_key: str | None,
    body: bytes | bytearray,
) -> bytes:
    """Return the head to send to a server.

    The client's credentials, hop-by-hop headers and anything in our own name are left out; a header
    that could break the line it stands on is left out too. Raises ValueError where method or target
    could.
    """
    verb = method.encode("latin-1")
    if not TOKEN.fullmatch(verb):
        raise ValueError(f"not a method: {method!r}")
    lines = [verb + b" " + target_bytes(target) + b" HTTP/1.1", b"Host: " + host.encode("latin-1")]
    dropped = one_hop_names(headers) | REPLACED
    for name, value in headers:
        lowered = name.lower()
        if lowered in dropped or lowered.startswith(INTERNAL_PREFIXES):
            continue
        if TOKEN.fullmatch(name) and FIELD_VALUE.fullmatch(value):
            lines.append(b"%b: %b" % (name, value))
    if api_key:
        lines.append(b"Authorization: Bearer " + api_key.encode("latin-1"))
    if body or method not in ("GET", "HEAD", "OPTIONS", "DELETE"):
        lines.append(b"Content-Length: %d" % len(body))
    # One connection a request: llama-server closes its own after a stream although it announces
    # keep-alive, so a pooled one may be dead at any time (facts-datapath.md, trap 4).
    lines.append(b"Connection: close\r\n\r\n")
    return b"\r\n".join(lines)


def header_bytes(headers: Iterable[tuple[str, str]]) -> tuple[tuple[bytes, bytes], ...]:
    """Return headers as they are on the wire, from a framework's text."""
    return tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)


def target_bytes(target: str) -> bytes:
    """Return a request target for the wire. Raises ValueError where it could break its line."""
    data = target.encode("latin-1")
    if not TARGET.fullmatch(data) or not data.startswith(b"/"):
        raise ValueError(f"not a request target: {target!r}")
    return data


@lru_cache(maxsize=64)  # all streams of a server begin with the same bytes
def parse_head(data: bytes, method: str) -> AnswerHead:
    """Return the head that `data` (up to and with its blank line) holds. Raises BadAnswer."""
    first, *lines = data[:-4].split(b"\r\n")
    status_line = STATUS_LINE.fullmatch(first)
    if not status_line:
        raise BadAnswer(f"bad status line {first[:80]!r}")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        value = value.strip(b" \t")
        if not colon or not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise BadAnswer(f"bad header line {line[:80]!r}")
        if not name.lower().startswith(OURS_IN_ANSWERS):  # a server does not speak in our name
            headers.append((name, value))
    status = int(status_line[1])
    framing, length = _framing(status, method, headers)
    return AnswerHead(
        status=status,
        reason=status_line[2] or b"",
        headers=tuple(headers),
        framing=framing,
        length_bytes=length,
        is_event_stream=header(headers, b"content-type").lower().startswith(b"text/event-stream"),
    )


def client_head(head: AnswerHead, framing: Framing, keep_alive: bool) -> bytes:
    """Return the head a client gets: the server's end-to-end headers, and this connection's own.

    framing: of the body as the client will see it.
    """
    lines, dated = _client_lines(head, framing, keep_alive)
    return lines if dated else b"%b\r\nDate: %b\r\n\r\n" % (lines[:-4], _date(int(time.time())))


@lru_cache(maxsize=64)
def _client_lines(head: AnswerHead, framing: Framing, keep_alive: bool) -> tuple[bytes, bool]:
    """Return a client's head without what changes by the second, and whether it has a date."""
    kept = _forwarded(head, framing)
    lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    lines += [b"%b: %b" % pair for pair in kept]
    if framing is Framing.CHUNKED:
        lines.append(b"Transfer-Encoding: chunked")
    lines.append(b"Connection: keep-alive\r\n\r\n" if keep_alive else b"Connection: close\r\n\r\n")
    return b"\r\n".join(lines), bool(header(kept, b"date"))


def end_to_end(head: AnswerHead, framing: Framing) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer that are the client's business, and what we add."""
    kept = _forwarded(head, framing)
    if not header(kept, b"date"):
        kept.append((b"Date", _date(int(time.time()))))
    return kept


def _forwarded(head: AnswerHead, framing: Framing) -> list[tuple[bytes, bytes]]:
    dropped = one_hop_names(head.headers)
    if framing not in (Framing.LENGTH, Framing.NONE) or head.status == 204:
        dropped = dropped | {b"content-length"}
    kept = [(name, value) for name, value in head.headers if name.lower() not in dropped]
    if head.is_event_stream:
        # Otherwise an nginx in front keeps the tokens back until its buffer is full.
        kept.append((b"X-Accel-Buffering", b"no"))
    return kept


@lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    """Return a Date header's value. RFC 9110 6.6.1: whoever forwards without one adds it."""
    return formatdate(second, usegmt=True).encode("ascii")


def one_hop_names(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Return the lower-case names that must not be forwarded from these headers."""
    named = [
        name.strip(b" \t").lower()
        for key, value in headers
        if key.lower() == b"connection"
        for name in value.split(b",")
    ]
    return HOP_BY_HOP.union(named) if named else HOP_BY_HOP


def _framing(
    status: int, method: str, headers: list[tuple[bytes, bytes]]
) -> tuple[Framing, int | None]:
    """RFC 9112 6.3, for an answer."""
    lengths = {value for name, value in headers if name.lower() == b"content-length"}
    length = lengths.pop() if lengths else None
    codings = [value.lower() for name, value in headers if name.lower() == b"transfer-encoding"]
    if length is not None and not codings and (lengths or not LENGTH.fullmatch(length)):
        raise BadAnswer(f"content length {length!r} is not one number")
    if method == "HEAD" or status in (204, 304) or status < 200:
        return Framing.NONE, None
    if codings:
        if codings != [b"chunked"]:
            raise BadAnswer(f"transfer coding {codings!r} is not understood")
        return Framing.CHUNKED, None
    return (Framing.CLOSE, None) if length is None else (Framing.LENGTH, int(length))
