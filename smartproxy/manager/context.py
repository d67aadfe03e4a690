"""What the whole manager works with. What changes has an owner beside its writers:

children.py, failures.py, gpu_watch.py (GpuView), lingering.py, shortage.py, use.py. Everything that
must outlive the manager is in the state file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smartproxy.catalog.catalog import Catalog
from smartproxy.catalog.live import Live
from smartproxy.config.settings import Settings
from smartproxy.llama.binary import Binary
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What stays the same while the manager runs. Any thread may use it."""

    #: the configuration; another is put in force between two passes only
    live: Live
    store: Store
    binary: Binary
    #: blocking work: starting and stopping servers
    threads: ThreadPoolExecutor
    #: wakes the main loop
    poke: Callable[[], None]
    #: set once, by the signal handler: the manager is ending
    stopping: threading.Event

    @property
    def settings(self) -> Settings:
        return self.live.settings

    @property
    def catalog(self) -> Catalog:
        return self.live.catalog

    @property
    def log_dir(self) -> Path:
        return self.settings.state_dir / "logs"


def in_thread(tools: Tools, work: Callable[..., None], *args: Any) -> None:
    """Run blocking work in a thread of its own; what it raises is logged."""

    def guarded() -> None:
        try:
            work(*args)
        except Exception:
            logger.exception("%s failed", work)
            raise

    tools.threads.submit(guarded)


class Preload:
    """Models to load without being asked. Any thread may use it."""

    def __init__(self, model_ids: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        #: written under the lock, by the two methods below
        self._ids = set(model_ids)

    def add(self, model_id: str) -> None:
        """Have a model loaded as soon as it has a place."""
        with self._lock:
            self._ids.add(model_id)

    def discard(self, model_id: str) -> None:
        """Take a model out: it was tried, whatever came of it."""
        with self._lock:
            self._ids.discard(model_id)

    def ids(self) -> list[str]:
        """Return the models in the order of their names."""
        with self._lock:
            return sorted(self._ids)
