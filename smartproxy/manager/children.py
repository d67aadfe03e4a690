"""The processes of our servers, by the server's id, and which of them a thread is at work on."""

from __future__ import annotations

import threading
from collections import Counter

from smartproxy.llama.process import Child


class Children:
    """Threads that start and stop servers change it while the main loop goes through it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: written under the lock, by add and take
        self._by_server: dict[int, Child] = {}
        #: threads that carry a server from state to state; written under the lock, by begin and end
        self._carried: Counter[int] = Counter()

    def begin(self, server_id: int) -> None:
        """Say that a thread is about to carry a server on. Before the thread is started."""
        with self._lock:
            self._carried[server_id] += 1

    def end(self, server_id: int) -> None:
        """Say that a thread is done with a server, however that went."""
        with self._lock:
            self._carried[server_id] -= 1
            if not self._carried[server_id]:
                del self._carried[server_id]

    def is_carried(self, server_id: int) -> bool:
        """Return whether a thread carries a server on."""
        with self._lock:
            return server_id in self._carried

    def add(self, server_id: int, child: Child) -> None:
        """Remember the process of a server, in place of an earlier one."""
        with self._lock:
            self._by_server[server_id] = child

    def take(self, server_id: int) -> Child | None:
        """Forget the process of a server and return it; None if there is none."""
        with self._lock:
            return self._by_server.pop(server_id, None)

    def get(self, server_id: int) -> Child | None:
        """Return the process of a server; None if there is none."""
        with self._lock:
            return self._by_server.get(server_id)

    def snapshot(self) -> dict[int, Child]:
        """Return all of them as of now."""
        with self._lock:
            return dict(self._by_server)
