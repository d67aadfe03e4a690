"""POST /api/pause and /api/resume: new requests queue meanwhile, and nothing fails."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request

from smartproxy import doorbell
from smartproxy.catalog.live import Live
from smartproxy.errors import ManagerDown, StateError
from smartproxy.proxy import auth
from smartproxy.state import manager_row
from smartproxy.state.store import Store


def blueprint(live: Live, store: Store) -> Blueprint:
    """Return the routes."""
    pausing = Blueprint("pausing", __name__)

    @pausing.before_request
    def check_key() -> None:
        auth.check(request, live.settings)

    @pausing.post("/api/pause")
    def pause() -> Response:
        try:
            since = manager_row.pause(store, now=store.now())
        except StateError as error:
            raise ManagerDown(f"not paused: the state file can't be written: {error}") from None
        return jsonify({"paused": True, "paused_at": since})

    @pausing.post("/api/resume")
    def resume() -> Response:
        try:
            manager_row.resume(store, now=store.now())
        except StateError as error:
            raise ManagerDown(f"not resumed: the state file can't be written: {error}") from None
        doorbell.ring(live.settings.state_dir, b"resume")
        return jsonify({"paused": False, "paused_at": None})

    return pausing
