"""What the manager has: servers and their transitions, assignments, GPUs, events.

Only the manager writes through this module; anybody may read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from smartproxy.errors import StateConflict
from smartproxy.planner.types import GpuShare
from smartproxy.state import gpus
from smartproxy.state.events import add_event
from smartproxy.state.store import Row, Store
from smartproxy.types import LIVE_STATES, NEXT_STATES, ServerState

LIVE = "('starting', 'ready', 'draining', 'stopping')"
#: seconds a failed server stays listed (SPEC 1)
FAILED_LISTED_S = 600.0
KEPT_EVENTS = 20_000


# --- servers ---------------------------------------------------------------------------------


def insert_server(
    store: Store,
    columns: Mapping[str, Any],
    shares: Sequence[GpuShare],
    *,
    now: float,
    reason: str,
    data: Mapping[str, Any] | None = None,
) -> int:
    """Record a server in state starting with what it is promised, before its process exists.

    data: what its event says besides the reason.
    Raises sqlite3.IntegrityError when the model or the port already has a live server.
    """
    row = {
        **columns,
        "state": ServerState.STARTING,
        "reason": reason,
        "created_at": now,
        "state_changed_at": now,
        "last_used_at": now,
    }
    names = ", ".join(row)
    marks = ", ".join(f":{name}" for name in row)
    with store.write() as connection:
        cursor = connection.execute(f"INSERT INTO servers ({names}) VALUES ({marks})", row)
        server_id = cursor.lastrowid
        assert server_id is not None
        connection.executemany(
            "INSERT INTO assignments (server_id, gpu_uuid, gpu_index, estimated_bytes,"
            " reserved_bytes, free_bytes) VALUES (?, ?, ?, ?, ?, ?)",
            [(server_id, s.uuid, s.index, s.bytes, s.bytes, s.free_bytes) for s in shares],
        )
        # what is known of an earlier failure is settled by a new start
        connection.execute(
            "UPDATE servers SET state_changed_at = 0 WHERE model_id = ? AND state = 'failed'",
            (row["model_id"],),
        )
        add_event(
            connection,
            now,
            "server",
            f"server {server_id} starting model={row['model_id']} port={row['port']}: {reason}",
            model_id=row["model_id"],
            server_id=server_id,
            data=data,
        )
        gpus.mark_assigned(connection, server_id, now=now)
        _route_changed(connection)
    return server_id


def transition(
    store: Store,
    server_id: int,
    before: ServerState,
    after: ServerState,
    *,
    now: float,
    reason: str,
    columns: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> bool:
    """Move a server from one state to the next, with its event, in one transaction.

    False = it was no longer in `before`; somebody else moved it first. Raises StateConflict for
    an edge that does not exist.
    """
    if after not in NEXT_STATES[before]:
        raise StateConflict(f"server {server_id}: no edge {before} -> {after} ({reason})")
    more = dict(columns or {})
    sets = "".join(f", {name} = :{name}" for name in more)
    with store.write() as connection:
        cursor = connection.execute(
            "UPDATE servers SET state = :after, reason = :reason, state_changed_at = :now"
            f"{sets} WHERE id = :id AND state = :before",
            {
                **more,
                "after": after,
                "before": before,
                "reason": reason,
                "now": now,
                "id": server_id,
            },
        )
        if cursor.rowcount == 0:
            return False
        model_id = connection.execute(
            "SELECT model_id FROM servers WHERE id = ?", (server_id,)
        ).fetchone()[0]
        add_event(
            connection,
            now,
            "server",
            f"server {server_id} {before}->{after} model={model_id}: {reason}",
            model_id=model_id,
            server_id=server_id,
            data={"from": before, "to": after, **more, **(data or {})},
        )
        if after not in LIVE_STATES:
            connection.execute("DELETE FROM leases WHERE server_id = ?", (server_id,))
            gpus.mark_available(connection, server_id, now=now)
        _route_changed(connection)
    return True


def update_server(store: Store, server_id: int, columns: Mapping[str, Any]) -> None:
    """Set columns that are not its state."""
    sets = ", ".join(f"{name} = :{name}" for name in columns)
    with store.write() as connection:
        connection.execute(
            f"UPDATE servers SET {sets} WHERE id = :id", {**columns, "id": server_id}
        )


def route_changed(store: Store) -> None:
    """Tell workers to read their routes again."""
    with store.write() as connection:
        _route_changed(connection)


def _route_changed(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE manager SET generation = generation + 1 WHERE id = 1")


def live_servers(store: Store) -> list[Row]:
    """Return live servers with `leased` (workers that use it) and the true last use."""
    return store.read(
        "SELECT s.*, coalesce(sum(l.in_flight), 0) AS leased,"
        " max(s.last_used_at, coalesce(max(l.last_used_at), 0)) AS used_at"
        " FROM servers s LEFT JOIN leases l ON l.server_id = s.id"
        f" WHERE s.state IN {LIVE} GROUP BY s.id ORDER BY s.id"
    )


def listed_servers(store: Store, *, now: float) -> list[Row]:
    """Return the live servers, and failed ones until their model loads again or 10 minutes pass."""
    return store.read(
        f"SELECT * FROM servers WHERE state IN {LIVE}"
        " OR (state = 'failed' AND state_changed_at > ?) ORDER BY id",
        (now - FAILED_LISTED_S,),
    )


def server(store: Store, server_id: int) -> Row:
    """Return one server."""
    row = store.one("SELECT * FROM servers WHERE id = ?", (server_id,))
    if row is None:
        raise StateConflict(f"server {server_id} is not in the state file")
    return row


def assignments(store: Store) -> dict[int, list[Row]]:
    """Return the assignments of listed servers by server, in the order of their split."""
    rows = store.read(
        "SELECT a.server_id, a.gpu_uuid, a.gpu_index, a.estimated_bytes, a.reserved_bytes,"
        " a.measured_bytes, a.free_bytes FROM assignments a JOIN servers s ON s.id = a.server_id"
        f" WHERE s.state IN {LIVE} OR s.state = 'failed' ORDER BY a.server_id, a.rowid"
    )
    by_server: dict[int, list[Row]] = {}
    for row in rows:
        by_server.setdefault(row["server_id"], []).append(row)
    return by_server


def reserved_bytes(store: Store) -> dict[str, int]:
    """Return what live servers are promised of each GPU, by uuid."""
    rows = store.read(
        "SELECT a.gpu_uuid, sum(a.reserved_bytes) AS bytes FROM assignments a"
        f" JOIN servers s ON s.id = a.server_id WHERE s.state IN {LIVE} GROUP BY a.gpu_uuid"
    )
    return {row["gpu_uuid"]: row["bytes"] for row in rows}


# --- events ----------------------------------------------------------------------------------


def event(store: Store, now: float, kind: str, message: str, **where: Any) -> None:
    """Write an event in a transaction of its own."""
    with store.write() as connection:
        add_event(connection, now, kind, message, **where)


def prune(store: Store, *, now: float) -> None:
    """Drop old events and ended servers so that the file stays small."""
    with store.write() as connection:
        connection.execute(
            "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (KEPT_EVENTS,)
        )
        connection.execute(
            "DELETE FROM servers WHERE state IN ('stopped', 'failed') AND state_changed_at < ?"
            " AND id <= (SELECT max(id) FROM servers) - 200",
            (now - 86_400,),
        )


# --- the manager's own row -------------------------------------------------------------------


def update_manager(store: Store, columns: Mapping[str, Any]) -> None:
    """Set columns of the manager's row."""
    sets = ", ".join(f"{name} = :{name}" for name in columns)
    with store.write() as connection:
        connection.execute(f"UPDATE manager SET {sets} WHERE id = 1", dict(columns))


def manager_row(store: Store) -> Row:
    """Return the manager's row."""
    row = store.one("SELECT * FROM manager WHERE id = 1")
    assert row is not None  # inserted by the first migration
    return row


def set_waits(
    store: Store, waits: Mapping[str, str], *, now: float, data: Mapping[str, Any]
) -> None:
    """Say what each waiting model waits for; models not named wait no more.

    The first reason of each is an event too. data: what it says besides.
    """
    known = {row["model_id"]: row["reason"] for row in store.read("SELECT * FROM waits")}
    if known == dict(waits):
        return
    with store.write() as connection:
        for model_id in known.keys() - waits.keys():
            connection.execute("DELETE FROM waits WHERE model_id = ?", (model_id,))
        connection.executemany(
            "INSERT INTO waits (model_id, reason, since) VALUES (?, ?, ?)"
            " ON CONFLICT (model_id) DO UPDATE SET reason = excluded.reason",
            [(model_id, reason, now) for model_id, reason in waits.items()],
        )
        for model_id in waits.keys() - known.keys():
            add_event(connection, now, "load", waits[model_id], model_id=model_id, data=data)
