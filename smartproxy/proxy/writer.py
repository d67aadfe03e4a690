"""The one thread of a worker that writes to the state file, so that its loop never waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from smartproxy.errors import StateError
from smartproxy.log import Outage

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: how soon it is tried again to give back a lease or a demand
WRITE_AGAIN_S = 0.5


class Writer:
    """Writes in the order that it is told to. Loop thread only."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        #: what is still to be written, so that it is not collected before
        self._unwritten: set[asyncio.Task[None]] = set()
        self._not_given_back = Outage(
            logger, what="leases can't be given back", over="leases are given back", after_s=0
        )

    @property
    def unwritten(self) -> int:
        """How many writes of `in_the_end` are still to succeed."""
        return len(self._unwritten)

    def submit(self, work: Callable[[], None]) -> None:
        """Have something done in the thread, whatever comes of it."""
        self._thread.submit(work)

    async def write(self, work: Callable[[], T]) -> T:
        """Run a write in the one thread that writes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def in_the_end(self, work: Callable[[], None], needed: Callable[[], bool]) -> None:
        """Have something written, again and again while that fails and is needed. Never blocks.

        A row that stays would be renewed for ever, and its server, or another model, would wait.
        """
        first = asyncio.wrap_future(self._thread.submit(work))
        task = asyncio.create_task(self._until_written(first, work, needed))
        self._unwritten.add(task)
        task.add_done_callback(self._unwritten.discard)

    async def _until_written(
        self,
        written: asyncio.Future[None],
        work: Callable[[], None],
        needed: Callable[[], bool],
    ) -> None:
        while True:
            try:
                await written
            except StateError as error:
                self._not_given_back.failed(error, time.monotonic())
            else:
                self._not_given_back.worked(time.monotonic())
                return
            await asyncio.sleep(WRITE_AGAIN_S)
            if not needed():
                return
            written = asyncio.wrap_future(self._thread.submit(work))
