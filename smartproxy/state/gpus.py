"""The GPUs in the file: as last seen, and their way between available, assigned and error.

available -> assigned and back are written with the server that causes them, in its transaction;
error, and the way out of it, with the look that saw it. Only the manager writes.
"""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass
from typing import Self

from smartproxy.gpus.types import Gpu, GpuSnapshot, GpuState
from smartproxy.state.assignments import UNKNOWN_INDEX
from smartproxy.state.events import add_event
from smartproxy.state.sql import LIVE, columns
from smartproxy.state.store import Row, Store

#: GPUs that a live server has a part of
HELD = (
    "SELECT a.gpu_uuid FROM assignments a JOIN servers s ON s.id = a.server_id"
    f" WHERE s.state IN {LIVE}"
)
COLUMNS = (
    *("uuid", "gpu_index", "name", "pci_bus_id", "state", "error", "total_bytes", "free_bytes"),
    *("used_bytes", "utilization", "temperature_c", "power_w", "compute_capability", "mig"),
    "state_changed_at",
)
UPSERT = (
    f"INSERT INTO gpus ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
    " ON CONFLICT (uuid) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[1:])
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """A GPU as it was last seen."""

    uuid: str
    #: NVML's number
    gpu_index: int
    name: str
    pci_bus_id: str
    state: GpuState
    #: why it can't be read; None = healthy
    error: str | None
    total_bytes: int
    free_bytes: int
    used_bytes: int
    #: 0-100
    utilization: float
    temperature_c: float | None
    power_w: float | None
    compute_capability: str | None
    #: a slice of a card
    mig: bool
    #: what a server is charged beside its buffers; None while nothing is learned
    overhead_bytes: int | None
    #: Unix seconds
    state_changed_at: float

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `gpus` says."""
        values = {**row, "state": GpuState(row["state"]), "mig": bool(row["mig"])}
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcessRow:
    """A process that has memory on a GPU."""

    gpu_uuid: str
    pid: int
    name: str | None
    #: None where the driver does not say
    used_bytes: int | None
    #: of a server of ours; None for somebody else's process
    server_id: int | None
    #: of that server
    model_id: str | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `gpu_processes`, joined with its server, says."""
        return cls(**row)


def gpus(store: Store) -> list[GpuRow]:
    """Return the GPUs as last seen, in NVML's order."""
    rows = store.read(f"SELECT {columns(GpuRow)} FROM gpus ORDER BY gpu_index")
    return [GpuRow.from_row(row) for row in rows]


def processes(store: Store) -> list[GpuProcessRow]:
    """Return who had memory on which GPU at the last look, by pid."""
    rows = store.read(
        "SELECT p.gpu_uuid, p.pid, p.name, p.used_bytes, p.server_id, s.model_id"
        " FROM gpu_processes p LEFT JOIN servers s ON s.id = p.server_id ORDER BY p.pid"
    )
    return [GpuProcessRow.from_row(row) for row in rows]


def mark_assigned(connection: sqlite3.Connection, server_id: int, *, now: float) -> None:
    """Say that GPUs have a server on them; inside the transaction that inserts it."""
    rows = connection.execute(
        "SELECT g.*, s.model_id FROM gpus g JOIN assignments a ON a.gpu_uuid = g.uuid"
        " JOIN servers s ON s.id = a.server_id WHERE s.id = ? AND g.state = 'available'",
        (server_id,),
    ).fetchall()
    for row in rows:
        reason = f"model '{row['model_id']}' is placed on it"
        _move(connection, row, GpuState.ASSIGNED, reason, now)


def mark_available(connection: sqlite3.Connection, server_id: int, *, now: float) -> None:
    """Say that GPUs have no server any more; inside the transaction that ends the last one."""
    rows = connection.execute(
        "SELECT g.*, s.model_id FROM gpus g JOIN assignments a ON a.gpu_uuid = g.uuid"
        " JOIN servers s ON s.id = a.server_id WHERE s.id = ? AND g.state = 'assigned'"
        f" AND g.uuid NOT IN ({HELD})",
        (server_id,),
    ).fetchall()
    for row in rows:
        _move(connection, row, GpuState.AVAILABLE, f"model '{row['model_id']}' is gone", now)


def _move(
    connection: sqlite3.Connection, row: Row, state: GpuState, reason: str, now: float
) -> None:
    connection.execute(
        "UPDATE gpus SET state = ?, state_changed_at = ? WHERE uuid = ?", (state, now, row["uuid"])
    )
    change = Change(
        gpu_index=row["gpu_index"],
        gpu_uuid=row["uuid"],
        before=row["state"],
        after=state,
        reason=reason,
    )
    _tell(connection, change, now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A GPU's transition from one state to another."""

    gpu_index: int
    gpu_uuid: str
    #: "new" where it was not there
    before: str
    after: GpuState
    reason: str


def _tell(connection: sqlite3.Connection, change: Change, now: float) -> None:
    """Write the event of a transition."""
    before, after = change.before, change.after
    add_event(
        connection,
        now,
        "gpu",
        f"gpu {change.gpu_index} {before}->{after}: {change.reason}",
        gpu_uuid=change.gpu_uuid,
        data={"from": before, "to": after},
        level=logging.WARNING if after is GpuState.ERROR else logging.INFO,
    )


def write_snapshot(store: Store, snapshot: GpuSnapshot, *, now: float) -> None:
    """Replace what the file says of the GPUs, with an event for every transition."""
    with store.write() as connection:
        connection.execute(
            "UPDATE manager SET mode = ?, mode_reason = ?, driver_version = ?, observed_at = ?"
            " WHERE id = 1",
            (
                "gpu" if snapshot.gpus else "cpu",
                snapshot.reason,
                snapshot.driver_version,
                snapshot.observed_at,
            ),
        )
        before = {row["uuid"]: row for row in connection.execute("SELECT * FROM gpus").fetchall()}
        held = {row["gpu_uuid"] for row in connection.execute(HELD).fetchall()}
        for gpu in snapshot.gpus:
            _write_gpu(connection, gpu, before.pop(gpu.uuid, None), held=gpu.uuid in held, now=now)
        connection.executemany("DELETE FROM gpus WHERE uuid = ?", [(uuid,) for uuid in before])
        # of servers that were adopted before the GPUs were looked at
        connection.executemany(
            "UPDATE assignments SET gpu_index = ? WHERE gpu_uuid = ? AND gpu_index = ?",
            [(gpu.index, gpu.uuid, UNKNOWN_INDEX) for gpu in snapshot.gpus],
        )
        _write_processes(connection, snapshot)


def _write_gpu(
    connection: sqlite3.Connection, gpu: Gpu, old: Row | None, *, held: bool, now: float
) -> None:
    state = GpuState.ERROR if gpu.error else GpuState.ASSIGNED if held else GpuState.AVAILABLE
    before = old["state"] if old else "new"
    if before != state:
        reason = gpu.error or ("it answers again" if before == GpuState.ERROR else gpu.name)
        change = Change(
            gpu_index=gpu.index, gpu_uuid=gpu.uuid, before=before, after=state, reason=reason
        )
        _tell(connection, change, now)
    connection.execute(
        UPSERT,
        (
            *(gpu.uuid, gpu.index, gpu.name, gpu.pci_bus_id, state, gpu.error),
            *(gpu.total_bytes, gpu.free_bytes, gpu.used_bytes, gpu.utilization),
            *(gpu.temperature_c, gpu.power_w, gpu.compute_capability, int(gpu.mig)),
            old["state_changed_at"] if old and before == state else now,
        ),
    )


def _write_processes(connection: sqlite3.Connection, snapshot: GpuSnapshot) -> None:
    """Write who has memory on which GPU; ours are known by their pid."""
    connection.execute("DELETE FROM gpu_processes")
    connection.executemany(
        "INSERT INTO gpu_processes (gpu_uuid, pid, name, used_bytes, server_id)"
        f" VALUES (?, ?, ?, ?, (SELECT id FROM servers WHERE pid = ? AND state IN {LIVE}))",
        [
            (gpu.uuid, process.pid, process.name, process.used_bytes, process.pid)
            for gpu in snapshot.gpus
            for process in gpu.processes
        ],
    )
