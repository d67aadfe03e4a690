"""Open state.db, read from it, write to it: one connection per thread and process.

WAL: readers never wait for the writer. Writers take the lock at once (BEGIN IMMEDIATE), because a
read transaction that turns into a write may fail with SQLITE_BUSY whatever the timeout.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from smartproxy.state.schema import migrations

logger = logging.getLogger(__name__)

#: seconds a writer waits for another; writes take well under a millisecond each
BUSY_TIMEOUT_S = 10.0
#: pages after which a writer moves the WAL back into the file (4 MB)
WAL_PAGES = 1000

Row = sqlite3.Row


class Store:
    """The state file. Safe to share between threads and to carry over a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Return all rows of one SELECT."""
        return self.connection().execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        """Return the first row of one SELECT, or None."""
        row: Row | None = self.connection().execute(sql, values).fetchone()
        return row

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock for one short transaction; rolled back if the block raises.

        Never spawn, probe over HTTP or call NVML inside: everybody else waits meanwhile.
        """
        connection = self.connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

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

    def moved(self) -> bool:
        """Return whether the file that this thread has open is no longer the one at its path."""
        self.connection()
        return bool(self._identity() != self._local.identity)

    def _open(self) -> None:
        local = self._local
        local.identity = self._identity()
        local.connection = _connect(self.path)
        local.pid = os.getpid()

    def _identity(self) -> tuple[int, int] | None:
        """Return which file is at the path; None when there is none."""
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino


def create(path: Path) -> tuple[Store, str | None]:
    """Open the state file, making or migrating it; only the manager calls this.

    Returns the store, and a sentence for the log when an unreadable file was set aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    complaint = None
    try:
        _prepare(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise
        aside = _set_aside(path)
        complaint = f"state file {path} can't be used ({error}): set aside as {aside}, made anew"
        _prepare(path)
    return Store(path), complaint


def _prepare(path: Path) -> None:
    # owner only from the first byte on, whatever the umask
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    os.chmod(path, 0o600)
    connection = _connect(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        broken = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if broken != "ok":
            raise sqlite3.DatabaseError(broken)
        migrations.apply(Database(connection))
        # a file of ours from another age, or somebody else's: not usable
        connection.execute("SELECT generation FROM manager WHERE id = 1").fetchone()[0]
    finally:
        connection.close()


def _set_aside(path: Path) -> str:
    aside = path.with_name(f"{path.name}.unreadable-{int(time.time())}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside.name


def _connect(path: Path) -> sqlite3.Connection:
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
    connection.execute("PRAGMA journal_size_limit = 16777216")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection
