"""How many requests of an API key are open, over all workers of one master (`max_in_flight`).

The figures lie in memory shared since before the fork: a column for each key, in it a figure for
each worker. A lock on that memory's file, which ends with its holder, is held to take a permit. So
no race takes one too many, and what a killed worker held comes back: its figures count no more.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from smartproxy.config.keys import KeySettings
from smartproxy.errors import RateLimitExceeded, SmartProxyError
from smartproxy.lifetime import same_process, start_ticks

#: workers that live at the same time, those that still stop too
ROWS = 128
#: different keys with `max_in_flight` since the master's start; what is not used takes no memory
COLUMNS = 16_384
WORD_BYTES = 8


class Board:
    """The shared figures. Made before the fork; used in each worker's loop thread."""

    def __init__(self) -> None:
        self._file = os.memfd_create("smartproxy-permits")
        size = (2 * ROWS + COLUMNS + COLUMNS * ROWS) * WORD_BYTES
        os.truncate(self._file, size)
        words = memoryview(mmap.mmap(self._file, size)).cast("Q")
        self._pids, self._ticks = words[:ROWS], words[ROWS : 2 * ROWS]
        #: of each column, a digest of its key's name; 0: free
        self._names = words[2 * ROWS : 2 * ROWS + COLUMNS]
        self._counts = words[2 * ROWS + COLUMNS :]
        self._columns: dict[str, int] = {}
        self._row, self._row_of_pid = 0, 0

    def take(self, name: str, limit: int) -> int | None:
        """Count one more for a key; returns where, for `give_back`, or None: none is left."""
        with self._locked():
            row, column = self._own_row(), self._column(name)
            counts = self._counts[column * ROWS : (column + 1) * ROWS]
            if sum(counts) >= limit:
                self._forget_the_dead(counts)
                if sum(counts) >= limit:
                    return None
            counts[row] += 1
            return column * ROWS + row

    def give_back(self, place: int) -> None:
        """Count one less. No lock is needed: nobody else writes a living worker's figures."""
        self._counts[place] -= 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _own_row(self) -> int:
        """Return this process's row; with its first request it takes a free one or a dead one's."""
        pid = os.getpid()
        if self._row_of_pid == pid:
            return self._row
        for row in range(ROWS):
            if self._alive(row):
                continue
            for column in range(COLUMNS):
                if not self._names[column]:
                    break
                self._counts[column * ROWS + row] = 0
            self._pids[row], self._ticks[row] = pid, start_ticks(pid) or 0
            self._row, self._row_of_pid = row, pid
            return row
        raise SmartProxyError(f"more than {ROWS} workers count requests of keys")

    def _column(self, name: str) -> int:
        known = self._columns.get(name)
        if known is not None:
            return known
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=WORD_BYTES).digest())
        for column in range(COLUMNS):
            if self._names[column] in (0, digest):
                self._names[column] = digest
                self._columns[name] = column
                return column
        raise SmartProxyError(
            f"more than {COLUMNS} keys had max_in_flight since the start: start the proxy anew"
        )

    def _forget_the_dead(self, counts: memoryview[int]) -> None:
        for row in range(ROWS):
            if counts[row] and not self._alive(row):
                counts[row] = 0

    def _alive(self, row: int) -> bool:
        return self._pids[row] != 0 and same_process(self._pids[row], self._ticks[row])


_board = Board()  # the master's import makes it


class KeyPermit:
    """One request of a key that has `max_in_flight`. Loop thread only."""

    __slots__ = ("_board", "_limit", "_name", "_place")

    def __init__(self, name: str, limit: int, board: Board = _board) -> None:
        self._name, self._limit, self._board = name, limit, board
        self._place: int | None = None

    def take(self) -> None:
        """Begin. Raises RateLimitExceeded where as many are open as may be."""
        self._place = self._board.take(self._name, self._limit)
        if self._place is None:
            raise RateLimitExceeded(
                f'the API key "{self._name}" has {self._limit} requests open, and no more may be'
                " (max_in_flight): try again when one of them has ended"
            )

    def give_back(self) -> None:
        """End; without having begun, nothing happens."""
        if self._place is not None:
            self._board.give_back(self._place)
            self._place = None


def permit_of(key: KeySettings | None) -> KeyPermit | None:
    """Return what a request of this key has to take; None: nothing."""
    if key is None or key.max_in_flight is None:
        return None
    return KeyPermit(key.name or "", key.max_in_flight)
