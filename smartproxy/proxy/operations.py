"""Everything that is not relayed: health, status, the catalogue, load and unload."""

from __future__ import annotations

import socket
import sqlite3
import time
from typing import Any

from flask import Blueprint, Response, jsonify, request
from tabulate import tabulate

from smartproxy.catalog import Catalog
from smartproxy.entities import pool_status
from smartproxy.errors import (
    LoadTimeout,
    ManagerDown,
    ModelNotFound,
    RouteNotFound,
    ShuttingDown,
    from_code,
)
from smartproxy.lifetime import worker_id
from smartproxy.proxy import auth, view
from smartproxy.proxy.ensure import MANAGER_PATIENCE_S, send_poke
from smartproxy.settings import Settings
from smartproxy.state import demand
from smartproxy.state.store import Store

LOOK_EVERY_S = 0.02


def blueprint(settings: Settings, catalog: Catalog, store: Store) -> Blueprint:
    """Return the operations' routes."""
    operations = Blueprint("operations", __name__)
    poke_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    poke_socket.setblocking(False)

    def poke(word: bytes) -> None:
        send_poke(poke_socket, settings.state_dir, word)

    @operations.before_request
    def check_key() -> None:
        auth.check(request, settings)

    @operations.get("/health")
    def health() -> Response:
        poke(b"look")
        body = _read(lambda: view.health(store, settings), settings)
        response = _tables(body) if _wants_text() else jsonify(body)
        if body["manager"].get("stopping"):
            response.status_code = ShuttingDown.http_status
        return response

    @operations.get("/v1/models")
    @operations.get("/models")
    def models() -> Response:
        return jsonify({"object": "list", "data": view.model_list(store, catalog)})

    @operations.get("/v1/models/<path:name>")
    @operations.get("/models/<path:name>")
    def model(name: str) -> Response:
        spec = catalog.resolve(name)
        listed = {entry["id"]: entry for entry in view.model_list(store, catalog)}
        return jsonify(listed[spec.id])

    @operations.post("/api/models/<path:rest>")
    def act(rest: str) -> Response:
        found = catalog.split_path(rest)
        if found is None:
            raise ModelNotFound(f"no model's id starts '{rest[:200]}'")
        spec, verb = found
        if verb not in ("load", "unload"):
            raise RouteNotFound(f"no operation '{verb}'; there are load and unload")
        _demand_and_wait(store, settings, verb, spec.id, poke)
        listed = {entry["id"]: entry for entry in view.model_list(store, catalog)}
        return jsonify(listed[spec.id])

    return operations


def _read(build: Any, settings: Settings) -> dict[str, Any]:
    """Return build(), or what can be said without a state file: a worker is up, no more."""
    try:
        body: dict[str, Any] = build()
    except sqlite3.Error as error:
        gpus = pool_status([], settings.gpu_allocation_strategy)
        return {
            "status": "degraded",
            "reasons": [f"the state file can't be read: {error}"],
            "mode": "cpu",
            "servers": [],
            "gpu_pool_status": gpus.model_dump(mode="json"),
            "manager": {"alive": False, "heartbeat_age": None},
            "observed_at": None,
        }
    return body


def _demand_and_wait(store: Store, settings: Settings, kind: str, model_id: str, poke: Any) -> None:
    """Ask the manager for something by hand and wait for its answer. Raises what it answers."""
    worker, now = worker_id(), time.time()
    try:
        demand_id = demand.ask(store, kind, model_id, worker, now=now, explicit=True)
    except sqlite3.Error as error:
        raise ManagerDown(f"the state file can't be written: {error}") from None
    poke(kind.encode())
    limit_s = settings.queue_timeout + settings.load_timeout
    deadline, renew_at = time.monotonic() + limit_s, time.monotonic() + demand.RENEW_S
    silent_since: float | None = None
    try:
        while True:
            answer = demand.read_answers(store, [demand_id]).get(demand_id)
            if answer is not None:
                if answer.error_code:
                    raise from_code(answer.error_code, answer.message or "")
                return
            now = time.monotonic()
            if now > deadline:
                raise LoadTimeout(f"{kind} of '{model_id}' was not done after {limit_s:.0f} s")
            if view.manager(store, now=time.time())["alive"]:
                silent_since = None
            elif silent_since is None:
                silent_since = now
            elif now - silent_since > MANAGER_PATIENCE_S:
                raise ManagerDown(f"the manager does not answer; '{kind}' was not done")
            if now > renew_at:
                demand.renew(store, worker, now=time.time())
                renew_at = now + demand.RENEW_S
            time.sleep(LOOK_EVERY_S)
    finally:
        demand.withdraw(store, [demand_id])


def _wants_text() -> bool:
    best = request.accept_mimetypes.best_match(["application/json", "text/plain"])
    return best == "text/plain"


def _tables(body: dict[str, Any]) -> Response:
    """Return /health as tables for a terminal."""
    pool = body["gpu_pool_status"]
    servers = [
        [s["id"], s["model_id"], s["state"], s["port"], s["process"], s["reason"]]
        for s in body["servers"]
    ]
    gpus = [
        [g["id"], g["name"], g["state"], f"{g['used_memory']:.1f}/{g['total_memory']:.1f} GB"]
        for g in pool["gpu_list"]
    ]
    parts = [f"status {body['status']}, mode {body['mode']}"]
    parts += [f"  {reason}" for reason in body.get("reasons", [])]
    parts += [
        "",
        tabulate(servers, ["server", "model", "state", "port", "pid", "why"])
        if servers
        else "no servers",
        "",
        tabulate(gpus, ["gpu", "name", "state", "memory"]) if gpus else "no GPUs",
    ]
    return Response("\n".join(parts) + "\n", mimetype="text/plain")
