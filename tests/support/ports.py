"""Ports for the servers of tests: each process that runs tests hands out ports of its own block.

A port that the kernel chooses may be lent to a connection before the server listens on it, and the
next ports after it may belong to the test of another process. So blocks lie below the range the
kernel chooses from, and a process owns a block as long as it holds the block's first port.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import lru_cache

from smartproxy.config.settings import SPARE_PORTS

#: five digits, as the tests' nginx.conf asks for; the kernel's own range begins at 32768
LOWEST, HIGHEST = 10_000, 32_000
BLOCK_SIZE = 500


def free_port() -> int:
    """Return a port that nobody listens on."""
    return _block().free_ports(1)


def free_pool(size: int) -> int:
    """Return a `port_start` for a pool of this size: nobody listens on any port it may use."""
    return _block().free_ports(size + SPARE_PORTS)


class Block:
    """The ports after `start`, which a bound socket holds until this process ends."""

    def __init__(self, start: int) -> None:
        self._claim = socket.create_server(("127.0.0.1", start))
        self._start = start
        self._used = 0

    def free_ports(self, size: int) -> int:
        for _ in range(BLOCK_SIZE):
            if self._used + size >= BLOCK_SIZE:
                self._used = 0
            first = self._start + 1 + self._used
            if all(_is_free(port) for port in range(first, first + size)):
                self._used += size
                return first
            self._used += 1
        raise AssertionError(f"no {size} free ports after {self._start}")


@lru_cache(maxsize=1)
def _block() -> Block:
    starts = range(LOWEST, HIGHEST, BLOCK_SIZE)
    # processes that begin together try different blocks first
    turn = os.getpid() % len(starts)
    for start in [*starts[turn:], *starts[:turn]]:
        with suppress(OSError):
            return Block(start)
    raise AssertionError("other processes hold every block of ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
