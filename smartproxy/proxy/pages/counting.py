"""A worker's count of the requests it answered, written to the state file about once a second.

Never per request: a write costs a lock that all processes share.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import Counter

from smartproxy.errors import StateError
from smartproxy.state import counts
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)

#: a worker that is killed takes with it what it counted since
WRITE_EVERY_S = 1.0
#: stands for the code of a client that left before one was sent (nginx's number)
CLIENT_LEFT = "499"


class RequestCounts:
    """One per worker process. `add` is cheap and may be called in any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._new: Counter[tuple[str, str]] = Counter()
        self._some = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, model_id: str, code: str) -> None:
        """Count a request; model_id is a configured one's, or "": clients make up no labels."""
        with self._lock:
            self._new[model_id, code] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="counts", daemon=True)
                self._thread.start()
                atexit.register(self._end)
        self._some.set()

    def settled(self, model_id: str, status: int | None) -> None:
        """Count a relayed request by the status that its client got (Job.on_settled)."""
        self.add(model_id, "nginx" if status is None else str(status or CLIENT_LEFT))

    def refused(self, status: int) -> None:
        """Count a request that no model was found for, or that was refused before."""
        self.add("", str(status))

    def write(self) -> None:
        """Write what was counted since the last time; kept for later when the file can't be."""
        with self._writing:
            with self._lock:
                new, self._new = self._new, Counter()
            if not new:
                return
            try:
                counts.add_requests(self._store, new)
            except StateError as error:
                logger.debug("request counts not written: %s", error)
                with self._lock:
                    self._new += new

    def _run(self) -> None:
        while True:
            self._some.wait()
            if self._ended.wait(WRITE_EVERY_S):
                return
            self._some.clear()
            self.write()

    def _end(self) -> None:
        self._ended.set()
        self.write()
