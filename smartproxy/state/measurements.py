"""Estimated against measured: what loads were expected to take and took, and overhead per GPU.

Only the manager writes through this module. Memory is bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from smartproxy.state.sql import LIVE, columns, marks
from smartproxy.state.store import Row, Store

HOST = "host"
#: loads kept per settings; the most of them counts
KEPT_PER_SETTINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a server has of one GPU now, to be written in one go."""

    server_id: int
    gpu_uuid: str
    measured_bytes: int | None
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRow:
    """One device of one load: what was expected of it, and what it took."""

    #: Unix seconds
    at: float
    model_id: str
    #: None: told by llama-fit-params, no server ran
    server_id: int | None
    build: str
    #: what the file is; that, build and settings; all that and the layout
    file_key: str
    options_key: str
    settings_key: str
    #: tensor_split, gpu_layers, context_size, cpu_moe_layers, as JSON
    layout: str
    #: a GPU's uuid, or HOST
    device: str
    #: place in the tensor split; -1 = the host
    device_index: int
    #: llama.cpp's buffers by the rules alone
    predicted_bytes: int
    #: what was promised: corrected by earlier measurements, overhead included
    estimated_bytes: int
    #: the part of it that was assumed for the backend
    overhead_bytes: int
    #: the server's own buffer lines; None until they are read
    buffers_bytes: int | None = None
    #: the most that NVML showed for its pid; for the host, resident memory
    process_bytes: int | None = None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `measurements` says."""
        return cls(**row)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadRow:
    """What a server was seen to take of a GPU beside its buffers."""

    gpu_uuid: str
    overhead_bytes: int
    #: measured after prompts, which make pools grow
    warm: bool

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `overheads` says."""
        values = {**row, "warm": bool(row["warm"])}
        return cls(**values)


def expect(store: Store, rows: list[MeasurementRow]) -> None:
    """Write what a load is expected to take, one row per device and for the host.

    In place of what was expected or told before for the same server, or (server_id None) the same
    settings. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("nothing is expected")
    with store.write() as connection:
        if rows[0].server_id is None:
            connection.execute(
                "DELETE FROM measurements WHERE server_id IS NULL AND settings_key = ?",
                (rows[0].settings_key,),
            )
        connection.executemany(
            f"INSERT OR REPLACE INTO measurements ({columns(MeasurementRow)})"
            f" VALUES ({marks(MeasurementRow)})",
            [asdict(row) for row in rows],
        )


def of_server(store: Store, server_id: int) -> list[MeasurementRow]:
    """Return a server's rows, GPUs in device order first, the host last."""
    rows = store.read(
        f"SELECT {columns(MeasurementRow)} FROM measurements WHERE server_id = ?"
        " ORDER BY device_index < 0, device_index",
        (server_id,),
    )
    return [MeasurementRow.from_row(row) for row in rows]


def of_file(store: Store, file_key: str, build: str) -> list[MeasurementRow]:
    """Return every row of a file and build, measured or not, load by load in device order."""
    rows = store.read(
        f"SELECT {columns(MeasurementRow)} FROM measurements WHERE file_key = ? AND build = ?"
        " ORDER BY server_id, settings_key, device_index < 0, device_index",
        (file_key, build),
    )
    return [MeasurementRow.from_row(row) for row in rows]


def fill_buffers(store: Store, server_id: int, buffers: Mapping[str, int], *, now: float) -> None:
    """Write what a server's log says of its buffers, by GPU uuid and 'host'."""
    with store.write() as connection:
        connection.executemany(
            "UPDATE measurements SET buffers_bytes = ?, at = ? WHERE server_id = ? AND device = ?",
            [(size, now, server_id, device) for device, size in buffers.items()],
        )


def fill_taken(store: Store, taken: Iterable[Taken], *, now: float) -> None:
    """Write what NVML shows of servers: into assignments, the servers' sums, and measurements."""
    with store.write() as connection:
        for part in taken:
            where = (part.server_id, part.gpu_uuid)
            connection.execute(
                "UPDATE assignments SET measured_bytes = ?, reserved_bytes = ?"
                " WHERE server_id = ? AND gpu_uuid = ?",
                (part.measured_bytes, part.reserved_bytes, *where),
            )
            connection.execute(
                "UPDATE measurements SET process_bytes = ?, at = ?"
                " WHERE server_id = ? AND device = ? AND process_bytes IS NOT ?",
                (part.measured_bytes, now, *where, part.measured_bytes),
            )
            # a sum that lacks a GPU would look like a model that shrank
            connection.execute(
                "UPDATE servers SET measured_bytes = (SELECT CASE WHEN count(*) ="
                " count(measured_bytes) THEN sum(measured_bytes) END FROM assignments"
                " WHERE server_id = servers.id) WHERE id = ?",
                (part.server_id,),
            )


def fill_host(store: Store, server_id: int, resident_bytes: int) -> None:
    """Write a server's resident memory."""
    with store.write() as connection:
        connection.execute(
            "UPDATE servers SET host_measured_bytes = ? WHERE id = ?", (resident_bytes, server_id)
        )
        connection.execute(
            "UPDATE measurements SET process_bytes = ? WHERE server_id = ? AND device = ?",
            (resident_bytes, server_id, HOST),
        )


def overheads(store: Store, build: str) -> dict[str, OverheadRow]:
    """Return what was learned of each GPU for a build, by uuid."""
    rows = store.read(f"SELECT {columns(OverheadRow)} FROM overheads WHERE build = ?", (build,))
    return {row["gpu_uuid"]: OverheadRow.from_row(row) for row in rows}


def learn_overhead(
    store: Store, gpu_uuid: str, build: str, *, overhead_bytes: int, warm: bool, now: float
) -> None:
    """Keep a GPU's overhead if it is the most so far; once warm, always warm."""
    with store.write() as connection:
        connection.execute(
            "INSERT INTO overheads (gpu_uuid, build, overhead_bytes, warm, updated_at)"
            " VALUES (?, ?, ?, ?, ?) ON CONFLICT (gpu_uuid, build) DO UPDATE SET"
            " overhead_bytes = max(overhead_bytes, excluded.overhead_bytes),"
            " warm = max(warm, excluded.warm), updated_at = excluded.updated_at",
            (gpu_uuid, build, overhead_bytes, int(warm), now),
        )


def show_overheads(store: Store, by_uuid: Mapping[str, int]) -> None:
    """Write what each GPU is charged now beside the GPUs, where it is not there already."""
    shown = {
        r["uuid"]: r["overhead_bytes"] for r in store.read("SELECT uuid, overhead_bytes FROM gpus")
    }
    news = {uuid: size for uuid, size in by_uuid.items() if shown.get(uuid, size) != size}
    if not news:
        return
    with store.write() as connection:
        connection.executemany(
            "UPDATE gpus SET overhead_bytes = ? WHERE uuid = ?",
            [(size, uuid) for uuid, size in news.items()],
        )


def prune(store: Store) -> None:
    """Drop loads that never came to be, and all but the latest of each settings."""
    with store.write() as connection:
        connection.execute(
            "DELETE FROM measurements WHERE buffers_bytes IS NULL AND process_bytes IS NULL"
            " AND server_id IS NOT NULL AND server_id NOT IN"
            f" (SELECT id FROM servers WHERE state IN {LIVE})"
        )
        connection.execute(
            "DELETE FROM measurements WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER"
            " (PARTITION BY settings_key, device ORDER BY id DESC) AS place FROM measurements)"
            " WHERE place > ?)",
            (KEPT_PER_SETTINGS,),
        )
