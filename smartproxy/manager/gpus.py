"""The look at the GPUs: a scheduler job that keeps the last snapshot in memory and in the file.

NVML may hang for seconds: it is called in the scheduler's thread only, so that nobody waits for it.
"""

from __future__ import annotations

import logging
import time

from smartproxy.manager.core import Manager
from smartproxy.manager.observe import GpuObserver
from smartproxy.state import fleet
from smartproxy.types import Gpu, GpuSnapshot, GpuState

logger = logging.getLogger(__name__)


class Watcher:
    """Owns the NVML session; `look` is the job."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._observer = GpuObserver() if manager.settings.enable_gpu_monitoring else None
        self._told: str | None = None

    def look(self) -> None:
        """Take a snapshot, write it down, and wake the planner when what it may use changed."""
        manager, now = self._manager, time.time()
        if self._observer is None:
            seen = GpuSnapshot(gpus=(), observed_at=now, reason="enable_gpu_monitoring is false")
        else:
            seen = self._observer.observe()
        first, manager.gpus = manager.gpus is None, seen
        self._tell(seen)
        _write(manager, seen, now)
        if first or seen.gpus:
            manager.poke()

    def _tell(self, seen: GpuSnapshot) -> None:
        """Log the mode once, and again when it changes."""
        told = seen.reason or f"{len(seen.gpus)} GPUs, driver {seen.driver_version}"
        if told == self._told:
            return
        self._told = told
        if seen.gpus:
            logger.info("mode=gpu: %s", told)
        else:
            logger.warning("mode=cpu, everything runs on the CPU: %s", told)

    def close(self) -> None:
        """Shut NVML down."""
        if self._observer is not None:
            self._observer.close()


def _write(manager: Manager, seen: GpuSnapshot, now: float) -> None:
    store = manager.store
    ours = {part["gpu_uuid"] for parts in fleet.assignments(store).values() for part in parts}
    pids = {row["pid"]: row["id"] for row in fleet.live_servers(store)}
    before = {row["uuid"]: row for row in store.read("SELECT * FROM gpus")}
    with store.write() as connection:
        connection.execute(
            "UPDATE manager SET mode = ?, mode_reason = ?, driver_version = ?, observed_at = ?"
            " WHERE id = 1",
            (
                "gpu" if seen.gpus else "cpu",
                seen.reason,
                seen.driver_version,
                seen.observed_at,
            ),
        )
        connection.execute("DELETE FROM gpu_processes")
        for gpu in seen.gpus:
            state = _state(gpu, gpu.uuid in ours)
            old = before.pop(gpu.uuid, None)
            changed_at = old["state_changed_at"] if old and old["state"] == state else now
            if old is None or old["state"] != state:
                fleet.add_event(
                    connection,
                    now,
                    "gpu",
                    f"gpu {gpu.index} {old['state'] if old else 'new'}->{state}"
                    + (f": {gpu.error}" if gpu.error else ""),
                    gpu_uuid=gpu.uuid,
                )
            connection.execute(
                "INSERT INTO gpus (uuid, gpu_index, name, pci_bus_id, state, error, total_bytes,"
                " free_bytes, used_bytes, utilization, temperature_c, power_w, compute_capability,"
                " mig, state_changed_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (uuid) DO UPDATE SET gpu_index = excluded.gpu_index,"
                " state = excluded.state, error = excluded.error,"
                " total_bytes = excluded.total_bytes, free_bytes = excluded.free_bytes,"
                " used_bytes = excluded.used_bytes, utilization = excluded.utilization,"
                " temperature_c = excluded.temperature_c, power_w = excluded.power_w,"
                " state_changed_at = excluded.state_changed_at",
                (
                    *(gpu.uuid, gpu.index, gpu.name, gpu.pci_bus_id, state, gpu.error),
                    *(gpu.total_bytes, gpu.free_bytes, gpu.used_bytes, gpu.utilization),
                    *(gpu.temperature_c, gpu.power_w, gpu.compute_capability, int(gpu.mig)),
                    changed_at,
                ),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO gpu_processes (gpu_uuid, pid, name, used_bytes, server_id)"
                " VALUES (?, ?, ?, ?, ?)",
                [(gpu.uuid, p.pid, p.name, p.used_bytes, pids.get(p.pid)) for p in gpu.processes],
            )
        for uuid in before:
            connection.execute("DELETE FROM gpus WHERE uuid = ?", (uuid,))


def _state(gpu: Gpu, assigned: bool) -> GpuState:
    if gpu.error:
        return GpuState.ERROR
    return GpuState.ASSIGNED if assigned else GpuState.AVAILABLE
