"""Servers whose process has ended but whose memory NVML does not show as free yet.

A process's memory comes back after its end, sometimes a second later, and the last look at the GPUs
is older still. Until then its promise stands in the books and the planner sees the server as
stopping: the next load waits for that memory, not merely for the end of the process, and nobody
else is evicted for what is coming anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from smartproxy.manager.core import Ended, Manager
from smartproxy.state import fleet
from smartproxy.types import MIB, Gpu, GpuSnapshot, Hold, RunningServer, ServerState

logger = logging.getLogger(__name__)

#: seconds after which memory that is still missing is somebody else's
PATIENCE_S = 5.0
#: drivers round, and other processes breathe
TOLERANCE_BYTES = 64 * MIB


def note_end(manager: Manager, server_id: int, now: float) -> None:
    """Remember what a server had whose process has ended; call before its row says so."""
    parts = fleet.assignments(manager.store).get(server_id, [])
    if not parts or manager.gpus is None:
        return
    row = fleet.server(manager.store, server_id)
    holds = {
        part["gpu_uuid"]: Hold(reserved_bytes=part["reserved_bytes"], visible_bytes=0)
        for part in parts
    }
    server = RunningServer(
        server_id=server_id,
        model_id=row["model_id"],
        state=ServerState.STOPPING,
        holds=holds,
        busy=0,
        pinned=False,
        created_at=row["created_at"],
        ready_at=None,
        last_used_at=row["last_used_at"],
        load_s=row["load_s"] or 0.0,
    )
    loaded = row["ready_at"] is not None and manager.gpus.observed_at > row["ready_at"]
    manager.ended[server_id] = Ended(
        server=server,
        pid=row["pid"],
        at=now,
        unclaimed_bytes={
            gpu.uuid: _left_behind(gpu, row["pid"], holds[gpu.uuid].reserved_bytes, loaded)
            for gpu in manager.gpus.gpus
            if gpu.uuid in holds
        },
    )
    manager.look_at_gpus()


def _left_behind(gpu: Gpu, pid: int | None, reserved_bytes: int, loaded: bool) -> int:
    """Return what will be used of a GPU and no process's when this server's memory is back."""
    unclaimed = _unclaimed(gpu)
    if loaded and not _bytes_of(gpu, pid):
        # the driver does not tell who has what: it must be in there, and a half is a sure sign
        unclaimed -= reserved_bytes // 2
    return max(0, unclaimed)


def still_held(manager: Manager, live_ids: set[int], now: float) -> Iterator[RunningServer]:
    """Yield ended servers whose memory is not back, for the planner; forget the others.

    live_ids: servers whose row still says that they live; those the planner sees anyway.
    """
    seen = manager.gpus
    if seen is None:
        return
    for server_id, ended in list(manager.ended.items()):
        if _is_back(ended, seen):
            del manager.ended[server_id]
        elif now - ended.at > PATIENCE_S:
            del manager.ended[server_id]
            logger.warning(
                "memory of server %d (%s) is not back %.0f s after its end: placing without it",
                *(server_id, ended.server.model_id, PATIENCE_S),
            )
        else:
            manager.look_at_gpus()
            if server_id not in live_ids:
                yield replace(ended.server, holds=_holds(ended, seen))


def _is_back(ended: Ended, seen: GpuSnapshot) -> bool:
    if seen.observed_at <= ended.at:
        return False
    return not any(
        _shown(gpu, ended.pid) or _excess(ended, gpu) > TOLERANCE_BYTES
        for gpu in seen.gpus
        if gpu.uuid in ended.unclaimed_bytes and gpu.error is None
    )


def _holds(ended: Ended, seen: GpuSnapshot) -> dict[str, Hold]:
    """Return its holds with what NVML's "used" still contains of them."""
    holds = dict(ended.server.holds)
    for gpu in seen.gpus:
        if gpu.uuid in ended.unclaimed_bytes:
            reserved = holds[gpu.uuid].reserved_bytes
            visible = _bytes_of(gpu, ended.pid) or min(reserved, max(0, _excess(ended, gpu)))
            holds[gpu.uuid] = Hold(reserved_bytes=reserved, visible_bytes=visible)
    return holds


def _excess(ended: Ended, gpu: Gpu) -> int:
    return _unclaimed(gpu) - ended.unclaimed_bytes[gpu.uuid]


def _unclaimed(gpu: Gpu) -> int:
    return gpu.used_bytes - sum(process.used_bytes or 0 for process in gpu.processes)


def _shown(gpu: Gpu, pid: int | None) -> bool:
    return any(process.pid == pid for process in gpu.processes)


def _bytes_of(gpu: Gpu, pid: int | None) -> int:
    return sum(process.used_bytes or 0 for process in gpu.processes if process.pid == pid)
