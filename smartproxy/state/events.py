"""What happened and why: one row an event, and the same line in the log."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


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
