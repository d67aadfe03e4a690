"""The servers and their transitions, each with its event.

Only the manager writes through this module; anybody may read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Unpack

from smartproxy.errors import StateConflict
from smartproxy.state import assignments, gpus
from smartproxy.state.assignments import NewAssignment
from smartproxy.state.events import add_event
from smartproxy.state.manager_row import route_changed
from smartproxy.state.server_row import LiveServer, NewServer, ServerColumns, ServerRow
from smartproxy.state.sql import LIVE, columns, settings
from smartproxy.state.store import Store
from smartproxy.types import LIVE_STATES, NEXT_STATES, ServerState

#: seconds a failed server stays listed (SPEC 1)
FAILED_LISTED_S = 600.0
#: ended servers are kept for a day, but not more than so many, and the last few in any case
ENDED_KEPT_S = 86_400.0
FEWEST_KEPT, MOST_KEPT = 200, 1000


def insert_server(
    store: Store,
    new: NewServer,
    assigned: Sequence[NewAssignment],
    *,
    now: float,
    reason: str,
    data: Mapping[str, Any] | None = None,
) -> int:
    """Record a server in state starting with what it is promised, before its process exists.

    data: what its event says besides the reason.
    Raises StateRefused when the model or the port already has a live server.
    """
    row = {
        **asdict(new),
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
        assignments.insert(connection, server_id, assigned)
        # what is known of an earlier failure is settled by a new start
        connection.execute(
            "UPDATE servers SET state_changed_at = 0 WHERE model_id = ? AND state = 'failed'",
            (new.model_id,),
        )
        add_event(
            connection,
            now,
            "server",
            f"server {server_id} starting model={new.model_id} port={new.port}: {reason}",
            model_id=new.model_id,
            server_id=server_id,
            data=data,
        )
        gpus.mark_assigned(connection, server_id, now=now)
        route_changed(connection)
    return server_id


def transition(
    store: Store,
    server_id: int,
    before: ServerState,
    after: ServerState,
    *,
    now: float,
    reason: str,
    data: Mapping[str, Any] | None = None,
    **changed: Unpack[ServerColumns],
) -> bool:
    """Move a server from one state to the next, with its event, in one transaction.

    data: what its event says besides the reason. changed: columns that are set with the state.
    False = it was no longer in `before`; somebody else moved it first. Raises StateConflict for
    an edge that does not exist.
    """
    if after not in NEXT_STATES[before]:
        raise StateConflict(f"server {server_id}: no edge {before} -> {after} ({reason})")
    sets = f", {settings(changed)}" if changed else ""
    with store.write() as connection:
        cursor = connection.execute(
            "UPDATE servers SET state = :after, reason = :reason, state_changed_at = :now"
            f"{sets} WHERE id = :id AND state = :before",
            {
                **changed,
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
            data={"from": before, "to": after, **changed, **(data or {})},
        )
        if after not in LIVE_STATES:
            connection.execute("DELETE FROM leases WHERE server_id = ?", (server_id,))
            gpus.mark_available(connection, server_id, now=now)
        route_changed(connection)
    return True


def update_server(store: Store, server_id: int, **changed: Unpack[ServerColumns]) -> None:
    """Set columns that are not its state."""
    with store.write() as connection:
        connection.execute(
            f"UPDATE servers SET {settings(changed)} WHERE id = :id", {**changed, "id": server_id}
        )


def live_servers(store: Store) -> list[LiveServer]:
    """Return live servers with `leased` (workers that use it) and the true last use."""
    rows = store.read(
        f"SELECT {columns(ServerRow, 's.')}, coalesce(sum(l.in_flight), 0) AS leased,"
        " max(s.last_used_at, coalesce(max(l.last_used_at), 0)) AS used_at"
        " FROM servers s LEFT JOIN leases l ON l.server_id = s.id"
        f" WHERE s.state IN {LIVE} GROUP BY s.id ORDER BY s.id"
    )
    return [LiveServer.from_row(row) for row in rows]


def listed_servers(store: Store, *, now: float) -> list[ServerRow]:
    """Return the live servers, and failed ones until their model loads again or 10 minutes pass."""
    rows = store.read(
        f"SELECT {columns(ServerRow)} FROM servers WHERE state IN {LIVE}"
        " OR (state = 'failed' AND state_changed_at > ?) ORDER BY id",
        (now - FAILED_LISTED_S,),
    )
    return [ServerRow.from_row(row) for row in rows]


def server(store: Store, server_id: int) -> ServerRow:
    """Return one server."""
    row = store.one(f"SELECT {columns(ServerRow)} FROM servers WHERE id = ?", (server_id,))
    if row is None:
        raise StateConflict(f"server {server_id} is not in the state file")
    return ServerRow.from_row(row)


def last_load_s(store: Store) -> dict[str, float]:
    """Return by model how many seconds its last load took that came to ready."""
    rows = store.read(
        "SELECT model_id, load_s, max(id) FROM servers WHERE load_s IS NOT NULL GROUP BY model_id"
    )
    return {row["model_id"]: row["load_s"] for row in rows}


def prune(store: Store, *, now: float) -> None:
    """Drop servers that ended long ago, or many servers ago, so that the file stays small."""
    with store.write() as connection:
        (newest,) = connection.execute("SELECT max(id) FROM servers").fetchone()
        connection.execute(
            "DELETE FROM servers WHERE state IN ('stopped', 'failed')"
            " AND (state_changed_at < ? AND id <= ? OR id <= ?)",
            (now - ENDED_KEPT_S, (newest or 0) - FEWEST_KEPT, (newest or 0) - MOST_KEPT),
        )
