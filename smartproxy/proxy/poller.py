"""Readiness of many sockets, told straight to who waits for it.

An epoll set of its own, which hangs in the asyncio loop as one descriptor: asyncio's readers cost a
handle, a context and a queue per event, and a registration several times an epoll call. At one
event per token that is what a stream costs (docs/datapath.md).
"""

from __future__ import annotations

import asyncio
import select
from typing import Protocol

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
#: events taken at a time, so that timers and new requests get their turn in between
BATCH = 128


class Pollable(Protocol):
    """Who owns a registered socket. Told in the loop; may be told once too often."""

    def readable(self) -> None:
        """There is something to read, or the end, or an error."""

    def writable(self) -> None:
        """There is room to write, or an error."""


class Poller:
    """The sockets of one loop."""

    __slots__ = ("_epoll", "_owners")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._owners: dict[int, Pollable] = {}
        loop.add_reader(self._epoll.fileno(), self._dispatch)

    def watch(self, fd: int, owner: Pollable, before: int, wanted: int) -> None:
        """Change what a socket is watched for, from `before` to `wanted` (READ | WRITE, or 0)."""
        if not wanted:
            del self._owners[fd]
            self._epoll.unregister(fd)
        elif before:
            self._epoll.modify(fd, wanted)
        else:
            self._owners[fd] = owner
            self._epoll.register(fd, wanted)

    def _dispatch(self) -> None:
        owners = self._owners
        for fd, events in self._epoll.poll(0, BATCH):
            owner = owners.get(fd)
            if owner is None:  # closed by who was told before it
                continue
            if events & ~WRITE:
                owner.readable()
                if events & WRITE and owners.get(fd) is owner:
                    owner.writable()
            else:
                owner.writable()


class PollingLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that has a Poller."""

    def __init__(self) -> None:
        super().__init__()
        self.poller = Poller(self)


def running_loop() -> PollingLoop:
    """Return the running loop, which is one of the relay's."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, PollingLoop)
    return loop
