"""Servers whose process has ended but whose memory NVML does not show as free yet.

A process's memory comes back after its end, sometimes a second later, and the last look at the GPUs
is older still. Until then its promise stands in the books and the planner sees the server as
stopping: the next load waits for that memory, not merely for the end of the process, and nobody
else is evicted for what is coming anyway.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from smartproxy.gpus.types import Gpu, GpuSnapshot
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.planner.types import Promise, RunningServer
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments
from smartproxy.state.server_row import LiveServer, ServerRow
from smartproxy.state.store import Store
from smartproxy.types import MIB, ServerState

logger = logging.getLogger(__name__)

#: seconds after which memory that is still missing is somebody else's
PATIENCE_S = 5.0
#: drivers round, and other processes breathe
TOLERANCE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A server whose process has ended, as long as its memory is not back."""

    #: in state stopping, its holds as they were promised
    server: RunningServer
    pid: int | None
    #: Unix seconds
    at: float
    #: by GPU uuid, where NVML never showed its process: bytes used when its memory is back
    used_at_most: Mapping[str, int]


class Lingering:
    """The ended servers whose memory is not back, and what tells it from other memory.

    Threads that end servers call `note_end`; the rest is the main loop's.
    """

    def __init__(self, store: Store, view: GpuView) -> None:
        self._store = store
        #: the last look; asked for another one when a server has ended
        self.view = view
        self._lock = threading.Lock()
        # all of these are written under the lock
        #: by server id; written by note_end and still_held
        self._ended: dict[int, Ended] = {}
        #: by GPU uuid: bytes used that are no listed process's and none of ours; written by
        #: note_others and, where nothing is known yet, by note_end
        self._unclaimed_bytes: dict[str, int] = {}
        #: the last look that was considered for it; written by note_others
        self._others_at: GpuSnapshot | None = None
        #: pids of ours of which NVML has told memory; written by note_others
        self._shown_pids: set[int] = set()

    def note_others(
        self,
        live: list[LiveServer],
        promised: Mapping[int, list[AssignmentRow]],
        seen: GpuSnapshot,
    ) -> None:
        """Remember what each new look shows as used that no listed process has, and none of ours.

        Only while all our servers on the GPU show themselves and none has just ended: what a
        process leaves behind when it goes is no process's for a while, either.
        """
        with self._lock:
            if seen is self._others_at:
                return
            self._others_at = seen
            known = {row.pid for row in live} | {ended.pid for ended in self._ended.values()}
            self._shown_pids &= known  # a number may come again
            for gpu in seen.gpus:
                listed = {process.pid for process in gpu.processes if process.used_bytes}
                ours = {row.pid for row in live if _has_part(promised.get(row.id, ()), gpu)}
                self._shown_pids |= listed & ours
                ending = any(gpu.uuid in ended.server.holds for ended in self._ended.values())
                if ours <= listed and not ending:
                    self._unclaimed_bytes[gpu.uuid] = _unclaimed(gpu)

    def note_end(self, server_id: int, now: float) -> None:
        """Remember what a server had whose process has ended; call before its row says so."""
        parts = assignments(self._store).get(server_id, [])
        seen = self.view.seen
        if not parts or seen is None:
            return
        row = server_rows.server(self._store, server_id)
        reserved = {part.gpu_uuid: part.reserved_bytes for part in parts}
        with self._lock:
            self._ended[server_id] = self._ended_now(row, reserved, seen, now)
        self.view.want_look()

    def _ended_now(
        self, row: ServerRow, reserved: Mapping[str, int], seen: GpuSnapshot, now: float
    ) -> Ended:
        loaded = row.ready_at is not None and seen.observed_at > row.ready_at
        hidden = loaded and row.pid not in self._shown_pids
        for gpu in seen.gpus:
            if gpu.uuid in reserved:  # where nothing is known yet
                self._unclaimed_bytes.setdefault(gpu.uuid, _unclaimed(gpu))
        return Ended(
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

    def waits_for(self, server_id: int) -> bool:
        """Return whether the memory of an ended server is not back yet."""
        with self._lock:
            return server_id in self._ended

    def still_held(
        self, live_ids: set[int], seen: GpuSnapshot | None, now: float
    ) -> list[RunningServer]:
        """Return ended servers whose memory is not back, for the planner; forget the others.

        live_ids: servers whose row still says that they live; those the planner sees anyway. seen:
        the look that the planner goes by.
        """
        if seen is None:
            return []
        held = []
        with self._lock:
            for server_id, ended in list(self._ended.items()):
                left = {gpu.uuid: self._left(ended, gpu) for gpu in _its(ended, seen)}
                back = seen.observed_at > ended.at and not any(left.values())
                if back or now - ended.at > PATIENCE_S:
                    del self._ended[server_id]
                    if not back:
                        _tell_given_up(server_id, ended)
                    continue
                if server_id not in live_ids:
                    held.append(_with_visible(ended, left))
            waiting = bool(self._ended)
        if waiting:
            self.view.want_look()
        return held

    def _left(self, ended: Ended, gpu: Gpu) -> int:
        """Return what NVML's "used" still contains of an ended server, as far as can be told."""
        reserved = ended.server.holds[gpu.uuid].reserved_bytes
        if gpu.uuid in ended.used_at_most and not _listed(gpu, ended.pid):
            return reserved if gpu.used_bytes > ended.used_at_most[gpu.uuid] else 0
        if any(process.pid == ended.pid for process in gpu.processes):
            return _listed(gpu, ended.pid) or reserved
        return self._left_behind(gpu, reserved)

    def visible_bytes(self, gpu: Gpu, pid: int | None, reserved_bytes: int) -> int:
        """Return what NVML's "used" contains of a server whose row says that it lives."""
        listed = _listed(gpu, pid)
        with self._lock:
            if listed or pid not in self._shown_pids:
                return listed
            # it has just ended, nobody noticed yet
            return self._left_behind(gpu, reserved_bytes)

    def _left_behind(self, gpu: Gpu, reserved_bytes: int) -> int:
        excess = _unclaimed(gpu) - self._unclaimed_bytes.get(gpu.uuid, 0)
        return min(reserved_bytes, excess) if excess > TOLERANCE_BYTES else 0


def _tell_given_up(server_id: int, ended: Ended) -> None:
    logger.warning(
        "memory of server %d (%s) is not back %.0f s after its end: placing without it",
        *(server_id, ended.server.model_id, PATIENCE_S),
    )


def _with_visible(ended: Ended, left: Mapping[str, int]) -> RunningServer:
    holds = {
        uuid: replace(hold, visible_bytes=left.get(uuid, 0))
        for uuid, hold in ended.server.holds.items()
    }
    return replace(ended.server, holds=holds)


def _stopping(row: ServerRow, reserved: Mapping[str, int]) -> RunningServer:
    return RunningServer(
        server_id=row.id,
        model_id=row.model_id,
        state=ServerState.STOPPING,
        holds={
            uuid: Promise(reserved_bytes=size, visible_bytes=0) for uuid, size in reserved.items()
        },
        busy=0,
        pinned=False,
        created_at=row.created_at,
        ready_at=None,
        last_used_at=row.last_used_at,
        load_s=row.load_s or 0.0,
    )


def _its(ended: Ended, seen: GpuSnapshot) -> list[Gpu]:
    return [gpu for gpu in seen.gpus if gpu.uuid in ended.server.holds and gpu.error is None]


def _listed(gpu: Gpu, pid: int | None) -> int:
    return sum(process.used_bytes or 0 for process in gpu.processes if process.pid == pid)


def _unclaimed(gpu: Gpu) -> int:
    return gpu.used_bytes - sum(process.used_bytes or 0 for process in gpu.processes)


def _has_part(parts: Iterable[AssignmentRow], gpu: Gpu) -> bool:
    return any(part.gpu_uuid == gpu.uuid for part in parts)
