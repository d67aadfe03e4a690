"""What workers want: demands (ask, answer, expire) and leases (take, renew, release, expire).

Workers write here; the manager answers demands and clears what dead workers left.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from smartproxy.errors import QueueFull
from smartproxy.state.store import Store

#: seconds a lease or demand outlives its last renewal; a killed worker pins nothing for longer
HOLD_S = 20.0
#: seconds between renewals
RENEW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a worker needs to know of a live server."""

    server_id: int
    model_id: str
    state: str
    host: str
    port: int
    api_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The manager's word on a demand; error_code is None when it was done."""

    error_code: str | None
    message: str | None
    answer: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerView:
    """What a worker sees of the manager."""

    pid: int | None
    heartbeat_at: float | None
    stopping: bool
    generation: int


# --- workers ---------------------------------------------------------------------------------


def manager_view(store: Store) -> ManagerView:
    """Return the manager's row."""
    row = store.one("SELECT pid, heartbeat_at, stopping, generation FROM manager WHERE id = 1")
    assert row is not None  # inserted by the first migration
    return ManagerView(
        pid=row["pid"],
        heartbeat_at=row["heartbeat_at"],
        # without a process it is what an earlier stop left behind
        stopping=bool(row["stopping"]) and row["pid"] is not None,
        generation=row["generation"],
    )


def routes(store: Store) -> dict[str, Route]:
    """Return the live servers by model."""
    rows = store.read(
        "SELECT id, model_id, state, host, port, api_key FROM servers"
        " WHERE state IN ('starting', 'ready', 'draining', 'stopping')"
    )
    return {
        row["model_id"]: Route(
            server_id=row["id"],
            model_id=row["model_id"],
            state=row["state"],
            host=row["host"],
            port=row["port"],
            api_key=row["api_key"],
        )
        for row in rows
    }


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


def ask(
    store: Store,
    kind: str,
    model_id: str,
    worker_id: str,
    *,
    now: float,
    max_queue: int | None = None,
    explicit: bool = False,
) -> int:
    """Insert a demand and return its id. Raises QueueFull when max_queue loads wait already."""
    with store.write() as connection:
        if max_queue is not None:
            _check_queue(connection, max_queue)
        cursor = connection.execute(
            "INSERT INTO demands (kind, model_id, worker_id, explicit, asked_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (kind, model_id, worker_id, explicit, now, now + HOLD_S),
        )
        demand_id = cursor.lastrowid
    assert demand_id is not None
    return demand_id


def _check_queue(connection: sqlite3.Connection, max_queue: int) -> None:
    waiting = connection.execute(
        "SELECT count(*) FROM demands WHERE kind = 'load' AND answered_at IS NULL"
    ).fetchone()[0]
    if waiting >= max_queue:
        raise QueueFull(
            f"{waiting} requests already wait for a model to load (max_queue is {max_queue});"
            " try again shortly"
        )


def read_answers(store: Store, demand_ids: Iterable[int]) -> dict[int, Answer]:
    """Return the answers among these demands; unanswered ones are absent."""
    ids = list(demand_ids)
    marks = ",".join("?" * len(ids))
    rows = store.read(
        "SELECT id, error_code, message, answer FROM demands"
        f" WHERE answered_at IS NOT NULL AND id IN ({marks})",
        ids,
    )
    return {
        row["id"]: Answer(
            error_code=row["error_code"],
            message=row["message"],
            answer=json.loads(row["answer"]) if row["answer"] else None,
        )
        for row in rows
    }


def withdraw(store: Store, demand_ids: Iterable[int]) -> None:
    """Delete demands: answered and read, or wanted no more."""
    with store.write() as connection:
        connection.executemany("DELETE FROM demands WHERE id = ?", [(id_,) for id_ in demand_ids])


def renew(store: Store, worker_id: str, *, now: float) -> None:
    """Push the expiry of all that this worker holds and waits for."""
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


def forget_worker(store: Store, worker_id: str) -> None:
    """Delete all rows of a worker that ends in order."""
    with store.write() as connection:
        connection.execute("DELETE FROM leases WHERE worker_id = ?", (worker_id,))
        connection.execute("DELETE FROM demands WHERE worker_id = ?", (worker_id,))


# --- the manager -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    id: int
    kind: str
    model_id: str
    explicit: bool
    asked_at: float


def open_demands(store: Store) -> list[Demand]:
    """Return unanswered demands, oldest first."""
    rows = store.read(
        "SELECT id, kind, model_id, explicit, asked_at FROM demands"
        " WHERE answered_at IS NULL ORDER BY asked_at, id"
    )
    return [
        Demand(
            id=row["id"],
            kind=row["kind"],
            model_id=row["model_id"],
            explicit=bool(row["explicit"]),
            asked_at=row["asked_at"],
        )
        for row in rows
    ]


def answer(
    store: Store,
    demand_ids: Iterable[int],
    *,
    now: float,
    error_code: str | None = None,
    message: str | None = None,
    answer: dict[str, Any] | None = None,
) -> None:
    """Answer demands; error_code None means done."""
    text = json.dumps(answer) if answer is not None else None
    with store.write() as connection:
        connection.executemany(
            "UPDATE demands SET answered_at = ?, error_code = ?, message = ?, answer = ?"
            " WHERE id = ? AND answered_at IS NULL",
            [(now, error_code, message, text, id_) for id_ in demand_ids],
        )


def workers_seen(store: Store) -> set[str]:
    """Return the ids of all workers that hold or want anything."""
    rows = store.read("SELECT worker_id FROM leases UNION SELECT worker_id FROM demands")
    return {row["worker_id"] for row in rows}


def clear_expired(store: Store, *, now: float, dead_workers: Iterable[str] = ()) -> None:
    """Delete what nobody renews, and what workers held that are known to be gone.

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
