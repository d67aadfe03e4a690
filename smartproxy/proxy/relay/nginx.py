"""Letting nginx carry the bytes: sending it to a server, and its word when that failed.

nginx believes these headers from us alone, and we believe nginx's on a unix socket alone, which
only it reaches (deploy/nginx.conf, docs/datapath.md).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from smartproxy.proxy.wire.heads import AnswerHead, Framing, target_bytes

#: how long a hold outlasts the hand-over: the server counts the request itself well before
HOLD_S = 2.0
#: the named location of deploy/nginx.conf
LOCATION = b"@llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Who carries a request's bytes to a server, and whether that failed before."""

    #: nginx asked for it and offers to carry its bytes
    nginx_carries: bool = False
    #: the server that nginx could not reach for this very request
    failed_server_id: int | None = None


DIRECT = Delivery()


def delivery(*, data_plane: str, retry: str, family: int | None) -> Delivery:
    """Return who carries a request's bytes.

    data_plane, retry: its headers X-Smartproxy-Data-Plane and X-Smartproxy-Retry; family: of the
    socket it came on.
    """
    if family != socket.AF_UNIX:
        return DIRECT
    if retry.isdecimal():
        return Delivery(failed_server_id=int(retry))
    return Delivery(nginx_carries=data_plane == "nginx")


def delivery_of(environ: dict[str, Any]) -> Delivery:
    """Return who carries the bytes of a WSGI server's request."""
    return delivery(
        data_plane=environ.get("HTTP_X_SMARTPROXY_DATA_PLANE", ""),
        retry=environ.get("HTTP_X_SMARTPROXY_RETRY", ""),
        family=getattr(environ.get("gunicorn.socket"), "family", None),
    )


def redirect_head(
    *, server_id: int, host: str, port: int, api_key: str | None, target: str, reader: bytes
) -> AnswerHead:
    """Return the answer, of no body, that makes nginx send the request to a server.

    reader: the origin whose pages may read the server's answer, or nothing. The head carries no
    Content-Type: nginx would put it on the server's answer (facts-datapath.md, trap 2).
    """
    headers = [
        (b"X-Accel-Redirect", LOCATION),
        (b"X-Smartproxy-Backend", f"{host}:{port}".encode()),
        (b"X-Smartproxy-Target", target_bytes(target)),
        (b"X-Smartproxy-Server", b"%d" % server_id),
        (b"Content-Length", b"0"),
    ]
    if reader:
        headers.append((b"X-Smartproxy-Reader", reader))
    if api_key:
        headers.append((b"X-Smartproxy-Authorization", b"Bearer " + api_key.encode("latin-1")))
    return AnswerHead(
        status=200, reason=b"OK", headers=tuple(headers), framing=Framing.LENGTH, length_bytes=0
    )
