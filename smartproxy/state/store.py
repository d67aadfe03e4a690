"""Read from state.db, write to it: one connection per thread and process. `prepare` makes it.

WAL: readers never wait for the writer. Writers take the lock at once (BEGIN IMMEDIATE), because a
read transaction that turns into a write may fail with SQLITE_BUSY whatever the timeout.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smartproxy.errors import StateError, StateRefused

#: seconds a writer waits for another; writes take well under a millisecond each
BUSY_TIMEOUT_S = 10.0
#: pages after which a writer moves the WAL back into the file (4 MB)
WAL_PAGES = 1000
#: SQLite begins the WAL anew only while nobody reads from it, which under load may be never; past
#: this a writer waits for the readers
WAL_LIMIT_BYTES = 8 << 20
#: seconds it waits; reads take microseconds, and who holds one open for long is not worth more
TRIM_TIMEOUT_S = 0.1
#: after a try that failed, this many times as long as it took passes before the next
TRIM_REST = 10

Row = sqlite3.Row


@contextmanager
def our_errors() -> Iterator[None]:
    """Raise StateError for SQLite's errors; StateRefused where a rule of the file was broken."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise StateRefused(str(error)) from error
    except sqlite3.Error as error:
        raise StateError(str(error)) from error


class Store:
    """The state file. Safe to share between threads and to carry over a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._log_path = path.with_name(path.name + "-wal")
        self._trim_not_before = 0.0

    @our_errors()
    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Return all rows of one SELECT. Raises StateError, as all of the store's methods do."""
        return self.connection().execute(sql, values).fetchall()

    @our_errors()
    def one(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        """Return the first row of one SELECT, or None."""
        row: Row | None = self.connection().execute(sql, values).fetchone()
        return row

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock for one short transaction; rolled back if the block raises.

        Never spawn, probe over HTTP or call NVML inside: everybody else waits meanwhile.
        """
        with our_errors():
            connection = self.connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
            self._bound_log(connection)

    def _bound_log(self, connection: sqlite3.Connection) -> None:
        try:
            size = self._log_path.stat().st_size
        except FileNotFoundError:
            return
        began = time.monotonic()
        if size < WAL_LIMIT_BYTES or began < self._trim_not_before:
            return
        connection.execute(f"PRAGMA busy_timeout = {TRIM_TIMEOUT_S * 1000:.0f}")
        # fails at once while another process moves pages, which SQLite lets nobody wait for
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}")
        now = time.monotonic()
        self._trim_not_before = now + (now - began) * TRIM_REST

    @our_errors()
    def data_version(self) -> int:
        """Return a number that moves when another connection has written. Costs microseconds."""
        version: int = self.connection().execute("PRAGMA data_version").fetchone()[0]
        return version

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection, opened on first use, after a fork, and again when a
        manager has made the file anew."""
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            # the parent's connection must not be used, nor closed, in a forked child
            self._open()
        elif (now := self._identity()) is not None and now != local.identity:
            self.close()
            self._open()
        connection: sqlite3.Connection = local.connection
        return connection

    def close(self) -> None:
        """Close this thread's connection; the next use opens one anew."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.connection.close()
            self._local.pid = None

    @our_errors()
    def moved(self) -> bool:
        """Return whether the file that this thread has open is no longer the one at its path."""
        self.connection()
        return bool(self._identity() != self._local.identity)

    def _open(self) -> None:
        local = self._local
        local.identity = self._identity()
        local.connection = connect(self.path)
        local.pid = os.getpid()

    def _identity(self) -> tuple[int, int] | None:
        """Return which file is at the path; None when there is none."""
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino


def connect(path: Path) -> sqlite3.Connection:
    """Open the state file; it must be there."""
    # mode=rw: a worker that is early must not make an empty file
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.row_factory = sqlite3.Row
    # survives a crash of any process; a power cut may lose the last commits, which are rebuilt
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection
