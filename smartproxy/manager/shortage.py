"""A load that ran out of GPU memory: raise what its model is taken to need, and try once more.

The server asked for more than it was promised, or somebody else took what was promised to it after
the last look. In the first case the model's need is raised, for as long as this manager runs (what
is measured of a load that succeeds is kept longer: measure.py); in the second the fresh look alone
changes the next decision. Either way the load is planned anew, with evictions if need be; a
second death in a row is its failure, told with the numbers.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.errors import LoadFailed
from smartproxy.llama.out_of_memory import asked_bytes
from smartproxy.manager import lingering, needs
from smartproxy.manager.context import Manager, Shortage
from smartproxy.memory.types import Estimate, Layout, Need
from smartproxy.planner.reasons import gb
from smartproxy.state import servers as server_rows
from smartproxy.state.store import Row
from smartproxy.types import MIB, ServerState

logger = logging.getLogger(__name__)

#: what an estimate that proved too low is raised by at least: this share, and these bytes
LEAST_RAISE = 0.1
LEAST_RAISE_BYTES = 128 * MIB
LOOK_EVERY_S = 0.02


class OutOfGpuMemory(LoadFailed):
    """A server died for want of GPU memory while loading; carries its log."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def need_of(manager: Manager, spec: ModelSpec) -> Need:
    """Return what a model needs, raised where a load of it has shown that to be too little.

    Raises LoadFailed or MetadataError: why it can't be known.
    """
    need = needs.need_of(manager, spec)
    shortage = manager.shortages.get(spec.id)
    return need if shortage is None else _raised(need, shortage.raised_bytes)


def _raised(need: Need, raised_bytes: int) -> Need:
    """Return a need that asks each GPU for so much more, as part of the compute buffer."""

    def estimate(layout: Layout) -> Estimate:
        plain = need.estimate(layout)
        devices = tuple(
            replace(device, compute_bytes=device.compute_bytes + raised_bytes)
            for device in plain.devices
        )
        return replace(plain, devices=devices)

    return replace(need, estimate=estimate)


def try_again(manager: Manager, server_id: int, spec: ModelSpec, error: OutOfGpuMemory) -> bool:
    """End a server that ran out of memory so that its load is planned anew. Blocks for seconds.

    False: it was tried again already, so this is its failure; the caller says so.
    """
    before = manager.shortages.get(spec.id, Shortage(raised_bytes=0, trying_again=False))
    if before.trying_again:
        manager.shortages[spec.id] = replace(before, trying_again=False)
        return False
    if not _stop(manager, server_id, ServerState.STARTING, ServerState.STOPPING, str(error)):
        return True  # it was being stopped on purpose
    shares = server_rows.assignments(manager.store).get(server_id, [])
    _await_memory(manager, server_id)
    raised_bytes = before.raised_bytes
    taken = _taken_by_others(manager, shares)
    if taken is None:
        raised_bytes += _lacking_bytes(shares, error.log)
        why = f"its need is raised by {gb(raised_bytes)} a GPU"
    else:
        why = taken
    manager.shortages[spec.id] = Shortage(raised_bytes=raised_bytes, trying_again=True)
    if spec.preload:  # nobody else asks again for it
        manager.preload.add(spec.id)
    reason = f"ran out of GPU memory while loading: {why}; it is tried once more"
    return _stop(manager, server_id, ServerState.STOPPING, ServerState.STOPPED, reason)


def settled(manager: Manager, model_id: str) -> None:
    """Say that a model has loaded: the next shortage may be tried again once more."""
    shortage = manager.shortages.get(model_id)
    if shortage is not None:
        manager.shortages[model_id] = replace(shortage, trying_again=False)


def numbers(manager: Manager, server_id: int) -> str:
    """Return what a failed server was promised, and what its GPUs have free now."""
    free = {gpu.uuid: gpu.free_bytes for gpu in (manager.gpus.gpus if manager.gpus else ())}
    parts = [
        f"GPU {share['gpu_index']} was to give {gb(share['estimated_bytes'])} and has"
        f" {gb(free.get(share['gpu_uuid'], 0))} free now"
        for share in server_rows.assignments(manager.store).get(server_id, [])
    ]
    return "; ".join(parts)


def _stop(
    manager: Manager, server_id: int, before: ServerState, after: ServerState, reason: str
) -> bool:
    return server_rows.transition(
        manager.store, server_id, before, after, now=time.time(), reason=reason
    )


def _await_memory(manager: Manager, server_id: int) -> None:
    """Block until what the dead server held is back, so that the GPUs' numbers are the others'."""
    deadline = time.monotonic() + lingering.PATIENCE_S + 1
    while server_id in manager.ended and time.monotonic() < deadline:
        if manager.stopping.is_set():
            return
        manager.poke()
        time.sleep(LOOK_EVERY_S)


def _taken_by_others(manager: Manager, shares: list[Row]) -> str | None:
    """Return which GPU no longer has what was promised, None where all have."""
    gpus = {gpu.uuid: gpu for gpu in (manager.gpus.gpus if manager.gpus else ())}
    for share in shares:
        gpu = gpus.get(share["gpu_uuid"])
        if gpu is not None and gpu.free_bytes < share["estimated_bytes"]:
            return (
                f"of the {gb(share['estimated_bytes'])} promised on GPU {gpu.index}"
                f" others have taken all but {gb(gpu.free_bytes)}"
            )
    return None


def _lacking_bytes(shares: list[Row], log: str) -> int:
    """Return by how much the GPU that was most too small for it must give more."""
    known = asked_bytes(log, len(shares))
    lacking = [
        max(
            LEAST_RAISE_BYTES,
            int(share["estimated_bytes"] * LEAST_RAISE),
            size - share["estimated_bytes"],
        )
        for share, size in zip(shares, known, strict=True)
    ]
    return max(lacking, default=LEAST_RAISE_BYTES)
