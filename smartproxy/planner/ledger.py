"""Who has what: memory per GPU and places in the pool, now and once what drains is gone.

Input: a Snapshot. Output: a Ledger, the working state of one call of `plan`. Pure.

Free memory of a GPU is the least of what NVML calls free less what is promised but not visible yet,
and what its total leaves beside strangers and promises; less the headroom. A server's visible bytes
are missing from NVML's free already, so only the invisible rest of its promise is taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from smartproxy.gpus.cuda import default_overhead_bytes
from smartproxy.gpus.types import Gpu
from smartproxy.planner.types import Promise, RunningServer, Snapshot
from smartproxy.types import ServerState

#: on their way out: what they hold is memory that is coming
LEAVING = frozenset({ServerState.DRAINING, ServerState.STOPPING, ServerState.STOPPED})

#: seconds after which a look at the GPUs must show what a loaded server holds
SETTLED_S = 15.0


@dataclass(slots=True, kw_only=True)
class Ledger:
    """One entry per healthy GPU, in NVML index order, in every list; bytes may fall below 0."""

    gpus: tuple[Gpu, ...]
    overhead_bytes: tuple[int, ...]
    #: free before anything was decided
    at_first: tuple[int, ...]
    #: seen as strangers' but perhaps that of our servers which load: where the driver doesn't tell
    unclear: tuple[int, ...]
    #: free now
    now: list[int]
    #: free once all that leaves is gone, and what older loads wait for is theirs
    later: list[int]
    places_now: int
    places_later: int
    #: by server id: what each GPU gets back when that server is gone, as (position, bytes)
    gains: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def room(self) -> list[int]:
        """Return what a load may take now without spoiling what an older one waits for."""
        return [min(pair) for pair in zip(self.now, self.later, strict=True)]

    def take(self, shares: Iterable[tuple[int, int]], *, starts: bool) -> None:
        """Book (position, bytes) and a place for a load: at once, or for when it can start."""
        for position, size in shares:
            self.later[position] -= size
            if starts:
                self.now[position] -= size
        self.places_later -= 1
        if starts:
            self.places_now -= 1

    def release_later(self, server_ids: Iterable[int]) -> None:
        """Count what these servers hold as coming."""
        for server_id in server_ids:
            for position, size in self.gains[server_id]:
                self.later[position] += size
            self.places_later += 1


def open_ledger(snapshot: Snapshot) -> Ledger:
    """Return the books of a snapshot: free memory and places before anything is decided."""
    healthy = tuple(gpu for gpu in snapshot.gpus or () if gpu.error is None)
    free, unclear, gains = _free_and_gains(healthy, snapshot)
    places = snapshot.settings.pool_size - len(snapshot.servers)
    ledger = Ledger(
        gpus=healthy,
        overhead_bytes=tuple(overhead_bytes(gpu, snapshot) for gpu in healthy),
        at_first=tuple(free),
        unclear=tuple(unclear),
        now=free,
        later=list(free),
        places_now=places,
        places_later=places,
        gains={server_id: tuple(parts) for server_id, parts in gains.items()},
    )
    ledger.release_later(s.server_id for s in snapshot.servers if s.state in LEAVING)
    return ledger


def overhead_bytes(gpu: Gpu, snapshot: Snapshot) -> int:
    """Return what a server takes of this GPU beside its buffers, as far as that is known."""
    learned = snapshot.overhead_bytes.get(gpu.uuid)
    return default_overhead_bytes(gpu.total_bytes) if learned is None else learned


def _free_and_gains(
    gpus: Sequence[Gpu], snapshot: Snapshot
) -> tuple[list[int], list[int], dict[int, list[tuple[int, int]]]]:
    """Return free and unclear bytes per GPU, and per server what its end gives back."""
    holders: dict[str, list[tuple[RunningServer, Promise]]] = {gpu.uuid: [] for gpu in gpus}
    gains: dict[int, list[tuple[int, int]]] = {}
    for server in snapshot.servers:
        gains[server.server_id] = []
        for uuid, hold in server.holds.items():
            if uuid in holders:
                holders[uuid].append((server, hold))
    free, unclear = [], []
    for position, gpu in enumerate(gpus):
        visible = _visible(gpu, holders[gpu.uuid], snapshot.now)
        strangers = max(0, gpu.used_bytes - sum(visible))
        promised = invisible = 0
        for (server, hold), visible_bytes in zip(holders[gpu.uuid], visible, strict=True):
            held = max(hold.reserved_bytes, visible_bytes)
            promised += held
            invisible += held - visible_bytes
            gains[server.server_id].append((position, held))
        by_books = gpu.total_bytes - strangers - promised
        free.append(min(gpu.free_bytes - invisible, by_books) - snapshot.settings.headroom_bytes)
        unclear.append(min(strangers, _promised_unseen(holders[gpu.uuid], snapshot.now)))
    return free, unclear, gains


def _promised_unseen(holders: Sequence[tuple[RunningServer, Promise]], now: float) -> int:
    """Return what is promised to servers that NVML shows nothing of and may not need to yet."""
    return sum(
        hold.reserved_bytes
        for server, hold in holders
        if not _is_seen(server) and not _is_hidden(server, now)
    )


def _visible(gpu: Gpu, holders: Sequence[tuple[RunningServer, Promise]], now: float) -> list[int]:
    """Return per holder the bytes of it that NVML's "used" contains.

    Where the driver doesn't tell memory per process (containers, WDDM), used memory that nobody
    else accounts for is that of our servers which have long loaded and yet show nothing anywhere.
    Counting them as strangers would take their memory off twice.
    """
    unclaimed = max(0, gpu.used_bytes - sum(hold.visible_bytes for _, hold in holders))
    visible = []
    for server, hold in holders:
        visible_bytes = hold.visible_bytes
        if not visible_bytes and _is_hidden(server, now):
            visible_bytes = min(hold.reserved_bytes, unclaimed)
            unclaimed -= visible_bytes
        visible.append(visible_bytes)
    return visible


def _is_hidden(server: RunningServer, now: float) -> bool:
    """Return whether a server must have memory but NVML shows none of it."""
    loaded = server.ready_at is not None and now - server.ready_at >= SETTLED_S
    return loaded and not _is_seen(server)


def _is_seen(server: RunningServer) -> bool:
    return any(hold.visible_bytes for hold in server.holds.values())
