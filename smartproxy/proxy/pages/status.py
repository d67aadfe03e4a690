"""/status: every server with its placement and what it does, every GPU, and the load queue.

Memory in GB = 2^30 bytes, times in seconds, `*_at` in Unix seconds. Reads only.
"""

from __future__ import annotations

from typing import Any

from smartproxy.config.settings import Settings
from smartproxy.proxy.pages import view
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments, reserved_bytes
from smartproxy.state.demands import waiting_models
from smartproxy.state.server_row import LiveServer, ServerRow
from smartproxy.state.store import Store
from smartproxy.types import GIB


def status(store: Store, settings: Settings) -> dict[str, Any]:
    """Return the body of /status."""
    now = store.now()
    whole = view.health(store, settings)
    del whole["gpu_pool_status"]
    return {
        **whole,
        "servers": _servers(store, whole["servers"], now),
        "gpus": _gpus(store, settings),
        "queue": _queue(store),
    }


def _servers(store: Store, listed: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """Join each listed server with what it takes and what it does."""
    rows = {str(row.id): row for row in server_rows.listed_servers(store, now=now)}
    live = {row.id: row for row in server_rows.live_servers(store)}
    shares = assignments(store)
    joined = []
    for server in listed:
        row = rows.get(server["id"])
        if row is not None:  # else it ended between two reads
            use = _use(row, live.get(row.id), now)
            joined.append({**server, **use, "memory": _memory(row, shares.get(row.id, []))})
    return joined


def _use(row: ServerRow, live: LiveServer | None, now: float) -> dict[str, Any]:
    """Return what a server does; its own figures are as of watched_at (every 2 s)."""
    used_at = live.used_at if live else row.last_used_at
    working = (row.requests_processing or 0) + (row.requests_deferred or 0)
    return {
        "since": row.state_changed_at,
        "context_size": row.context_size,
        "parallel": row.parallel,
        "gpu_layers": row.gpu_layers,
        "layer_count": row.layer_count,
        "requests_in_flight": max(working, live.leased) if live else 0,
        "slots_total": row.slots_total,
        "slots_busy": row.slots_busy,
        "tokens_per_second": row.tokens_per_second,
        "prompt_tokens": row.prompt_tokens_total,
        "predicted_tokens": row.predicted_tokens_total,
        "watched_at": row.watched_at,
        "last_used_at": used_at,
        "idle": round(max(0.0, now - used_at), 3),
        "load_time": row.load_s,
    }


def _memory(row: ServerRow, shares: list[AssignmentRow]) -> dict[str, Any]:
    """Return estimated against measured, per GPU and for main memory."""
    return {
        "estimated": _gb(row.estimated_bytes),
        "measured": _gb(row.measured_bytes),
        "host_estimated": _gb(row.host_estimated_bytes),
        "host_measured": _gb(row.host_measured_bytes),
        "gpus": [
            {
                "id": share.gpu_index,
                "uuid": share.gpu_uuid,
                "estimated": _gb(share.estimated_bytes),
                "reserved": _gb(share.reserved_bytes),
                "measured": _gb(share.measured_bytes),
            }
            for share in shares
        ],
    }


def _gpus(store: Store, settings: Settings) -> list[dict[str, Any]]:
    reserved = reserved_bytes(store)
    return [
        {**gpu.model_dump(mode="json"), "reserved_memory": reserved.get(gpu.uuid or "", 0) / GIB}
        for gpu in view.pool(store, settings).gpu_list
    ]


def _queue(store: Store) -> list[dict[str, Any]]:
    """Return the models that requests wait for, longest first, and what they wait for."""
    return [
        {
            "model_id": row.model_id,
            "requests": row.requests,
            "waiting": max(0.0, row.waiting_s),
            "state": row.state,
            "reason": row.reason or "the manager has not looked at it yet",
        }
        for row in waiting_models(store)
    ]


def _gb(size_bytes: int | None) -> float | None:
    return size_bytes / GIB if size_bytes is not None else None
