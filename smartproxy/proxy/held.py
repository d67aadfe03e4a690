"""What this worker holds: requests in flight on each server, and the leases that say so to others.

A lease is written when a server goes from idle to busy, and given back when it is idle for a
moment. While it stands in the file, the manager does not end the server. Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from smartproxy.errors import StateError
from smartproxy.log import Outage
from smartproxy.proxy.writer import Writer
from smartproxy.state import leases
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)

#: how long an idle server's lease is kept before it is given back: sequential requests of one
#: client then cost no writes, and an eviction waits at most this long for it
LINGER_S = 0.05
#: a request to a ready server waits so long for its lease to be written, and goes on without
LEASE_PATIENCE_S = 0.5


class Held:
    """Counts a worker's requests, and keeps their leases in the state file."""

    def __init__(self, store: Store, worker: str, writer: Writer) -> None:
        """worker: its name in the state file."""
        self._store = store
        self._worker = worker
        self._writer = writer
        self._in_flight: Counter[int] = Counter()
        #: servers with a lease of ours in the file; a task while it is being written
        self._leases: dict[int, asyncio.Task[bool]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._not_leased = Outage(
            logger, what="leases can't be written", over="leases are written again", after_s=0
        )
        # told at once: leases that are not renewed expire
        self._not_renewed = Outage(
            logger, what="leases are not renewed", over="leases are renewed again", after_s=0
        )

    @property
    def leases(self) -> dict[int, asyncio.Task[bool]]:
        """The leases by the server's id, those that are being written too."""
        return self._leases

    async def take(self, server_id: int) -> bool:
        """Count a request on a server, writing the lease if there is none yet."""
        self._in_flight[server_id] += 1
        writing = self._leases.get(server_id)
        if writing is None:
            writing = asyncio.create_task(self._write_lease(server_id))
            self._leases[server_id] = writing
            self.keep_renewing()
        taken = False
        try:
            async with asyncio.timeout(LEASE_PATIENCE_S):
                taken = await asyncio.shield(writing)
        except TimeoutError:
            # as where it can't be written; it is given back once it is, or forgotten
            taken = True
            writing.add_done_callback(lambda _: self._forget(server_id, writing))
        finally:
            if not taken:
                self._in_flight[server_id] -= 1
                # a lease that was written is given back, also when its client goes right then:
                # forgotten here it would stay in the file, renewed for ever (F1)
                self._forget(server_id, writing)
                if self._in_flight[server_id] == 0:
                    self._give_back(server_id, self._store.now())
        return taken

    def _forget(self, server_id: int, writing: asyncio.Task[bool]) -> None:
        """Have the next request on a server write a lease, where this one came to nothing."""
        if _came_to_nothing(writing) and self._leases.get(server_id) is writing:
            del self._leases[server_id]

    async def _write_lease(self, server_id: int) -> bool:
        """Return whether the server can be used: it is ready, or the file can't say otherwise."""
        try:
            taken = await self._writer.write(
                lambda: leases.take_lease(
                    self._store, self._worker, server_id, now=self._store.now()
                )
            )
        except StateError as error:
            # a server that is ready answers without a lease; before its end its slots are asked too
            self._not_leased.failed(error, time.monotonic())
            return True
        self._not_leased.worked(time.monotonic())
        return taken

    def _give_back(self, server_id: int, used_at: float) -> None:
        writing = self._leases.get(server_id)
        if self._in_flight[server_id] or writing is None:
            return
        if not writing.done():  # asked and gone before the lease was even written
            writing.add_done_callback(lambda _: self._give_back(server_id, used_at))
            return
        del self._leases[server_id]
        del self._in_flight[server_id]
        # the writer is one thread: a new lease on this server can only be written after this
        self._writer.in_the_end(
            lambda: leases.release_lease(
                self._store, self._worker, server_id, last_used_at=used_at
            ),
            needed=lambda: server_id not in self._leases,
        )

    def release(self, server_id: int) -> None:
        """Count one request less on a server; its lease goes when none follows in a moment."""
        self._in_flight[server_id] -= 1
        if self._in_flight[server_id] == 0:
            used_at = self._store.now()
            asyncio.get_running_loop().call_later(LINGER_S, self._give_back, server_id, used_at)

    def keep_renewing(self) -> None:
        """Have this worker's leases and demands renewed from now on."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Renew leases and demands while there are any."""
        while True:
            await asyncio.sleep(leases.RENEW_S)
            try:
                await self._writer.write(
                    lambda: leases.renew(self._store, self._worker, now=self._store.now())
                )
                self._not_renewed.worked(time.monotonic())
            except StateError as error:
                self._not_renewed.failed(error, time.monotonic())


def _came_to_nothing(writing: asyncio.Task[bool]) -> bool:
    """Return whether a lease was asked for and there is none now."""
    if not writing.done():
        return False
    return writing.cancelled() or writing.exception() is not None or not writing.result()
