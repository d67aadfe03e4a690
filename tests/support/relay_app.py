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
from dataclasses import replace
from pathlib import Path
from typing import cast

from flask import Flask, Response, jsonify

from smartproxy.catalog.catalog import Catalog, ModelSpec, build_catalog
from smartproxy.catalog.live import Live
from smartproxy.config.settings import ModelSettings, Settings
from smartproxy.errors import from_code
from smartproxy.proxy import routes
from smartproxy.proxy.app import handle_errors, mind_browsers
from smartproxy.proxy.browsers import Browsers
from smartproxy.proxy.inference import Incoming, check_head, job_for
from smartproxy.proxy.relay.relay import Job, Lease
from smartproxy.proxy.worker.plain import Application
from tests.support.wire import HOSTS, PAGE

LOOK_EVERY_S = 0.005


class PortBroker:
    """Grants what the model's name says, and counts."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    async def acquire(self, model_id: str, *, avoid_server_id: int | None = None) -> Lease:
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
        return Lease(
            server_id=port, host="127.0.0.1", port=port, api_key="server-key", model_id=model_id
        )

    def release(self, lease: Lease) -> None:
        self.held[str(lease.port)] -= 1
        self.counts["released"] += 1


class PortCatalog:
    """Knows every name as a model."""

    default = None

    def __init__(self, settings: Settings) -> None:
        (self._any,) = build_catalog(settings).models.values()

    def resolve(self, name: str) -> ModelSpec:
        return replace(self._any, id=name)


class AllPaths:
    """Lets a POST to any path go the plain way."""

    def __contains__(self, path: object) -> bool:
        return True


def create_app() -> Application:
    """Return the application; its times come from the environment."""
    app = Flask(__name__, static_folder=None)
    settings = Settings(
        models={"any": ModelSettings(path=Path("any.gguf"))},
        max_body_mb=1000,
        allowed_hosts=HOSTS,
        allowed_origins=(PAGE,),
        request_timeout=float(os.environ.get("RELAY_TEST_REQUEST_TIMEOUT_S", "30")),
        sse_wait_comment_after=float(os.environ.get("RELAY_TEST_COMMENT_AFTER_S", "30")),
    )

    broker, browsers = PortBroker(), Browsers(settings)
    live = Live(settings, cast(Catalog, PortCatalog(settings)))

    @app.get("/health")
    def health() -> Response:
        held = {port: held for port, held in broker.held.items() if held}
        return jsonify(held=held, pid=os.getpid(), **broker.counts)

    def decide(incoming: Incoming) -> Job:
        return job_for(incoming, live.now, browsers, on_settled=None)

    def admit(incoming: Incoming, length_bytes: int) -> int:
        check_head(incoming, length_bytes, settings, browsers)
        return settings.max_body_mb << 20

    def decide_plain(incoming: Incoming) -> Job:
        broker.counts["plain"] += 1
        return decide(incoming)

    app.register_blueprint(routes.blueprint(decide, broker, browsers, lambda status: None))
    mind_browsers(app, browsers)
    handle_errors(app, live, browsers)
    return Application(
        wsgi=app,
        broker=broker,
        decide=decide_plain,
        admit=admit,
        browsers=browsers,
        on_refused=lambda status: None,
        paths=AllPaths() if "RELAY_TEST_PLAIN" in os.environ else (),
    )
