"""A small application and broker around the real relay: no manager, no state file.

A request's model says what the broker does: "8101" grants the server on that port, "8101,8102" the
second once the first is to be avoided, "8101@/path" waits until that file exists, "!pool_busy" is
refused.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path

import orjson
from flask import Flask, Response, jsonify, request

from smartproxy.errors import from_code
from smartproxy.proxy.relay.relay import Grant, Job, hand_over
from smartproxy.proxy.wire.heads import header_bytes
from smartproxy.proxy.worker.plain import EXTENSION, Express, PlainRequest

LOOK_EVERY_S = 0.005


class PortBroker:
    """Grants what the model's name says, and counts."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    async def acquire(self, model_id: str, *, avoid_server_id: int | None = None) -> Grant:
        self.counts["asked"] += 1
        ports, _, gate = model_id.partition("@")
        try:
            while gate and not Path(gate).exists():
                await asyncio.sleep(LOOK_EVERY_S)
        except asyncio.CancelledError:
            self.counts["cancelled"] += 1
            raise
        if ports.startswith("!"):
            raise from_code(ports[1:], "as the test asked")
        if ports == "hang":
            time.sleep(60)
        usable = [int(port) for port in ports.split(",") if int(port) != avoid_server_id]
        port = usable[0] if usable else int(ports.split(",")[0])
        self.held[str(port)] += 1
        return Grant(
            server_id=port, host="127.0.0.1", port=port, api_key="server-key", model_id=model_id
        )

    def release(self, grant: Grant) -> None:
        self.held[str(grant.port)] -= 1
        self.counts["released"] += 1


def create_app() -> Flask:
    """Return the application; its times come from the environment."""
    app = Flask(__name__, static_folder=None)
    broker = PortBroker()
    request_timeout_s = float(os.environ.get("RELAY_TEST_REQUEST_TIMEOUT_S", "30"))
    comment_after_s = float(os.environ.get("RELAY_TEST_COMMENT_AFTER_S", "30"))

    @app.get("/health")
    def health() -> Response:
        held = {port: held for port, held in broker.held.items() if held}
        return jsonify(held=held, pid=os.getpid(), **broker.counts)

    @app.route("/<path:path>", methods=["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
    def relay(path: str) -> Response:
        body = request.get_data(cache=False)
        fields = orjson.loads(body) if body.startswith(b"{") else {}
        job = Job(
            model_id=str(request.args.get("model") or fields["model"]),
            method=request.method,
            target=request.environ.get("RAW_URI") or f"/{path}",
            headers=header_bytes(request.headers.items()),
            body=body,
            stream=fields.get("stream") is True,
            request_timeout_s=request_timeout_s,
            sse_wait_comment_after_s=comment_after_s,
        )
        return hand_over(request.environ, job, broker)

    def decide(plain: PlainRequest, body: bytes) -> Job | None:
        if not body.startswith(b"{"):
            return None
        fields = orjson.loads(body)
        broker.counts["express"] += 1
        return Job(
            model_id=fields["model"],
            method="POST",
            target=plain.target.decode(),
            headers=plain.headers,
            body=body,
            stream=fields.get("stream") is True,
            request_timeout_s=request_timeout_s,
            sse_wait_comment_after_s=comment_after_s,
        )

    if "RELAY_TEST_EXPRESS" in os.environ:
        app.extensions[EXTENSION] = Express(broker=broker, decide=decide)
    return app
