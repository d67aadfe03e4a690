"""Everything that is not relayed: health, status, the catalogue, load, unload and plan."""

from __future__ import annotations

import socket
import sqlite3
from typing import Any

from flask import Blueprint, Response, jsonify, request
from tabulate import tabulate

from smartproxy.catalog import Catalog
from smartproxy.entities import pool_status
from smartproxy.errors import ModelNotFound, RouteNotFound, ShuttingDown
from smartproxy.proxy import auth, view
from smartproxy.proxy.asking import Question, ask_manager
from smartproxy.proxy.ensure import send_poke
from smartproxy.settings import Settings
from smartproxy.state.store import Store

#: a plan is decided in milliseconds; before it the GPUs must have been looked at once
PLAN_LIMIT_S = 30.0


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
            raise RouteNotFound(f"no operation POST '{verb}'; there are load and unload")
        limit_s = settings.longest_wait_s(spec.id)
        question = Question(kind=verb, model_id=spec.id, limit_s=limit_s)
        ask_manager(store, settings.state_dir, question)
        listed = {entry["id"]: entry for entry in view.model_list(store, catalog)}
        return jsonify(listed[spec.id])

    @operations.get("/api/models/<path:rest>")
    def tell(rest: str) -> Response:
        found = catalog.split_path(rest)
        if found is None:
            raise ModelNotFound(f"no model's id starts '{rest[:200]}'")
        spec, verb = found
        if verb != "plan":
            raise RouteNotFound(f"no operation GET '{verb}'; there is plan")
        question = Question(kind="plan", model_id=spec.id, limit_s=PLAN_LIMIT_S)
        return jsonify(ask_manager(store, settings.state_dir, question))

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
