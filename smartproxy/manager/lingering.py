"""Servers whose process has ended but whose memory NVML does not show as free yet.

A process's memory comes back after its end, sometimes a second later, and the last look at the GPUs
is older still. Until then its promise stands in the books and the planner sees the server as
stopping: the next load waits for that memory, not merely for the end of the process, and nobody
else is evicted for what is coming anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from smartproxy.manager.context import Ended, Manager
from smartproxy.planner.types import Hold, RunningServer
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments
from smartproxy.state.server_row import LiveServer, ServerRow
from smartproxy.types import MIB, Gpu, GpuSnapshot, ServerState

logger = logging.getLogger(__name__)

#: seconds after which memory that is still missing is somebody else's
PATIENCE_S = 5.0
#: drivers round, and other processes breathe
TOLERANCE_BYTES = 64 * MIB


def note_others(
    manager: Manager, live: list[LiveServer], promised: Mapping[int, list[AssignmentRow]]
) -> None:
    """Remember what each new look shows as used that no listed process has, and none of ours.

    Only while all our servers on the GPU show themselves and none has just ended: what a process
    leaves behind when it goes is no process's for a while, either.
    """
    seen = manager.gpus
    if seen is None or seen is manager.others_at:
        return
    manager.others_at = seen
    known = {row.pid for row in live} | {ended.pid for ended in manager.ended.values()}
    manager.shown_pids &= known  # a number may come again
    for gpu in seen.gpus:
        listed = {process.pid for process in gpu.processes if process.used_bytes}
        ours = {row.pid for row in live if _has_part(promised.get(row.id, ()), gpu)}
        manager.shown_pids |= listed & ours
        ending = any(gpu.uuid in ended.server.holds for ended in manager.ended.values())
        if ours <= listed and not ending:
            manager.unclaimed_bytes[gpu.uuid] = _unclaimed(gpu)


def note_end(manager: Manager, server_id: int, now: float) -> None:
    """Remember what a server had whose process has ended; call before its row says so."""
    parts = assignments(manager.store).get(server_id, [])
    seen = manager.gpus
    if not parts or seen is None:
        return
    row = server_rows.server(manager.store, server_id)
    reserved = {part.gpu_uuid: part.reserved_bytes for part in parts}
    loaded = row.ready_at is not None and seen.observed_at > row.ready_at
    hidden = loaded and row.pid not in manager.shown_pids
    for gpu in seen.gpus:
        if gpu.uuid in reserved:  # where nothing is known yet
            manager.unclaimed_bytes.setdefault(gpu.uuid, _unclaimed(gpu))
    manager.ended[server_id] = Ended(
        server=_stopping(row, reserved),
        pid=row.pid,
        at=now,
        # a half is a sure sign: what was promised is not much more than what was used
        used_at_most={
            gpu.uuid: gpu.used_bytes - reserved[gpu.uuid] // 2
            for gpu in seen.gpus
            if hidden and gpu.uuid in reserved
        },
    )
    manager.look_at_gpus()


def _stopping(row: ServerRow, reserved: Mapping[str, int]) -> RunningServer:
    return RunningServer(
        server_id=row.id,
        model_id=row.model_id,
        state=ServerState.STOPPING,
        holds={uuid: Hold(reserved_bytes=size, visible_bytes=0) for uuid, size in reserved.items()},
        busy=0,
        pinned=False,
        created_at=row.created_at,
        ready_at=None,
        last_used_at=row.last_used_at,
        load_s=row.load_s or 0.0,
    )


def still_held(manager: Manager, live_ids: set[int], now: float) -> Iterator[RunningServer]:
    """Yield ended servers whose memory is not back, for the planner; forget the others.

    live_ids: servers whose row still says that they live; those the planner sees anyway.
    """
    seen = manager.gpus
    if seen is None:
        return
    for server_id, ended in list(manager.ended.items()):
        left = {gpu.uuid: _left(manager, ended, gpu) for gpu in _its(ended, seen)}
        if seen.observed_at > ended.at and not any(left.values()):
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
                holds = {
                    uuid: replace(hold, visible_bytes=left.get(uuid, 0))
                    for uuid, hold in ended.server.holds.items()
                }
                yield replace(ended.server, holds=holds)


def _its(ended: Ended, seen: GpuSnapshot) -> list[Gpu]:
    return [gpu for gpu in seen.gpus if gpu.uuid in ended.server.holds and gpu.error is None]


def _left(manager: Manager, ended: Ended, gpu: Gpu) -> int:
    """Return what NVML's "used" still contains of an ended server, as far as can be told."""
    reserved = ended.server.holds[gpu.uuid].reserved_bytes
    if gpu.uuid in ended.used_at_most and not _listed(gpu, ended.pid):
        return reserved if gpu.used_bytes > ended.used_at_most[gpu.uuid] else 0
    if any(process.pid == ended.pid for process in gpu.processes):
        return _listed(gpu, ended.pid) or reserved
    return _left_behind(manager, gpu, reserved)


def visible_bytes(manager: Manager, gpu: Gpu, pid: int | None, reserved_bytes: int) -> int:
    """Return what NVML's "used" contains of a server whose row says that it lives."""
    listed = _listed(gpu, pid)
    if listed or pid not in manager.shown_pids:
        return listed
    return _left_behind(manager, gpu, reserved_bytes)  # it has just ended, nobody noticed yet


def _left_behind(manager: Manager, gpu: Gpu, reserved_bytes: int) -> int:
    excess = _unclaimed(gpu) - manager.unclaimed_bytes.get(gpu.uuid, 0)
    return min(reserved_bytes, excess) if excess > TOLERANCE_BYTES else 0


def _listed(gpu: Gpu, pid: int | None) -> int:
    return sum(process.used_bytes or 0 for process in gpu.processes if process.pid == pid)


def _unclaimed(gpu: Gpu) -> int:
    return gpu.used_bytes - sum(process.used_bytes or 0 for process in gpu.processes)


def _has_part(parts: Iterable[AssignmentRow], gpu: Gpu) -> bool:
    return any(part.gpu_uuid == gpu.uuid for part in parts)
