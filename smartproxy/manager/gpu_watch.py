"""The look at the GPUs: a scheduler job that keeps the last snapshot in memory and in the file.

NVML may hang for seconds: it is called in the scheduler's thread only, so that nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
import time

from smartproxy.gpus.nvml import GpuObserver
from smartproxy.manager.context import Manager
from smartproxy.state import gpus
from smartproxy.types import GpuSnapshot

logger = logging.getLogger(__name__)

#: how long the end of the manager waits for a look that is under way
CLOSE_PATIENCE_S = 1.0


class Watcher:
    """Owns the NVML session; `look` is the job."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._observer = GpuObserver() if manager.settings.enable_gpu_monitoring else None
        self._told: str | None = None
        self._looking = threading.Lock()

    def look(self) -> None:
        """Take a snapshot, write it down, and wake the planner when what it may use changed."""
        manager = self._manager
        with self._looking:
            seen = self._seen()
        self._tell(seen)
        # before the planner has it: no model is placed on a GPU that the file does not know yet
        gpus.write_snapshot(manager.store, seen, now=time.time())
        first, manager.gpus = manager.gpus is None, seen
        if first or seen.gpus:
            manager.poke()

    def _seen(self) -> GpuSnapshot:
        if self._observer is not None:
            return self._observer.observe()
        off = "enable_gpu_monitoring is false"
        return GpuSnapshot(gpus=(), observed_at=time.time(), reason=off)

    def _tell(self, seen: GpuSnapshot) -> None:
        """Log the mode once, and again when it changes: without a driver that is one warning."""
        told = seen.reason or f"{len(seen.gpus)} GPUs, driver {seen.driver_version}"
        if told == self._told:
            return
        self._told = told
        if not seen.gpus:
            logger.warning("mode=cpu, everything runs on the CPU: %s", told)
        elif seen.reason:
            logger.warning("mode=gpu, but %s", told)
        else:
            logger.info("mode=gpu: %s", told)

    def close(self) -> bool:
        """Shut NVML down. False: one of its calls hangs, so only the end of the process can."""
        if not self._looking.acquire(timeout=CLOSE_PATIENCE_S):
            return False
        if self._observer is not None:
            self._observer.close()
        return True
