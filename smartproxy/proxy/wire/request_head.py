"""A request's head: its lines, and what it says of the body that follows.

Strict where a second reader could see another message in the same bytes (RFC 9112 11.2): framing is
one length, or chunks, or nothing. Bytes in, bytes out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from smartproxy.errors import BadRequest
from smartproxy.proxy.wire.heads import FIELD_VALUE, LENGTH, TOKEN

REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/1\.([01])")
#: what a body that is collected to its end needs no more
OF_THE_WAY = frozenset({b"content-length", b"transfer-encoding", b"trailer", b"expect"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """A head that can be read in one way only."""

    method: bytes
    target: bytes
    http11: bool
    headers: tuple[tuple[bytes, bytes], ...]
    #: the body comes in chunks; else it has `length_bytes`
    chunked: bool
    length_bytes: int
    #: the client waits for `100 Continue` before it sends the body
    expects_continue: bool

    def with_length(self, body_bytes: int) -> bytes:
        """Return the head of the same request with a body of known length."""
        lines = [b"%b %b HTTP/1.%d" % (self.method, self.target, self.http11)]
        lines += [
            b"%b: %b" % (name, value)
            for name, value in self.headers
            if name.lower() not in OF_THE_WAY
        ]
        lines.append(b"Content-Length: %d\r\n\r\n" % body_bytes)
        return b"\r\n".join(lines)


def request_head(data: bytes) -> RequestHead:
    """Return what `data` (up to and with its blank line) says. Raises BadRequest."""
    first, *lines = data[:-4].split(b"\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if line is None:
        raise BadRequest(f"not the first line of an HTTP/1.1 request: {first[:80]!r}")
    headers = tuple(_header(line) for line in lines)
    http11 = line[3] == b"1"
    if len(_values(headers, b"host")) > 1:
        raise BadRequest("the request has more than one Host header")
    chunked = _is_chunked(headers, http11)
    expects = _values(headers, b"expect")
    if expects and [value.lower() for value in expects] != [b"100-continue"]:
        raise ExpectationRefused(f"this expectation is not known here: {expects[0][:80]!r}")
    return RequestHead(
        method=line[1],
        target=line[2],
        http11=http11,
        headers=headers,
        chunked=chunked,
        length_bytes=_length(headers, chunked),
        expects_continue=bool(expects) and http11,
    )


class ExpectationRefused(BadRequest):
    """The client expects something else than 100-continue."""

    http_status = 417


class CodingRefused(BadRequest):
    """The body comes in a transfer coding that no worker reads."""

    http_status = 501


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    if not colon or not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
        raise BadRequest(f"not a header line: {line[:80]!r}")
    return name, value


def _values(headers: tuple[tuple[bytes, bytes], ...], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _is_chunked(headers: tuple[tuple[bytes, bytes], ...], http11: bool) -> bool:
    codings = [value.lower() for value in _values(headers, b"transfer-encoding")]
    if not codings:
        return False
    if codings != [b"chunked"]:
        raise CodingRefused(f"no transfer coding but `chunked` is read here, got {codings!r}")
    if not http11:
        raise BadRequest("HTTP/1.0 has no chunks: Transfer-Encoding is for HTTP/1.1")
    return True


def _length(headers: tuple[tuple[bytes, bytes], ...], chunked: bool) -> int:
    lengths = _values(headers, b"content-length")
    if lengths and chunked:
        raise BadRequest("the request has both Transfer-Encoding and Content-Length")
    if len(lengths) > 1:
        raise BadRequest("the request has more than one Content-Length header")
    if lengths and not LENGTH.fullmatch(lengths[0]):
        raise BadRequest(f"Content-Length must be a number of bytes, got {lengths[0][:80]!r}")
    return int(lengths[0]) if lengths else 0
