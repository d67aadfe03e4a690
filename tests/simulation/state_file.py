"""Real SQLite, in memory, whose writes give way to others and fail as the seed says.

All connections of a seed share one database of SQLite's own `memdb`: as a file, but without system
calls, which would take most of the time. It has no WAL, and needs none: transactions are whole.
"""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, Any

from tests.simulation.scheduler import Gone, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: how a write fails: another holds the lock too long, the disk is full at once or at the end
KINDS = ("locked", "full", "full at commit")


class Weather:
    """How the state file does at the moment."""

    def __init__(self, scheduler: Scheduler, template: sqlite3.Connection) -> None:
        self.scheduler = scheduler
        self.address = f"file:/state-{scheduler.seed}?vfs=memdb"
        #: keeps the database for as long as the seed lasts
        self.keeper = sqlite3.connect(self.address, uri=True)
        template.backup(self.keeper)
        self.stat = os.stat(".")
        #: share of writes that fail
        self.failing_share = 0.0
        #: writes that still succeed before one fails; None: none fails for that reason
        self.until_failure: int | None = None
        self.kinds: Sequence[str] = KINDS
        #: seconds that a write waits for a lock that it does not get
        self.lock_wait_s = 10.0
        #: called after a transaction that changed servers or assignments
        self.committed: Callable[[sqlite3.Connection], None] = lambda _: None

    def clear(self) -> None:
        self.failing_share, self.until_failure = 0.0, None

    def fate(self) -> str | None:
        """Return how the next write fails, None: not at all."""
        fails = self.scheduler.chance(self.failing_share)
        if self.until_failure is not None:
            self.until_failure -= 1
            if self.until_failure < 0:
                self.until_failure, fails = None, True
        return self.scheduler.random.choice(self.kinds) if fails else None


#: the weather of the seed that runs
_weather: Weather | None = None


def set_weather(weather: Weather | None) -> None:
    global _weather
    _weather = weather


class Connection(sqlite3.Connection):
    """A real connection. Transactions are whole; before and after one the seed chooses."""

    _fate: str | None = None
    _servers_changed = False

    def execute(self, sql: str, values: Any = (), /) -> sqlite3.Cursor:
        weather = _weather
        if weather is None:
            return super().execute(sql, values)
        word = sql[:6]
        if word == "SELECT":
            weather.scheduler.maybe_pause(0.0 if self.in_transaction else 0.1)
        elif word == "BEGIN ":
            self._begin(weather)
        elif word == "COMMIT":
            return self._commit(weather, sql)
        elif word in ("INSERT", "UPDATE", "DELETE"):
            if self._fate == "full":
                self._fate = None
                weather.scheduler.note("a write fails: disk full")
                raise sqlite3.OperationalError("database or disk is full")
            self._servers_changed = self._servers_changed or " servers" in sql[:30]
        return super().execute(sql, values)

    def _begin(self, weather: Weather) -> None:
        scheduler = weather.scheduler
        scheduler.pause()
        self._fate = weather.fate()
        if self._fate == "locked":
            self._fate = None
            scheduler.note("a write fails: locked for %g s", weather.lock_wait_s)
            scheduler.sleep(weather.lock_wait_s)
            raise sqlite3.OperationalError("database is locked")

    def _commit(self, weather: Weather, sql: str) -> sqlite3.Cursor:
        if self._fate is not None:
            self._fate = None
            # SQLite rolls back by itself what it could not commit
            super().execute("ROLLBACK")
            weather.scheduler.note("a write fails: disk full at commit")
            raise sqlite3.OperationalError("database or disk is full")
        done = super().execute(sql)
        weather.scheduler.current.process.commits += 1
        if self._servers_changed:
            self._servers_changed = False
            weather.committed(self)
        weather.scheduler.maybe_pause(0.5)
        return done


class Sqlite:
    """The module sqlite3 as the store sees it: its connections are those above."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)

    @staticmethod
    def connect(path: str, **how: Any) -> sqlite3.Connection:
        if _weather is not None:
            path = _weather.address
        return sqlite3.connect(path, **how, factory=Connection)


class Os:
    """The module os as the store sees it: the state file never moves."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def stat(path: Any) -> Any:
        return os.stat(path) if _weather is None else _weather.stat


class TaskLocal:
    """In the place of threading.local: values by process, and of a worker by loop and writer."""

    def __init__(self) -> None:
        object.__setattr__(self, "_values", {})

    def _mine(self) -> dict[str, Any]:
        if _weather is None:
            name = "outside"
        else:
            task = _weather.scheduler.current
            name = f"{task.process.name} {task.name if 'loop' in task.name else ''}"
        values: dict[str, Any] = object.__getattribute__(self, "_values").setdefault(name, {})
        return values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._mine()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._mine()[name] = value


__all__ = ["Connection", "Gone", "Os", "Sqlite", "TaskLocal", "Weather", "set_weather"]
