"""Faults that were mended, as they were: the simulation must find each of them again.

Each is the code of before the mend, put in the place of today's for as long as it lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from smartproxy.manager import tick
from smartproxy.proxy.held import Held
from smartproxy.proxy.writer import Writer


async def _take_that_forgets(self: Held, server_id: int) -> bool:
    """F1: a client that leaves as its lease is written has the worker forget the lease."""
    self._in_flight[server_id] += 1
    writing = self._leases.get(server_id)
    if writing is None:
        writing = asyncio.create_task(self._write_lease(server_id))
        self._leases[server_id] = writing
        self.keep_renewing()
    taken = False
    try:
        taken = await asyncio.shield(writing)
    finally:
        if not taken:
            self._in_flight[server_id] -= 1
            if writing.done() and self._leases.get(server_id) is writing:
                del self._leases[server_id]
            elif self._in_flight[server_id] == 0:
                self._give_back(server_id, self._store.now())
    return taken


def _carry_nothing_on(_loading: object) -> None:
    """F2: nobody looks after a row whose thread ended with an error."""


def _write_once(self: Writer, work: Callable[[], None], needed: Callable[[], bool]) -> None:
    """F27: a lease or a demand whose giving back fails once stays for ever."""
    self.submit(work)


#: by the name of the fault: whose attribute, its name, what it was
OLD: dict[str, tuple[Any, str, Any]] = {
    "F1": (Held, "take", _take_that_forgets),
    "F2": (tick, "carry_on", _carry_nothing_on),
    "F27": (Writer, "in_the_end", _write_once),
}


@contextmanager
def unmended(name: str) -> Iterator[None]:
    """Take a mend out."""
    owner, attribute, old = OLD[name]
    mended = getattr(owner, attribute)
    setattr(owner, attribute, old)
    try:
        yield
    finally:
        setattr(owner, attribute, mended)
