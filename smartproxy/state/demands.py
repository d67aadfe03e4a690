"""What workers want of the manager, its answers, and what each waiting model waits for.

Workers ask and withdraw; the manager answers, and says what is waited for. Demands are renewed and
expire together with leases (leases.py).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from smartproxy.errors import QueueFull
from smartproxy.state.events import add_event
from smartproxy.state.leases import HOLD_S
from smartproxy.state.sql import LIVE, columns
from smartproxy.state.store import Row, Store

#: how many requests wait for a model to load
WAITING = "SELECT count(*) AS requests FROM demands WHERE kind = 'load' AND answered_at IS NULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The manager's word on a demand; error_code is None when it was done."""

    error_code: str | None
    message: str | None
    #: what a question was answered with
    answer: dict[str, Any] | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return the answer in a row of `demands`."""
        text = row["answer"]
        return cls(
            error_code=row["error_code"],
            message=row["message"],
            answer=json.loads(text) if text else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a worker asked for: a load, an unload or a plan."""

    id: int
    kind: str
    model_id: str
    #: asked for by a person through the API, not by a request: overrides the back-off
    explicit: bool
    #: Unix seconds
    asked_at: float

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `demands` asks for."""
        values = {**row, "explicit": bool(row["explicit"])}
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingModel:
    """A model that requests wait for."""

    model_id: str
    requests: int
    #: seconds of the longest wait
    waiting_s: float
    #: of its server; "unloaded" without one
    state: str
    #: what it waits for, or why its server is in its state; None before the manager has looked
    reason: str | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `waiting` says."""
        return cls(**row)


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
    waiting = connection.execute(WAITING).fetchone()[0]
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
    return {row["id"]: Answer.from_row(row) for row in rows}


def is_there(store: Store, demand_id: int) -> bool:
    """Return whether the file has a demand: it goes with a lost file, and when not renewed."""
    return store.one("SELECT 1 FROM demands WHERE id = ?", (demand_id,)) is not None


def withdraw(store: Store, demand_ids: Iterable[int]) -> None:
    """Delete demands: answered and read, or wanted no more."""
    with store.write() as connection:
        connection.executemany("DELETE FROM demands WHERE id = ?", [(id_,) for id_ in demand_ids])


def open_demands(store: Store) -> list[Demand]:
    """Return unanswered demands, oldest first."""
    rows = store.read(
        f"SELECT {columns(Demand)} FROM demands WHERE answered_at IS NULL ORDER BY asked_at, id"
    )
    return [Demand.from_row(row) for row in rows]


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


def waiting_requests(store: Store) -> int:
    """Return how many requests wait for a model to load."""
    row = store.one(WAITING)
    assert row is not None  # a count always has a row
    number: int = row["requests"]
    return number


def waiting_models(store: Store) -> list[WaitingModel]:
    """Return the models that requests wait for, longest first."""
    rows = store.read(
        "SELECT l.model AS model_id, l.requests, l.state,"
        " round(:now - (SELECT min(asked_at) FROM demands d WHERE d.model_id = l.model"
        " AND d.kind = 'load' AND d.answered_at IS NULL), 1) AS waiting_s,"
        " coalesce(nullif(l.waits_for, ''), s.reason) AS reason"
        " FROM loads l LEFT JOIN servers s ON s.model_id = l.model"
        f" AND s.state IN {LIVE} ORDER BY waiting_s DESC",
        {"now": store.now()},
    )
    return [WaitingModel.from_row(row) for row in rows]


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
