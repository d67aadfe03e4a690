"""What of an answer is for whom: everything, no processes and paths, or only how it goes."""

from __future__ import annotations

from typing import Any

from smartproxy.errors import without_paths
from smartproxy.proxy.auth import Role

#: by key: what only operators are told, and what others get in its place
HIDDEN: dict[str, Any] = {"process": None, "pid": None, "path": None, "llama_server": None}
#: beginnings of reasons, and what a stranger is told: no name, number or path
TOLD_STRANGERS = {
    "the manager": "the manager does not work",
    "the state file": "the state file can't be used",
    "gpu ": "a GPU is in error",
}
OTHER_REASON = "something does not work"


def for_role(body: dict[str, Any], role: Role) -> dict[str, Any]:
    """Return an answer as this asker may see it."""
    if role is Role.ADMIN:
        return body
    return for_client(body) if role is Role.CLIENT else for_stranger(body)


def for_client(value: Any) -> Any:
    """Return a JSON value without pids, paths and other users' processes."""
    if isinstance(value, dict):
        return {key: _for_client(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [for_client(inner) for inner in value]
    return without_paths(value) if isinstance(value, str) else value


def _for_client(key: str, value: Any) -> Any:
    if key in HIDDEN:
        return HIDDEN[key]
    if key == "processes":  # of one GPU, all users'
        return []
    return for_client(value)


def for_stranger(body: dict[str, Any]) -> dict[str, Any]:
    """Return what /health tells somebody without a key: how it goes."""
    told = {key: body[key] for key in ("status", "mode")}
    if reasons := body.get("reasons"):
        told["reasons"] = list(dict.fromkeys(_for_stranger(reason) for reason in reasons))
    return told


def _for_stranger(reason: str) -> str:
    return next(
        (told for start, told in TOLD_STRANGERS.items() if reason.startswith(start)), OTHER_REASON
    )


def as_text(body: dict[str, Any]) -> str:
    """Return what a stranger is told as lines of text."""
    first = f"status {body['status']}, mode {body['mode']}"
    return "\n".join([first, *(f"- {reason}" for reason in body.get("reasons", []))]) + "\n"
