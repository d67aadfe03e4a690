"""What monitoring polls: /health, /status, /metrics, and /openapi.json. Answered from the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import yaml
from flask import Blueprint, Response, g, jsonify, request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from smartproxy import doorbell
from smartproxy.catalog.live import Live
from smartproxy.config.settings import Settings
from smartproxy.entities import pool_status
from smartproxy.errors import ManagerDown, ShuttingDown, StateError
from smartproxy.proxy import auth
from smartproxy.proxy.auth import Role
from smartproxy.proxy.pages import discreet, metrics, status, tables, view
from smartproxy.proxy.pages.counting import RequestCounts
from smartproxy.state.store import Store

#: a look at the GPUs that is no older needs no other
FRESH_S = 0.25


def blueprint(live: Live, store: Store, counting: RequestCounts) -> Blueprint:
    """Return the routes."""
    monitoring = Blueprint("monitoring", __name__)

    @monitoring.before_request
    def check_key() -> None:
        g.role = auth.check(request, live.settings)

    @monitoring.get("/health")
    def health() -> Response:
        body = _read(lambda: view.health(store, live.settings), _health_without_file(live.settings))
        _ask_for_look(body["observed_age"], live.settings)
        return _answer(body, tables.health)

    @monitoring.get("/status")
    def whole_status() -> Response:
        body = _read(lambda: status.status(store, live.settings), {"gpus": [], "queue": []})
        _ask_for_look(body["observed_age"], live.settings)
        return _answer(body, tables.status)

    @monitoring.get("/metrics")
    def prometheus() -> Response:
        counting.write()
        try:
            text = metrics.text(store)
        except StateError as error:
            raise ManagerDown(f"the state file can't be read: {error}") from None
        return Response(text, content_type=CONTENT_TYPE_PLAIN_0_0_4)

    @monitoring.get("/openapi.json")
    def openapi() -> Response:
        return Response(openapi_json(), mimetype="application/json")

    return monitoring


def _ask_for_look(age_s: float | None, settings: Settings) -> None:
    """Have the manager look at the GPUs again, unless it just did: polling costs it little."""
    if age_s is None or age_s > FRESH_S:
        doorbell.ring(settings.state_dir, b"look")


@cache
def openapi_json() -> str:
    """Return docs/openapi.yaml, which the package carries, as JSON."""
    source = resources.files("smartproxy.proxy").joinpath("openapi.yaml")
    return json.dumps(yaml.safe_load(source.read_text(encoding="utf-8")))


def _read(build: Callable[[], dict[str, Any]], nothing: dict[str, Any]) -> dict[str, Any]:
    """Return build(), or what can be said without a state file: a worker is up, no more."""
    try:
        return build()
    except StateError as error:
        return {
            "status": "degraded",
            "reasons": [f"the state file can't be read: {error}"],
            "mode": "cpu",
            "servers": [],
            "manager": view.UNKNOWN_MANAGER,
            "observed_at": None,
            "observed_age": None,
            **nothing,
        }


def _health_without_file(settings: Settings) -> dict[str, Any]:
    gpus = pool_status([], settings.gpu_allocation_strategy)
    return {"gpu_pool_status": gpus.model_dump(mode="json")}


def _answer(body: dict[str, Any], as_text: Callable[[dict[str, Any]], str]) -> Response:
    stopping = body["manager"]["stopping"]
    body = discreet.for_role(body, g.role)
    as_text = discreet.as_text if g.role is Role.STRANGER else as_text
    text = Response(as_text(body), mimetype="text/plain") if _wants_text() else None
    response = text or jsonify(body)
    if stopping:
        response.status_code = ShuttingDown.http_status
    return response


def _wants_text() -> bool:
    best = request.accept_mimetypes.best_match(["application/json", "text/plain"])
    return best == "text/plain"
