"""The processes of our servers, by the server's id, and which of them a thread is at work on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from smartproxy.errors import ShuttingDown
from smartproxy.llama.process import Child

#: how long a server is left alone whose thread ended with an error: what failed would fail at once
#: again, as a write to a full disk does
REST_S = 0.5


class Children:
    """Threads that start and stop servers change it while the main loop goes through it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: written under the lock, by add and take
        self._by_server: dict[int, Child] = {}
        #: threads that carry a server from state to state; written under the lock, by begin and end
        self._carried: Counter[int] = Counter()
        #: monotonic seconds at which a thread ended with an error; written under the lock, by end
        self._failed_at: dict[int, float] = {}
        #: processes that are being started; written under the lock, by spawning
        self._spawning = 0
        #: no process is started any more; written under the lock, by close
        self._closed = False

    def begin(self, server_id: int) -> None:
        """Say that a thread is about to carry a server on. Before the thread is started."""
        with self._lock:
            self._carried[server_id] += 1

    def end(self, server_id: int, *, failed: bool = False) -> None:
        """Say that a thread is done with a server. failed: it ended with an error."""
        with self._lock:
            self._carried[server_id] -= 1
            if not self._carried[server_id]:
                del self._carried[server_id]
            if failed:
                self._failed_at[server_id] = time.monotonic()
            else:
                self._failed_at.pop(server_id, None)

    def is_carried(self, server_id: int) -> bool:
        """Return whether a thread carries a server on, or one failed to a moment ago."""
        with self._lock:
            failed_at = self._failed_at.get(server_id)
            rests = failed_at is not None and time.monotonic() - failed_at < REST_S
            return rests or server_id in self._carried

    @contextmanager
    def spawning(self) -> Iterator[None]:
        """Hold this while a process is started and added. Raises ShuttingDown once closed."""
        with self._lock:
            if self._closed:
                raise ShuttingDown("the proxy is being stopped")
            self._spawning += 1
        try:
            yield
        finally:
            with self._lock:
                self._spawning -= 1

    def close(self) -> None:
        """Let no process start from now on: a full stop has begun."""
        with self._lock:
            self._closed = True

    def is_closed(self) -> bool:
        """Return whether a full stop has begun."""
        with self._lock:
            return self._closed

    def are_left(self) -> bool:
        """Return whether there is any process, or one is being started."""
        with self._lock:
            return bool(self._by_server or self._spawning)

    def add(self, server_id: int, child: Child) -> None:
        """Remember the process of a server, in place of an earlier one."""
        with self._lock:
            self._by_server[server_id] = child

    def take(self, server_id: int) -> Child | None:
        """Forget the process of a server and return it; None if there is none."""
        with self._lock:
            self._failed_at.pop(server_id, None)
            return self._by_server.pop(server_id, None)

    def get(self, server_id: int) -> Child | None:
        """Return the process of a server; None if there is none."""
        with self._lock:
            return self._by_server.get(server_id)

    def snapshot(self) -> dict[int, Child]:
        """Return all of them as of now."""
        with self._lock:
            return dict(self._by_server)

    def pids(self) -> frozenset[int]:
        """Return the process ids of all of them as of now."""
        with self._lock:
            return frozenset(child.pid for child in self._by_server.values())
