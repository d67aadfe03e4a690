"""The short way of a plain request: from its bytes to a job, without a framework in between.

Only what is fully understood goes it: one POST, its head and body complete, headers of the plainest
form. Everything else goes gunicorn's and Flask's way. What becomes of the request is decided by the
same function on both (`inference`). docs/datapath.md has what the short way saves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from smartproxy.proxy.browsers import Browsers
from smartproxy.proxy.inference import INFERENCE_PATHS, Incoming
from smartproxy.proxy.relay.relay import Broker
from smartproxy.proxy.relay.upstream import Job
from smartproxy.proxy.wire.request_head import RequestHead

#: gunicorn's limits on lines and their number are looked at for longer ones
MAX_HEAD_BYTES = 8192
#: a larger body is parsed in a thread, as it may take milliseconds
MAX_BODY_BYTES = 1 << 20
MAX_HEADERS = 64

#: no underscore in a name (CGI takes it for a dash), no line that goes on in the next
HEAD = re.compile(
    rb"POST (/[!-~]*) HTTP/1\.1\r\n"
    rb"((?:[!#$%&'*+\-.^`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)+)\r\n"
)
ONCE = frozenset(
    {b"host", b"content-length", b"content-type", b"authorization", b"x-api-key", b"origin"}
)
#: what changes how the message is to be read
OTHER_WAY = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"http2-settings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRequest:
    """What there is to know of a POST's head."""

    path: bytes
    #: path and query
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    keep_alive: bool
    #: by lower-case name; of repeated ones the last
    fields: dict[bytes, bytes]

    def field(self, name: bytes) -> str:
        """Return a header's value, or nothing (name in lower case)."""
        return self.fields.get(name, b"").decode("latin-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """A WSGI application, and what a RelayWorker needs of it beside that."""

    wsgi: Callable[..., Iterable[bytes]]
    broker: Broker
    #: raises SmartProxyError
    decide: Callable[[Incoming], Job]
    #: given a request without its body, and the length that its head tells (0: none, or not yet
    #: known); returns how many bytes the body may have. Raises SmartProxyError
    admit: Callable[[Incoming, int], int]
    browsers: Browsers
    #: told the status of a refusal
    on_refused: Callable[[int], None]
    #: paths of POST requests that are always the relay's
    paths: Container[str] = INFERENCE_PATHS

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        return self.wsgi(environ, start_response)


def incoming_of(
    plain: PlainRequest,
    body: bytes | bytearray,
    paths: Container[str],
    *,
    behind_front: bool = False,
) -> Incoming | None:
    """Return a plain request as the decision sees it; None: it goes the other way.

    behind_front: it came on a unix socket.
    """
    path = plain.path.decode("latin-1")
    if path not in paths or plain.fields.get(b"content-type", b"")[:10].lower() == b"multipart/":
        return None
    return Incoming(
        method="POST",
        path=path,
        target=plain.target.decode("latin-1"),
        headers=plain.headers,
        fields=plain.fields,
        body=body,
        behind_front=behind_front,
    )


def incoming_head(head: RequestHead, *, behind_front: bool) -> Incoming:
    """Return a request as the decision sees it, without its body."""
    target = head.target.decode("latin-1")
    return Incoming(
        method=head.method.decode("latin-1"),
        path=unquote(target.partition("?")[0]),
        target=target,
        headers=head.headers,
        fields={name.lower(): value for name, value in head.headers},
        body=b"",
        behind_front=behind_front,
    )


def plain_request(head: bytes) -> PlainRequest | None:
    """Return what a head says, or None when it is not of the plainest form."""
    if len(head) > MAX_HEAD_BYTES:
        return None
    match = HEAD.fullmatch(head)
    if match is None:
        return None
    target, lines = match.groups()
    pieces = lines.split(b"\r\n")[:-1]
    if len(pieces) > MAX_HEADERS:
        return None
    headers = []
    fields: dict[bytes, bytes] = {}
    for line in pieces:
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        lowered = name.lower()
        if lowered in OTHER_WAY or (lowered in ONCE and lowered in fields):
            return None
        headers.append((name, value))
        fields[lowered] = value
    connection = fields.get(b"connection", b"").lower()
    if b"host" not in fields or connection not in (b"", b"keep-alive", b"close"):
        return None
    return PlainRequest(
        path=target.partition(b"?")[0],
        target=target,
        headers=tuple(headers),
        keep_alive=connection != b"close",
        fields=fields,
    )
