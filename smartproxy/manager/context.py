"""What the whole manager works with. What changes has an owner beside its writers:

children.py, failures.py, gpu_watch.py (GpuView), lingering.py, shortage.py, use.py. Everything that
must outlive the manager is in the state file.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast

from smartproxy.catalog.catalog import Catalog
from smartproxy.catalog.live import Live
from smartproxy.config.settings import Settings
from smartproxy.errors import LoadFailed, SmartProxyError
from smartproxy.llama.binary import Binary
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)

#: seconds after which who waits for a file is told that it can't be read
READ_DEADLINE_S = 30.0
#: seconds that what was read is believed without a look; a pass asks several times
FRESH_S = 0.05
#: and where it is asked for all the time, which `OFTEN_S` between two times is
STALE_S, OFTEN_S = 10.0, 0.25
#: threads, those included that hang
MOST_READERS = 16


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


class NotYet(Exception):
    """It is being read from disk; the main loop is woken when it is there."""


T = TypeVar("T")


@dataclass(slots=True)
class _Reading(Generic[T]):
    """One thing that is read, or was. Monotonic seconds."""

    of: object
    began_at: float
    #: a try is
    under_way: bool = False
    #: None: no try has ended yet
    ended_at: float | None = None
    value: T | None = None
    error: SmartProxyError | None = None
    asked_at: float = 0.0


class Ahead(Generic[T]):
    """What the main loop wants to know of files, read in threads of its own.

    A file system may hang for ever, and a header may take its time; the main loop waits for
    neither. Any thread may use it.
    """

    def __init__(self, poke: Callable[[], None], *, deadline_s: float = READ_DEADLINE_S) -> None:
        self._poke = poke
        self._deadline_s = deadline_s
        self._lock = threading.Condition()
        #: by what it is of; written under the lock
        self._readings: dict[str, _Reading[T]] = {}
        #: threads that read, or hang; written under the lock
        self._readers = 0

    def get(self, name: str, of: object, read: Callable[[], T]) -> T:
        """Return what `read` says, or raise its SmartProxyError. Never blocks.

        of: what it depends on; another one is read anew. Raises NotYet while it is being read, and
        LoadFailed once that has taken too long. Who asks all the time gets what was read last,
        while it is read again beside. An error is raised once: who asks again may have mended the
        file.
        """
        now = time.monotonic()
        with self._lock:
            reading = self._readings.get(name)
            if reading is None or reading.of is not of:
                reading = self._readings[name] = _Reading(of, now)
            often = now - reading.asked_at < OFTEN_S
            reading.asked_at = now
            age_s = math.inf if reading.ended_at is None else now - reading.ended_at
            if reading.error is not None:
                del self._readings[name]
                if often or age_s <= FRESH_S:
                    raise reading.error
                reading, age_s = _Reading(of, now, asked_at=now), math.inf
                self._readings[name] = reading
            if age_s > FRESH_S and not reading.under_way:
                self._begin(name, reading, read)
            if age_s > (STALE_S if often else FRESH_S):
                self._raise_late(name, reading, now)
            return cast("T", reading.value)  # a try has ended, and without an error

    def wait(self, name: str, of: object, read: Callable[[], T], *, within_s: float) -> T:
        """Do the same, and block until it is there: at most so many seconds."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                return self.get(name, of, read)
            except NotYet:
                with self._lock:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        raise LoadFailed(_late(name, within_s)) from None
                    self._lock.wait(min(left_s, OFTEN_S / 2))

    def _raise_late(self, name: str, reading: _Reading[T], now: float) -> NoReturn:
        if now - reading.began_at > self._deadline_s:
            raise LoadFailed(_late(name, self._deadline_s))
        raise NotYet

    def _begin(self, name: str, reading: _Reading[T], read: Callable[[], T]) -> None:
        """Start a reader; where too many hang already, the next pass tries again."""
        if reading.ended_at is not None:
            reading.began_at = time.monotonic()
        if self._readers >= MOST_READERS:
            return
        reader = threading.Thread(
            target=self._read, args=(reading, read), name=f"reads {name}", daemon=True
        )
        try:
            reader.start()  # what it reads it says under the lock, which we hold
        except RuntimeError as error:
            logger.warning("no thread can be started to read model '%s': %s", name, error)
            return
        self._readers += 1
        reading.under_way = True

    def _read(self, reading: _Reading[T], read: Callable[[], T]) -> None:
        value, error = None, None
        try:
            value = read()
        except SmartProxyError as known:
            error = known
        except Exception as unknown:  # it is told to whoever asks
            logger.exception("reading failed")
            error = LoadFailed(f"{type(unknown).__name__}: {unknown}")
        with self._lock:
            self._readers -= 1
            reading.value, reading.error = value, error
            reading.under_way, reading.ended_at = False, time.monotonic()
            self._lock.notify_all()
        self._poke()


def _late(name: str, within_s: float) -> str:
    return (
        f"model '{name}': its files could not be read within {within_s:g} s;"
        " does their file system answer?"
    )
