"""Read from state.db, write to it: one connection per thread and process. `migrate` makes it.

WAL: readers never wait for the writer. Writers take the lock at once (BEGIN IMMEDIATE), because a
read transaction that turns into a write may fail with SQLITE_BUSY whatever the timeout.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smartproxy.errors import StateDamaged, StateError, StateRefused
from smartproxy.state import clock

#: seconds a writer waits for another; writes take well under a millisecond each
BUSY_TIMEOUT_S = 10.0
#: pages after which a writer moves the WAL back into the file (4 MB)
WAL_PAGES = 1000
#: SQLite begins the WAL anew only while nobody reads from it, which under load may be never; past
#: this a writer waits for the readers
WAL_LIMIT_BYTES = 8 << 20
#: KiB of the file that each connection keeps: every thread has one, and SQLite's 2000 for each adds
#: up to more than the manager itself takes (the kernel keeps the file in memory anyway)
CACHE_KIB = 256
#: seconds it waits; reads take microseconds, and who holds one open for long is not worth more
TRIM_TIMEOUT_S = 0.1
#: after a try that failed, this many times as long as it took passes before the next
TRIM_REST = 10

#: what SQLite says of a file that it did not write
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
#: and of one that another process is at
LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

Row = sqlite3.Row


class Owned:
    """One thread's connection. It is closed when the thread ends, whose local values go then.

    Python alone does not close it: a connection and its cache of statements refer to each other,
    so that it stays open until the collector happens to come by.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        identity: tuple[int, int] | None,
        all_open: dict[sqlite3.Connection, int],
    ) -> None:
        self.connection = connection
        self.identity = identity
        self.pid = os.getpid()
        self._all_open = all_open
        all_open[connection] = self.pid

    def usable(self) -> bool:
        """Return whether this process opened it and nobody has closed it."""
        return self.pid == os.getpid() and self.connection in self._all_open

    def close(self) -> None:
        """Close it; once closed, nothing happens."""
        pid = self._all_open.pop(self.connection, None)
        if pid is not None:
            close_own(self.connection, pid)

    __del__ = close


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary code of an error; 0 of one that Python raised."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


