"""A client's connection between answers: collects a whole request before any thread looks at it.

Without this a client that sends slowly, or nothing, holds a thread; and a request that is complete
can be parsed and handled without ever touching the socket. All of it runs in the worker's loop.
"""

from __future__ import annotations

import re
import socket
from asyncio import AbstractEventLoop
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smartproxy.errors import HeadTooLarge, SmartProxyError
from smartproxy.proxy.wire.channel import Channel
from smartproxy.proxy.wire.heads import Framing, client_head
from smartproxy.proxy.wire.own_answers import error_answer

HEAD_END = b"\r\n\r\n"
MAX_HEAD_BYTES = 65536
#: how many bytes of bodies one worker collects at once; a request beyond is read by its thread
MAX_COLLECTED_BYTES = 256 << 20
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE)
ORIGIN = re.compile(rb"\r\norigin:([\t\x20-\x7e]*)\r\n", re.IGNORECASE)
#: bodies of unknown length, and bodies that the client sends only when asked to
UNCOLLECTED = re.compile(rb"\r\n(?:transfer-encoding|expect)[ \t]*:", re.IGNORECASE)


def origin_in(head: bytes | bytearray) -> bytes:
    """Return what a head that nobody could parse says of the page that asks, or nothing."""
    found = ORIGIN.search(head)
    return found[1].strip(b" \t") if found else b""


def path_in(head: bytes | bytearray) -> str:
    """Return a request's path as it stands in its head."""
    target = head.split(b" ", 2)[1:2]
    return target[0].partition(b"?")[0].decode("latin-1") if target else ""


class Collected:
    """How many bytes all receptions of a worker hold together."""

    __slots__ = ("size_bytes",)

    def __init__(self) -> None:
        self.size_bytes = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A client's connection."""

    sock: socket.socket
    #: the other side's address, as `accept` gives it
    peer: Any
    #: the listener's address
    server: Any


class Reception:
    """One connection. Either it waits for a request, or somebody else has the channel."""

    __slots__ = (
        "_body_bytes",
        "_buffer",
        "_collected",
        "_head_bytes",
        "_loop",
        "_on_gone",
        "_on_request",
        "_reader",
        "_waits",
        "body",
        "channel",
        "conn",
        "deadline",
        "head",
    )

    def __init__(
        self,
        loop: AbstractEventLoop,
        conn: Connection,
        collected: Collected,
        on_request: Callable[[Reception], None],
        on_gone: Callable[[Reception], None],
        reader: Callable[[bytes | bytearray], bytes],
    ) -> None:
        """on_request: `head` and `body` are there to be taken. reader: the origin whose pages may
        read the answer to a head that nobody could parse."""
        self.conn = conn
        self.channel = Channel(loop, conn.sock, self._on_data, self._on_end)
        #: up to and with its blank line, or all there is where `body` is None
        self.head = b""
        #: None: what follows the head has to be read from the socket, if anything
        self.body: bytes | None = None
        #: monotonic; kept by the worker
        self.deadline = 0.0
        self._loop = loop
        self._waits = False
        self._buffer = bytearray()
        self._collected = collected
        self._head_bytes = 0
        self._body_bytes = 0
        self._on_request = on_request
        self._on_gone = on_gone
        self._reader = reader

    def wait(self, read_ahead: bytes = b"") -> None:
        """Take the channel and wait for the next request; read_ahead: what came of it already."""
        self.head, self.body = b"", None
        self.channel.on_data, self.channel.on_end = self._on_data, self._on_end
        self.channel.read(True)
        self._waits = True
        if read_ahead:
            self._buffer += read_ahead
            self._count(len(read_ahead))
        if self._buffer:  # not right here: who sends a thousand requests at once would nest as deep
            self._loop.call_soon(self._look)

    def close(self) -> None:
        """Close the connection and forget what was collected."""
        self._waits = False
        self._count(-len(self._buffer))
        self._buffer.clear()
        self.channel.close()

    def _on_data(self, data: bytes) -> None:
        self._buffer += data
        self._count(len(data))
        self._look()

    def _look(self) -> None:
        """Give the request away if it is there."""
        if not self._waits or (not self._head_bytes and not self._measure()):
            return
        whole_bytes = self._head_bytes + self._body_bytes
        if len(self._buffer) >= whole_bytes:
            self.body = bytes(memoryview(self._buffer)[self._head_bytes : whole_bytes])
            self._give(self._head_bytes, whole_bytes)
        elif self._collected.size_bytes > MAX_COLLECTED_BYTES:
            self._give(len(self._buffer), len(self._buffer))

    def _measure(self) -> bool:
        """Find where head and body end; false while that is not known or not to be waited for."""
        head_bytes = self._buffer.find(HEAD_END) + len(HEAD_END)
        if head_bytes < len(HEAD_END):
            if len(self._buffer) > MAX_HEAD_BYTES:
                self._waits = False
                self._refuse(HeadTooLarge(f"the head is over {MAX_HEAD_BYTES} bytes"))
                self._on_gone(self)
            return False
        if UNCOLLECTED.search(self._buffer, 0, head_bytes):
            self._give(len(self._buffer), len(self._buffer))
            return False
        length = LENGTH.search(self._buffer, 0, head_bytes)
        self._head_bytes = head_bytes
        self._body_bytes = int(length[1]) if length else 0
        return True

    def _refuse(self, error: SmartProxyError) -> None:
        answer = error_answer(error, self._reader(self._buffer))
        head = client_head(answer.head, Framing.LENGTH, keep_alive=False)
        self.channel.write(head + answer.body)

    def _give(self, head_bytes: int, taken_bytes: int) -> None:
        self.head = bytes(memoryview(self._buffer)[:head_bytes])
        del self._buffer[:taken_bytes]
        self._count(-taken_bytes)
        self._head_bytes = self._body_bytes = 0
        self._waits = False
        self._on_request(self)

    def _count(self, change_bytes: int) -> None:
        self._collected.size_bytes += change_bytes

    def _on_end(self, _error: OSError | None) -> None:
        self._on_gone(self)
