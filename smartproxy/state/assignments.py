"""What each server was promised of each GPU. Only the manager writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from smartproxy.state.sql import LIVE, columns
from smartproxy.state.store import Row, Store

#: a GPU's number before the first look at the GPUs
UNKNOWN_INDEX = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAssignment:
    """A share of one GPU, for a server that is about to start."""

    gpu_uuid: str
    #: NVML's number of the GPU, or UNKNOWN_INDEX
    gpu_index: int
    #: promised to the server
    estimated_bytes: int
    #: of the GPU, when the share was given; None where that is not known
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentRow(NewAssignment):
    """A share of one GPU that a server has."""

    server_id: int
    #: withheld from placing: the estimate, then max(measured, estimate)
    reserved_bytes: int
    #: None until NVML has shown the server's process
    measured_bytes: int | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `assignments` says."""
        return cls(**row)


def insert(
    connection: sqlite3.Connection, server_id: int, assigned: Iterable[NewAssignment]
) -> None:
    """Write what a server is promised, in the order of its split; inside the transaction that
    inserts the server."""
    connection.executemany(
        "INSERT INTO assignments (server_id, gpu_uuid, gpu_index, estimated_bytes,"
        " reserved_bytes, free_bytes) VALUES (?, ?, ?, ?, ?, ?)",
        [
            (
                *(server_id, part.gpu_uuid, part.gpu_index, part.estimated_bytes),
                *(part.estimated_bytes, part.free_bytes),
            )
            for part in assigned
        ],
    )


def assignments(store: Store) -> dict[int, list[AssignmentRow]]:
    """Return the assignments of listed servers by server, in the order of their split."""
    rows = store.read(
        f"SELECT {columns(AssignmentRow, 'a.')} FROM assignments a"
        f" JOIN servers s ON s.id = a.server_id WHERE s.state IN {LIVE} OR s.state = 'failed'"
        " ORDER BY a.server_id, a.rowid"
    )
    by_server: dict[int, list[AssignmentRow]] = {}
    for row in rows:
        by_server.setdefault(row["server_id"], []).append(AssignmentRow.from_row(row))
    return by_server


def reserved_bytes(store: Store) -> dict[str, int]:
    """Return what live servers are promised of each GPU, by uuid."""
    rows = store.read(
        "SELECT a.gpu_uuid, sum(a.reserved_bytes) AS bytes FROM assignments a"
        f" JOIN servers s ON s.id = a.server_id WHERE s.state IN {LIVE} GROUP BY a.gpu_uuid"
    )
    return {row["gpu_uuid"]: row["bytes"] for row in rows}


def models_by_gpu(store: Store) -> dict[str, list[str]]:
    """Return the models of live servers by the uuid of each GPU that they have a share of."""
    rows = store.read(
        "SELECT a.gpu_uuid, s.model_id FROM assignments a JOIN servers s ON s.id = a.server_id"
        f" WHERE s.state IN {LIVE}"
    )
    by_gpu: dict[str, list[str]] = {}
    for row in rows:
        by_gpu.setdefault(row["gpu_uuid"], []).append(row["model_id"])
    return by_gpu
