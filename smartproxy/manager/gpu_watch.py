"""The look at the GPUs: a scheduler job that keeps the last snapshot in memory and in the file.

NVML may hang for seconds: it is called in the scheduler's thread only, so that nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from smartproxy.gpus.nvml import GpuObserver
from smartproxy.gpus.types import Gpu, GpuSnapshot
from smartproxy.manager.context import Tools
from smartproxy.state import gpus

logger = logging.getLogger(__name__)

#: seconds between two looks at the GPUs that are asked for beside the regular ones
LOOK_EVERY_S = 0.1
#: how long the end of the manager waits for a look that is under way
CLOSE_PATIENCE_S = 1.0


class GpuView:
    """The GPUs as last seen, and whether a fresh look is wanted. Any thread may read."""

    def __init__(self, poke: Callable[[], None]) -> None:
        self._poke = poke
        #: None until looked at once; written by Watcher.look
        self.seen: GpuSnapshot | None = None
        #: by uuid of a GPU in error: when it was first seen so; written by failed_gpus.py, in the
        #: main thread
        self.failing_since: dict[str, float] = {}
        #: set by want_look, cleared by take_wanted
        self._wanted = threading.Event()
        self._lock = threading.Lock()
        #: monotonic; written under the lock, by want_look
        self._asked_at = 0.0

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs in NVML's order; none before the first look."""
        seen = self.seen
        return seen.gpus if seen is not None else ()

    def want_look(self) -> None:
        """Ask for a fresh look at the GPUs; it comes within milliseconds, from its own thread."""
        now = time.monotonic()
        with self._lock:
            if now - self._asked_at < LOOK_EVERY_S:
                return
            self._asked_at = now
        self._wanted.set()
        self._poke()

    def take_wanted(self) -> bool:
        """Return whether a look was asked for since the last time."""
        if not self._wanted.is_set():
            return False
        self._wanted.clear()
        return True


class Watcher:
    """Owns the NVML session; `look` is the job."""

    def __init__(self, tools: Tools, view: GpuView) -> None:
        self._tools = tools
        self._view = view
        self._observer = GpuObserver() if tools.settings.enable_gpu_monitoring else None
        #: the last mode that was logged; written by look
        self._told: str | None = None
        self._looking = threading.Lock()
        #: written under the lock, by close
        self._closed = False

    def look(self) -> None:
        """Take a snapshot, write it down, and wake the planner when what it may use changed."""
        store = self._tools.store
        with self._looking:
            if self._closed:
                return
            began = store.now()
            seen = replace(self._seen(), observed_at=began)
        self._tell(seen)
        # before the planner has it: no model is placed on a GPU that the file does not know yet
        gpus.write_snapshot(store, seen, now=store.now())
        first, self._view.seen = self._view.seen is None, seen
        if first or seen.gpus:
            self._tools.poke()

    def _seen(self) -> GpuSnapshot:
        if self._observer is not None:
            return self._observer.observe()
        off = "enable_gpu_monitoring is false"
        return GpuSnapshot(gpus=(), observed_at=0.0, reason=off)

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
        self._closed = True
        if self._observer is not None:
            self._observer.close()
        self._looking.release()
        return True
