"""Which worker has requests on which server, and where a worker finds the servers.

Workers take, renew and release leases; the manager clears those that dead workers left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from smartproxy.state.sql import LIVE
from smartproxy.state.store import Row, Store
from smartproxy.types import ServerState

#: seconds a lease or demand outlives its last renewal; a killed worker pins nothing for longer
HOLD_S = 20.0
#: seconds between renewals
RENEW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a worker needs to know of a live server."""

    server_id: int
    model_id: str
    state: ServerState
    host: str
    port: int
    api_key: str

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return the route to a row of `servers`."""
        values = {**row, "state": ServerState(row["state"])}
        return cls(**values)


def routes(store: Store) -> dict[str, Route]:
    """Return the live servers by model."""
    rows = store.read(
        "SELECT id AS server_id, model_id, state, host, port, api_key FROM servers"
        f" WHERE state IN {LIVE}"
    )
    return {row["model_id"]: Route.from_row(row) for row in rows}


def take_lease(store: Store, worker_id: str, server_id: int, *, now: float) -> bool:
    """Mark this worker as using a server, if it is still ready. False = it is not."""
    with store.write() as connection:
        cursor = connection.execute(
            "INSERT INTO leases (worker_id, server_id, in_flight, taken_at, last_used_at,"
            " expires_at) SELECT ?, id, 1, ?, ?, ? FROM servers WHERE id = ? AND state = 'ready'"
            " ON CONFLICT (worker_id, server_id) DO UPDATE SET in_flight = 1,"
            " taken_at = excluded.taken_at, last_used_at = excluded.last_used_at,"
            " expires_at = excluded.expires_at",
            (worker_id, now, now, now + HOLD_S, server_id),
        )
        return cursor.rowcount > 0


def release_lease(store: Store, worker_id: str, server_id: int, *, last_used_at: float) -> None:
    """Say that nothing of this worker is in flight on a server any more."""
    with store.write() as connection:
        connection.execute(
            "UPDATE leases SET in_flight = 0, last_used_at = ?"
            " WHERE worker_id = ? AND server_id = ?",
            (last_used_at, worker_id, server_id),
        )


def renew(store: Store, worker_id: str, *, now: float) -> None:
    """Push the expiry of all that this worker holds and waits for, in one transaction."""
    with store.write() as connection:
        connection.execute(
            "UPDATE leases SET expires_at = ?, last_used_at = ?"
            " WHERE worker_id = ? AND in_flight = 1",
            (now + HOLD_S, now, worker_id),
        )
        connection.execute(
            "UPDATE demands SET expires_at = ? WHERE worker_id = ? AND answered_at IS NULL",
            (now + HOLD_S, worker_id),
        )


def workers_seen(store: Store) -> set[str]:
    """Return the ids of all workers that hold or want anything."""
    rows = store.read("SELECT worker_id FROM leases UNION SELECT worker_id FROM demands")
    return {row["worker_id"] for row in rows}


def clear_expired(store: Store, *, now: float, dead_workers: Iterable[str] = ()) -> None:
    """Delete leases and demands that nobody renews, and those of workers known to be gone.

    The last use of a deleted lease is kept on its server, for choosing victims.
    """
    gone = [(worker,) for worker in dead_workers]
    with store.write() as connection:
        connection.executemany("UPDATE leases SET expires_at = 0 WHERE worker_id = ?", gone)
        connection.executemany("DELETE FROM demands WHERE worker_id = ?", gone)
        connection.execute("DELETE FROM demands WHERE expires_at < ?", (now,))
        stale = "(in_flight = 1 AND expires_at < :now) OR expires_at < :now - 3600"
        connection.execute(
            "UPDATE servers SET last_used_at = max(last_used_at, (SELECT max(last_used_at)"
            f" FROM leases WHERE server_id = servers.id AND ({stale})))"
            f" WHERE id IN (SELECT server_id FROM leases WHERE {stale})",
            {"now": now},
        )
        connection.execute(f"DELETE FROM leases WHERE {stale}", {"now": now})
