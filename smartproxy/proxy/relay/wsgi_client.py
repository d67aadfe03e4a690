"""A client behind any WSGI server: the iterable that the server takes the body from.

For where there is no RelayWorker: Flask's test client, other workers, other servers. It costs a
thread per open stream. That the client went is noticed when the server closes the iterable: at the
next failed write.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
from collections.abc import Iterator

from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.wire.channel import HIGH_WATER_BYTES, LOW_WATER_BYTES
from smartproxy.proxy.wire.heads import AnswerHead, end_to_end


class WsgiClient(Client):
    """Filled in the relay's loop thread, iterated and closed in the WSGI server's."""

    chunked = False  # framing is the server's business; it gets payload

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        #: status line and headers, once known
        self.head: concurrent.futures.Future[tuple[str, list[tuple[str, str]]]]
        self.head = concurrent.futures.Future()
        self._loop = loop
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._buffered_bytes = 0
        self._taken_bytes = 0
        self._was_cut = False

    @property
    def full(self) -> bool:
        return self._buffered_bytes > HIGH_WATER_BYTES

    def progress_bytes(self) -> int:
        return self._taken_bytes

    def write(self, data: bytes) -> None:
        if data and not self.ended:
            self._buffered_bytes += len(data)
            self._pieces.put(data)

    def finish(self) -> None:
        if not self.ended:
            self.ended = True
            self._pieces.put(None)

    def cut(self) -> None:
        self._was_cut = True
        self.finish()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Block until the next piece (WSGI server's thread)."""
        piece = self._pieces.get()
        if piece is not None:
            self._loop.call_soon_threadsafe(self._taken, len(piece))
            return piece
        self._pieces.put(None)
        if self._was_cut:
            raise ConnectionAbortedError("the server's answer ended too early")
        raise StopIteration

    def close(self) -> None:
        """Called by the WSGI server when it is done with the iterable, or its client is gone."""
        self._loop.call_soon_threadsafe(self._closed)

    def _send_head(self, head: AnswerHead) -> None:
        status = f"{head.status} {head.reason.decode('latin-1')}"
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in end_to_end(head, self.framing)
        ]
        self.head.set_result((status, headers))

    def _taken(self, size_bytes: int) -> None:
        self._buffered_bytes -= size_bytes
        self._taken_bytes += size_bytes
        if self._buffered_bytes <= LOW_WATER_BYTES and not self.ended:
            self.on_room()

    def _closed(self) -> None:
        if not self.ended:
            self.on_gone()
