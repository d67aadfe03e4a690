"""What the manager holds in memory. Everything that must outlive it is in the state file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from smartproxy.catalog import Catalog
from smartproxy.manager.binary import Binary
from smartproxy.manager.process import Child
from smartproxy.settings import Settings
from smartproxy.state.store import Store
from smartproxy.types import GpuSnapshot, Need, Placement

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A load that failed: requests within the back-off get the same answer at once."""

    code: str
    message: str
    at: float
    times: int

    def holds(self, now: float) -> bool:
        """Return whether the back-off still runs; it doubles with every failure in a row."""
        pause_s: float = min(FIRST_BACKOFF_S * 2 ** (self.times - 1), LONGEST_BACKOFF_S)
        return now < self.at + pause_s


@dataclass(slots=True, kw_only=True)
class Manager:
    settings: Settings
    catalog: Catalog
    store: Store
    binary: Binary
    #: blocking work: starting and stopping servers
    threads: ThreadPoolExecutor
    #: wakes the main loop
    poke: Callable[[], None]
    #: None until looked at once
    gpus: GpuSnapshot | None = None
    children: dict[int, Child] = field(default_factory=dict)
    placements: dict[int, Placement] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    needs: dict[str, Need] = field(default_factory=dict)
    #: models to load without being asked; taken out once tried
    preload: set[str] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def log_dir(self) -> Path:
        return self.settings.state_dir / "logs"

    def failed(self, model_id: str, code: str, message: str) -> None:
        """Remember a failed load, for the back-off."""
        before = self.failures.get(model_id)
        times = before.times + 1 if before else 1
        self.failures[model_id] = Failure(code=code, message=message, at=time.time(), times=times)
