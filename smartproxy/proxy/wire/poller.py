"""Readiness of many sockets, told straight to who waits for it.

The selector of the relay's asyncio loop. Beside asyncio's own descriptors it has sockets whose
owners it calls itself: asyncio's readers cost a handle, a context and a queue for every event, and
a registration several times an epoll call. A stream is one event per token (docs/datapath.md).
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
from collections.abc import Mapping
from typing import Any, Protocol

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
#: events taken at a time, so that timers and new requests get their turn in between
BATCH = 128


class Pollable(Protocol):
    """Who owns a watched socket. Told in the loop; may be told once too often."""

    def readable(self) -> None:
        """There is something to read, or the end, or an error."""

    def writable(self) -> None:
        """There is room to write, or an error."""

    def failed(self, error: Exception) -> None:
        """One of these two raised."""


class Poller(selectors.BaseSelector):
    """One epoll set: asyncio's descriptors by `register`, owners' sockets by `watch`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._owners: dict[int, Pollable] = {}
        self._keys: dict[int, selectors.SelectorKey] = {}

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

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, tell the owners, and return what is asyncio's."""
        # whole milliseconds, rounded up: rounded down, it would spin until the time has come
        wait_s = -1 if timeout is None else math.ceil(max(timeout, 0) * 1e3) * 1e-3
        owners = self._owners
        others = []
        for fd, events in self._epoll.poll(wait_s, BATCH):
            owner = owners.get(fd)
            if owner is not None:
                try:
                    if events & ~WRITE:
                        owner.readable()
                    if events & WRITE and owners.get(fd) is owner:
                        owner.writable()
                except Exception as error:  # noqa: BLE001  # a fault in one connection ends it alone
                    owner.failed(error)
            elif fd in self._keys:  # else closed by who was told before
                others.append((self._keys[fd], _asyncio_events(events) & self._keys[fd].events))
        return others

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            raise KeyError(f"descriptor {fd} is registered already")
        self._epoll.register(fd, _epoll_events(events))
        self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return self._keys[fd]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())
        self._epoll.unregister(key.fd)
        return key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()
        self._owners.clear()


def _epoll_events(events: int) -> int:
    return (READ if events & selectors.EVENT_READ else 0) | (
        WRITE if events & selectors.EVENT_WRITE else 0
    )


def _asyncio_events(events: int) -> int:
    """As selectors.EpollSelector: errors and hang-ups are told to readers and writers alike."""
    return (selectors.EVENT_WRITE if events & ~READ else 0) | (
        selectors.EVENT_READ if events & ~WRITE else 0
    )


class PollingLoop(asyncio.SelectorEventLoop):
    """An asyncio loop with a Poller."""

    def __init__(self) -> None:
        self.poller = Poller()
        super().__init__(self.poller)


def running_loop() -> PollingLoop:
    """Return the running loop, which is one of the relay's."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, PollingLoop)
    return loop
