"""What happened and why: one row an event, and the same line in the log."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

from smartproxy.state.store import Store

logger = logging.getLogger(__name__)

KEPT_EVENTS = 20_000


def add_event(
    connection: sqlite3.Connection,
    now: float,
    kind: str,
    message: str,
    *,
    model_id: str | None = None,
    server_id: int | None = None,
    gpu_uuid: str | None = None,
    data: Mapping[str, Any] | None = None,
    level: int = logging.INFO,
) -> None:
    """Write an event inside the caller's transaction, and the same line to the log."""
    connection.execute(
        "INSERT INTO events (at, kind, model_id, server_id, gpu_uuid, message, data)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            now,
            kind,
            model_id,
            server_id,
            gpu_uuid,
            message,
            json.dumps(dict(data)) if data else None,
        ),
    )
    logger.log(level, "%s", message)


def event(
    store: Store,
    now: float,
    kind: str,
    message: str,
    *,
    model_id: str | None = None,
    server_id: int | None = None,
    gpu_uuid: str | None = None,
    data: Mapping[str, Any] | None = None,
    level: int = logging.INFO,
) -> None:
    """Write an event in a transaction of its own, and the same line to the log."""
    with store.write() as connection:
        add_event(
            connection,
            now,
            kind,
            message,
            model_id=model_id,
            server_id=server_id,
            gpu_uuid=gpu_uuid,
            data=data,
            level=level,
        )


def prune(store: Store) -> None:
    """Drop all but the last events so that the file stays small."""
    with store.write() as connection:
        connection.execute(
            "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (KEPT_EVENTS,)
        )
