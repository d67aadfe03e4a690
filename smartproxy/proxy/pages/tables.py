"""/health and /status as tables for a terminal (Accept: text/plain)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def health(body: dict[str, Any]) -> str:
    """Return /health in short: what is up, and why it is degraded if it is."""
    servers = [
        [s["id"], s["model_id"], s["state"], s["port"], s["process"], s["reason"]]
        for s in body["servers"]
    ]
    gpus = [
        [g["id"], g["name"], g["state"], _of(g["used_memory"], g["total_memory"])]
        for g in body["gpu_pool_status"]["gpu_list"]
    ]
    return _page(
        *_head(body),
        _table(servers, ("server", "model", "state", "port", "pid", "why"), "no servers"),
        _table(gpus, ("gpu", "name", "state", "used/total GB"), "no GPUs"),
    )


def status(body: dict[str, Any]) -> str:
    """Return /status: servers, memory estimated and measured, GPUs, processes, the queue."""
    servers = body["servers"]
    processes = [
        [g["id"], p["pid"], p["name"], _gb(p["used_memory"]), p["model_id"] or _whose(p)]
        for g in body["gpus"]
        for p in g["processes"]
    ]
    queue = [
        [q["model_id"], q["requests"], f"{q['waiting']:.1f}", q["state"], q["reason"]]
        for q in body["queue"]
    ]
    parts = [
        *_head(body),
        _table([_server(s) for s in servers], SERVER, "no servers"),
        _table([line for s in servers for line in _memory(s)], MEMORY, ""),
        _table([_gpu(g) for g in body["gpus"]], GPU, "no GPUs"),
        _table(processes, ("gpu", "pid", "process", "GB", "model"), ""),
        _table(queue, ("waits", "requests", "s", "state", "for"), "nobody waits for a model"),
    ]
    return _page(*parts)


SERVER = (
    *("server", "model", "state", "in flight", "slots", "tokens/s", "context", "idle s", "load s"),
    "why",
)
MEMORY = ("model", "where", "estimated GB", "measured GB")
GPU = ("gpu", "name", "state", "used/total GB", "promised GB", "util %", "°C", "W", "models")


def _server(s: dict[str, Any]) -> list[Any]:
    slots = None if s["slots_total"] is None else f"{s['slots_busy']}/{s['slots_total']}"
    return [
        *(s["id"], s["model_id"], s["state"], s["requests_in_flight"], slots),
        *(_number(s["tokens_per_second"]), s["context_size"]),
        *(f"{s['idle']:.0f}", _number(s["load_time"]), s["reason"]),
    ]


def _memory(s: dict[str, Any]) -> list[list[Any]]:
    memory = s["memory"]
    lines = [
        [s["model_id"], f"gpu {part['id']}", _gb(part["estimated"]), _gb(part["measured"])]
        for part in memory["gpus"]
    ]
    host = [_gb(memory["host_estimated"]), _gb(memory["host_measured"])]
    return [*lines, [s["model_id"], "host", *host]]


def _gpu(g: dict[str, Any]) -> list[Any]:
    return [
        *(g["id"], g["name"], g["state"], _of(g["used_memory"], g["total_memory"])),
        *(_gb(g["reserved_memory"]), f"{g['utilization']:.0f}"),
        *(_number(g["temperature"]), _number(g["power_usage"])),
        ", ".join(g["assigned_models"]) or None,
    ]


def _head(body: dict[str, Any]) -> list[str]:
    summary = [f"status {body['status']}, mode {body['mode']}"]
    if body.get("mode_reason"):
        summary[0] += f" ({body['mode_reason']})"
    if body["observed_age"] is not None:
        summary[0] += f", GPUs seen {body['observed_age']:.1f} s ago"
    return ["\n".join([*summary, *(f"  {reason}" for reason in body.get("reasons", []))])]


def _whose(process: dict[str, Any]) -> str:
    return "(ours)" if process["ours"] else "(other's)"


def _table(lines: Sequence[Sequence[Any]], headers: Sequence[str], none: str) -> str:
    return tabulate(lines, headers, missingval="-", disable_numparse=True) if lines else none


def _page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _gb(size: float | None) -> str | None:
    return None if size is None else f"{size:.2f}"


def _of(part: float, whole: float) -> str:
    return f"{part:.1f}/{whole:.1f}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
