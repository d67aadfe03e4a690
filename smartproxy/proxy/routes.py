"""Flask's way of a request that is for no page of ours: told as an `Incoming`, and decided on.

Under RelayWorker requests of the plainest form do not come here (`worker.plain`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from urllib.parse import quote

from flask import Blueprint, Response, g, request
from werkzeug.datastructures import Headers

from smartproxy.proxy.browsers import Browsers
from smartproxy.proxy.inference import BODY_KEY, PATH_SAFE, Incoming
from smartproxy.proxy.relay.relay import Broker, Job, RelayResponse
from smartproxy.proxy.wire import own_answers
from smartproxy.proxy.wire.heads import header_bytes
from smartproxy.proxy.wire.own_answers import OwnAnswer

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def blueprint(
    decide: Callable[[Incoming], Job],
    broker: Broker,
    browsers: Browsers,
    on_refused: Callable[[int], None],
) -> Blueprint:
    """Return the catch-all; whatever is registered more exactly wins over it.

    on_refused: told the status of what was refused and not relayed.
    """
    routes = Blueprint("relay", __name__)

    @routes.after_request
    def count_refused(response: Response) -> Response:
        if response.status_code >= 400 and not g.get("handed_over"):
            on_refused(response.status_code)
        return response

    @routes.route("/", defaults={"path": ""}, methods=METHODS, provide_automatic_options=False)
    @routes.route("/<path:path>", methods=METHODS, provide_automatic_options=False)
    def relay_any(path: str) -> Response:
        if request.method == "OPTIONS":  # a server would allow every page
            return as_response(own_answers.preflight(reader(browsers)))
        job = decide(incoming())
        g.handed_over = True
        return RelayResponse(job, broker)

    return routes


def incoming() -> Incoming:
    """Return the request that Flask handles now."""
    headers = header_bytes(request.headers.items())
    return Incoming(
        method=request.method,
        path=request.path,
        target=raw_target(),
        headers=headers,
        fields={name.lower(): value for name, value in headers},
        body=request.environ.get(BODY_KEY) or request.get_data(cache=False),
        behind_front=behind_front(),
    )


def behind_front() -> bool:
    """Return whether the request came on a unix socket, from a front server."""
    return getattr(request.environ.get("gunicorn.socket"), "family", None) == socket.AF_UNIX


def raw_target() -> str:
    """Return path and query as the client sent them."""
    raw: str = request.environ.get("RAW_URI") or request.full_path.rstrip("?")
    if raw.startswith("/"):
        return raw
    query = request.query_string.decode("latin-1")  # absolute form: only a proxy's client sends it
    return quote(request.path, safe=PATH_SAFE) + (f"?{query}" if query else "")


def reader(browsers: Browsers) -> bytes:
    """Return the origin whose pages may read the answer, `*`, or nothing for nobody."""
    return browsers.reader(request.headers.get("Origin", ""), request.path)


def as_response(answer: OwnAnswer) -> Response:
    """Return an answer of our own as Flask's."""
    response = Response(answer.body, status=answer.status)
    response.headers = Headers(
        [(name.decode(), value.decode("latin-1")) for name, value in answer.headers]
    )
    response.content_length = len(answer.body)
    return response
