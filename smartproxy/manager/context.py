"""What the manager holds in memory. Everything that must outlive it is in the state file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from smartproxy.catalog.catalog import Catalog
from smartproxy.config.settings import Settings
from smartproxy.llama.binary import Binary
from smartproxy.llama.process import Child
from smartproxy.manager.use import RecentUse
from smartproxy.planner.types import RunningServer
from smartproxy.state.store import Store
from smartproxy.types import GpuSnapshot

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
#: seconds between two looks at the GPUs that are asked for beside the regular ones
LOOK_EVERY_S = 0.1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A server whose process has ended, as long as its memory is not back (lingering.py)."""

    #: in state stopping, its holds as they were promised
    server: RunningServer
    pid: int | None
    at: float
    #: by GPU uuid, where NVML never showed its process: bytes used when its memory is back
    used_at_most: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A model that ran out of GPU memory while loading (shortage.py)."""

    #: what it needs of each GPU beyond its estimate
    raised_bytes: int
    #: a load that died of it is being tried once more
    trying_again: bool


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
    recent: RecentUse
    #: None until looked at once
    gpus: GpuSnapshot | None = None
    children: dict[int, Child] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    #: models to load without being asked; taken out once tried
    preload: set[str] = field(default_factory=set)
    #: settings that llama-fit-params was asked about (fit_params.py)
    asked: set[str] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)
    #: set: the GPUs are to be looked at now, not when their turn comes
    look_wanted: threading.Event = field(default_factory=threading.Event)
    look_asked_at: float = 0.0
    #: by uuid of a GPU in error: when it was first seen so
    failing_since: dict[str, float] = field(default_factory=dict)
    #: servers whose memory is not back yet, by id
    ended: dict[int, Ended] = field(default_factory=dict)
    #: by GPU uuid: bytes used that are no listed process's and none of ours; and the last look
    #: that was considered for it
    unclaimed_bytes: dict[str, int] = field(default_factory=dict)
    others_at: GpuSnapshot | None = None
    #: pids of ours of which NVML has told memory
    shown_pids: set[int] = field(default_factory=set)
    #: models that ran out of GPU memory while loading
    shortages: dict[str, Shortage] = field(default_factory=dict)
    #: seconds that the last decision took
    decision_s: float = 0.0

    @property
    def log_dir(self) -> Path:
        return self.settings.state_dir / "logs"

    def look_at_gpus(self) -> None:
        """Ask for a fresh look at the GPUs; it comes within milliseconds, from its own thread."""
        now = time.monotonic()
        if now - self.look_asked_at >= LOOK_EVERY_S:
            self.look_asked_at = now
            self.look_wanted.set()
            self.poke()

    def failed(self, model_id: str, code: str, message: str) -> None:
        """Remember a failed load, for the back-off."""
        before = self.failures.get(model_id)
        times = before.times + 1 if before else 1
        self.failures[model_id] = Failure(code=code, message=message, at=time.time(), times=times)

    def forget_failure(self, model_id: str, before: Failure | None) -> None:
        """Take the last failure of a model back; `before` is the one before it."""
        if before is None:
            self.failures.pop(model_id, None)
        else:
            self.failures[model_id] = before