@contextmanager
def our_errors() -> Iterator[None]:
    """Raise StateError for SQLite's errors; StateRefused where a rule of the file was broken."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise StateRefused(str(error)) from error
    except sqlite3.DatabaseError as error:
        kind = StateDamaged if code_of(error) in DAMAGED else StateError
        raise kind(str(error)) from error
    except sqlite3.Error as error:
        raise StateError(str(error)) from error


class Store:
    """The state file. Safe to share between threads and to carry over a fork.

    Fork before the first use all the same: SQLite in a child believes that it holds the locks of
    connections that were open, so that what it writes after the parent closed them is lost.

    Owns its connections: each is closed when its thread ends; the rest by `close_all`, or when the
    store or the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        #: by connection: the process that opened it. Threads change it without a lock: a dict's
        #: single steps are whole, and a lock that somebody held at a fork would never be free
        self._all_open: dict[sqlite3.Connection, int] = {}
        weakref.finalize(self, close_every, self._all_open)
        self._log_path = path.with_name(path.name + "-wal")
        self._trim_not_before = 0.0
        #: why the file must be made anew; written by whoever finds it damaged, never reset
        self.damage: str | None = None
        #: what the file adds to monotonic seconds; written when a thread opens the file
        self._offset_s: float | None = None

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            with our_errors():
                yield
        except StateDamaged as error:
            self.damage = str(error)
            raise

    def check(self) -> None:
        """Read the whole file anew, and set `damage` if it can't be SQLite's, or has no tables.

        Takes milliseconds, and no lock that anybody waits for. Raises StateError where it can't be
        told.
        """
        with self._our_errors(), contextlib.closing(connect(self.path)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found == "ok":
                found = _without_tables(connection)
        self.damage = found or self.damage

    def look_beside(self) -> None:
        """Set `damage` if the log or its index was removed while this process has it open.

        Whoever opens the state file then makes another, and sees half of what is there. Only for
        the manager: it ends when the state file is another, so none of an earlier one is open.
        """
        for suffix in ("-wal", "-shm"):
            gone = f"{self.path.resolve()}{suffix} (deleted)"
            for descriptor in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    if os.readlink(f"/proc/self/fd/{descriptor}") == gone:
                        self.damage = f"{self.path.name}{suffix} was removed while in use"

    def read(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Row]:
        """Return all rows of one SELECT. Raises StateError, as all of the store's methods do."""
        with self._our_errors():
            return self.connection().execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        """Return the first row of one SELECT, or None."""
        with self._our_errors():
            row: Row | None = self.connection().execute(sql, values).fetchone()
        return row

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock for one short transaction; rolled back if the block raises.

        Never spawn, probe over HTTP or call NVML inside: everybody else waits meanwhile.
        """
        with self._our_errors():
            connection = self.connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                _roll_back(connection)
                raise
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

    def data_version(self) -> int:
        """Return a number that moves when another connection has written. Costs microseconds."""
        with self._our_errors():
            version: int = self.connection().execute("PRAGMA data_version").fetchone()[0]
        return version

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection, opened on first use, after a fork, and again when a
        manager has made the file anew."""
        owned = self._owned()
        if owned is None:
            owned = self._open()
        elif (now := identity_of(self.path)) is not None and now != owned.identity:
            owned.close()
            owned = self._open()
        return owned.connection

    def now(self) -> float:
        """Return Unix seconds to write into rows and to compare rows with: see clock.py."""
        offset_s = self._offset_s
        if offset_s is None:
            with contextlib.suppress(StateError), our_errors():
                self._offset_s = offset_s = clock.offset_s(self.connection())
        # the manager has not made the file yet, so that there is nothing to compare with either
        return time.time() if offset_s is None else offset_s + time.monotonic()

    def close(self) -> None:
        """Close this thread's connection; the next use opens one anew."""
        owned = self._owned()
        if owned is not None:
            owned.close()

    def close_all(self) -> None:
        """Close the connections of all threads of this process.

        Only when none of them is being used; a later use opens one anew.
        """
        close_every(self._all_open)

    def moved(self) -> bool:
        """Return whether the file that this thread has open is no longer the one at its path."""
        with self._our_errors():
            self.connection()
        return bool(identity_of(self.path) != self._local.owned.identity)

    def _owned(self) -> Owned | None:
        owned: Owned | None = getattr(self._local, "owned", None)
        return owned if owned is not None and owned.usable() else None

    def _open(self) -> Owned:
        identity = identity_of(self.path)
        owned = Owned(connect(self.path), identity, self._all_open)
        self._local.owned = owned
        self._offset_s = clock.offset_s(owned.connection)
        return owned


def _without_tables(connection: sqlite3.Connection) -> str | None:
    """Return what is wrong with a file that is whole but empty; None: nothing."""
    try:
        connection.execute("SELECT generation FROM manager WHERE id = 1").fetchone()[0]
    except sqlite3.OperationalError as error:
        if code_of(error) != sqlite3.SQLITE_ERROR:
            raise
        return str(error)
    except TypeError:
        return "it has lost the manager's row"
    return None


def _roll_back(connection: sqlite3.Connection) -> None:
    """Leave a transaction; on a full disk SQLite has left it already."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return which file is at the path; None when there is none."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def close_every(all_open: dict[sqlite3.Connection, int]) -> None:
    """Close all connections there are, by the process that opened each."""
    for connection in list(all_open):
        pid = all_open.pop(connection, None)
        if pid is not None:  # else its thread was faster
            close_own(connection, pid)


def close_own(connection: sqlite3.Connection, pid: int) -> None:
    """Close a connection that process `pid` opened; in a forked child never let go of it.

    Closing the parent's there may move pages and delete the log under the parent. Python closes
    what nobody refers to, at the latest at its end, so one reference is left for ever.
    """
    if pid == os.getpid():
        connection.close()
    else:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


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
    try:
        # survives a crash of any process; a power cut may lose the last commits, which are rebuilt
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    except BaseException:
        connection.close()  # a file that is no state file
        raise
    return connection
