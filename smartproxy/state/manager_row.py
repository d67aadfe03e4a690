"""The manager's own row: who it is, that it lives, and when workers must read routes again.

Only the manager writes, save for `paused_at`, which who pauses and resumes sets; anybody may read.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict, Unpack

from smartproxy.state.sql import columns, settings
from smartproxy.state.store import Row, Store

#: a manager that has not given a sign for so many seconds does not answer
HEARTBEAT_STALE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerView:
    """What a worker that waits looks at. Times are Unix seconds."""

    pid: int | None
    heartbeat_at: float | None
    #: it is ending on purpose; may be left over from one that was killed meanwhile: see `ending`
    stopping: bool
    #: moves whenever something changes that workers route by
    generation: int
    #: since when new requests queue and nothing is loaded; None: not paused
    paused_at: float | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what the row of `manager` says."""
        values = {**row, "stopping": bool(row["stopping"])}
        return cls(**values)

    def alive(self, now: float) -> bool:
        """Return whether it gave a sign lately."""
        return bool(self.heartbeat_at) and now - (self.heartbeat_at or 0.0) < HEARTBEAT_STALE_S

    def ending(self) -> bool:
        """Return whether it is ending on purpose, and has not ended yet."""
        return self.stopping and self.pid is not None and Path(f"/proc/{self.pid}").exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerRow(ManagerView):
    """All that the manager says of itself."""

    started_at: float | None
    #: seconds since its loop finished a pass, as of the heartbeat
    pass_age_s: float | None
    #: gpu or cpu; None before the first look at the GPUs
    mode: str | None
    mode_reason: str | None
    driver_version: str | None
    #: when the GPUs were last looked at
    observed_at: float | None
    #: path and build of llama-server
    llama_server: str | None
    build: str | None
    #: how long the last decision took
    decision_s: float | None


class ManagerColumns(TypedDict, total=False):
    """The columns that the manager sets; the look at the GPUs sets its own in gpus.py."""

    pid: int | None
    started_at: float
    heartbeat_at: float | None
    pass_age_s: float
    stopping: bool
    llama_server: str
    build: str
    decision_s: float


def manager_view(store: Store) -> ManagerView:
    """Return what a waiting worker looks at."""
    row = store.one(f"SELECT {columns(ManagerView)} FROM manager WHERE id = 1")
    assert row is not None  # inserted by the first migration
    return ManagerView.from_row(row)


def manager_row(store: Store) -> ManagerRow:
    """Return the whole row."""
    row = store.one(f"SELECT {columns(ManagerRow)} FROM manager WHERE id = 1")
    assert row is not None  # inserted by the first migration
    return ManagerRow.from_row(row)


def update_manager(store: Store, **changed: Unpack[ManagerColumns]) -> None:
    """Set columns of the manager's row."""
    with store.write() as connection:
        connection.execute(f"UPDATE manager SET {settings(changed)} WHERE id = 1", changed)


def pause(store: Store, *, now: float) -> float:
    """Have new requests queue from now on; returns since when they do. Any process may call it."""
    with store.write() as connection:
        connection.execute(
            "UPDATE manager SET paused_at = coalesce(paused_at, ?) WHERE id = 1", (now,)
        )
        since: float = connection.execute("SELECT paused_at FROM manager WHERE id = 1").fetchone()[
            0
        ]
        return since


def resume(store: Store, *, now: float) -> float | None:
    """End a pause; returns how many seconds it lasted, None without one. Any process may call it.

    Who waited for a model before or asked meanwhile waits as if that time had not been: it does not
    count against queue_timeout.
    """
    with store.write() as connection:
        row = connection.execute("SELECT paused_at FROM manager WHERE id = 1").fetchone()
        since: float | None = row["paused_at"]
        if since is None:
            return None
        connection.execute(
            "UPDATE demands SET asked_at = asked_at + max(0, :now - max(asked_at, :since))"
            " WHERE answered_at IS NULL",
            {"now": now, "since": since},
        )
        connection.execute("UPDATE manager SET paused_at = NULL WHERE id = 1")
        return max(0.0, now - since)


def route_changed(connection: sqlite3.Connection) -> None:
    """Tell workers to read their routes again; inside the transaction that changes one."""
    connection.execute("UPDATE manager SET generation = generation + 1 WHERE id = 1")
