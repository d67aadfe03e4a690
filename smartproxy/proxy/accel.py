"""Letting nginx carry the bytes: sending it to a server, and its word when that failed.

nginx believes these headers from us alone, and we believe nginx's on a unix socket alone, which
only it reaches (deploy/nginx.conf, docs/datapath.md).
"""

from __future__ import annotations

import socket
from typing import Any

from smartproxy.proxy.http_wire import AnswerHead, Framing, target_bytes

#: how long a hold outlasts the hand-over: the server counts the request itself well before
HOLD_S = 2.0
#: the named location of deploy/nginx.conf
LOCATION = b"@llama"


def nginx_carries(environ: dict[str, Any]) -> bool:
    """Return whether nginx asked for this request and offers to carry its bytes."""
    return (
        environ.get("HTTP_X_SMARTPROXY_DATA_PLANE") == "nginx"
        and failed_server_id(environ) is None
        and _on_unix_socket(environ)
    )


def failed_server_id(environ: dict[str, Any]) -> int | None:
    """Return the id of the server that nginx could not reach for this very request, if any."""
    server_id = environ.get("HTTP_X_SMARTPROXY_RETRY", "")
    return int(server_id) if server_id.isdecimal() and _on_unix_socket(environ) else None


def redirect_head(
    *, server_id: int, host: str, port: int, api_key: str | None, target: str
) -> AnswerHead:
    """Return the answer, of no body, that makes nginx send the request to a server.

    It carries no Content-Type: nginx would put it on the server's answer (facts-datapath.md, trap
    2).
    """
    headers = [
        (b"X-Accel-Redirect", LOCATION),
        (b"X-Smartproxy-Backend", f"{host}:{port}".encode()),
        (b"X-Smartproxy-Target", target_bytes(target)),
        (b"X-Smartproxy-Server", b"%d" % server_id),
        (b"Content-Length", b"0"),
    ]
    if api_key:
        headers.append((b"X-Smartproxy-Authorization", b"Bearer " + api_key.encode("latin-1")))
    return AnswerHead(
        status=200, reason=b"OK", headers=tuple(headers), framing=Framing.LENGTH, length_bytes=0
    )


def _on_unix_socket(environ: dict[str, Any]) -> bool:
    return getattr(environ.get("gunicorn.socket"), "family", None) == socket.AF_UNIX
