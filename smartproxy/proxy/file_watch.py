"""When the state file has moved: one look for all requests of a worker that wait for it."""

from __future__ import annotations

import asyncio
import contextlib

from smartproxy.errors import StateError
from smartproxy.state.store import Store

#: how often it is looked whether the file has moved, while somebody waits; a look costs 10 us
LOOK_EVERY_S = 0.002


class Moves:
    """Of one store, in one loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: a dict for its order: who waits longest is woken first
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._looking: asyncio.Task[None] | None = None
        self._seen = -1

    def version(self) -> int:
        """Return a number for what the file holds now; read it before what you look for.

        Raises StateError.
        """
        return self._store.data_version()

    async def after(self, version: int, *, within_s: float) -> None:
        """Return once the file holds something else than at `version`, or after a while."""
        if not self._waiters:
            self._seen = version
        elif version != self._seen:  # it moved while the caller was looking
            await asyncio.sleep(LOOK_EVERY_S)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            # not wait_for: Python 3.11's forgets a cancellation that comes with the result
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await waiter
        finally:
            self._waiters.pop(waiter, None)

    async def _look(self) -> None:
        """Wake everybody at every move, until nobody waits."""
        while self._waiters:
            try:
                version = self._store.data_version()
            except StateError:
                version = -1  # who wakes finds out
            if version != self._seen:
                self._seen = version
                for waiter in self._waiters:
                    if not waiter.done():
                        waiter.set_result(None)
            await asyncio.sleep(LOOK_EVERY_S)
