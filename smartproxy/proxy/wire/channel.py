"""One non-blocking socket in the relay's loop: buffered writing, pausable reading, letting go.

Not an asyncio transport: those can't let go of a socket, and a client's goes back to gunicorn after
the answer; and this is less work per chunk (docs/datapath.md).
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from smartproxy.proxy.wire.poller import READ, WRITE, PollingLoop

READ_BYTES = 65536
#: above this the other side is not read any further, until LOW_WATER_BYTES are left
HIGH_WATER_BYTES = 262144
LOW_WATER_BYTES = 65536
#: for a peer to close after we have
LINGER_S = 2.0


class Channel:
    """Reads and writes one socket, in the loop thread; no callback comes from inside `write`."""

    __slots__ = (
        "_fd",
        "_loop",
        "_poller",
        "_queue",
        "_recv",
        "_send",
        "_unwritable",
        "_watched",
        "buffered_bytes",
        "closed",
        "on_data",
        "on_drain",
        "on_end",
        "sent_bytes",
        "sock",
    )

    def __init__(
        self,
        loop: PollingLoop,
        sock: socket.socket,
        on_data: Callable[[bytes], None],
        on_end: Callable[[OSError | None], None],
    ) -> None:
        """on_end: the peer has sent its last byte (None), or the connection broke (why).

        Whoever takes the channel over puts its own callbacks in place.
        """
        self.sock = sock
        self._loop = loop
        self._poller = loop.poller
        self._fd = sock.fileno()
        self._recv = sock.recv
        self._send = sock.send
        self.on_data = on_data
        self.on_end = on_end
        #: called when so much was written that less than LOW_WATER_BYTES (and: nothing) is left
        self.on_drain: Callable[[], None] | None = None
        self._queue: deque[memoryview] = deque()
        #: written by the owner, not yet taken by the kernel
        self.buffered_bytes = 0
        #: taken by the kernel since the beginning
        self.sent_bytes = 0
        #: READ, WRITE, both or none
        self._watched = 0
        self._unwritable = False
        self.closed = False

    def read(self, on: bool) -> None:
        """Start or stop reading; stopped, an end is not noticed either."""
        if on is not bool(self._watched & READ) and not self.closed:
            self._watch(self._watched ^ READ)

    def write(self, data: bytes | bytearray) -> None:
        """Send what the kernel takes and keep the rest; a broken connection is told by on_end."""
        if self.closed or self._unwritable:
            return
        if not self._queue:
            try:
                sent = self._send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._broken(error)
                return
            self.sent_bytes += sent
            if sent == len(data):
                return
            self._watch(self._watched | WRITE)
            self._queue.append(memoryview(data)[sent:])
            self.buffered_bytes = len(data) - sent
            return
        self._queue.append(memoryview(data))
        self.buffered_bytes += len(data)

    def detach(self) -> socket.socket:
        """Stop watching the socket and return it, open."""
        if not self.closed:
            if self._watched:
                self._watch(0)
            self.closed = True
            self._queue.clear()
        return self.sock

    def close(self) -> None:
        """Close the socket at once; what is buffered is lost."""
        self.detach().close()

    def _watch(self, wanted: int) -> None:
        self._poller.watch(self._fd, self, self._watched, wanted)
        self._watched = wanted

    def readable(self) -> None:
        """Called by the poller."""
        if not self._watched & READ:  # an error, told while only writing is waited for
            self.writable()
            return
        try:
            data = self._recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error)
            return
        if data:
            self.on_data(data)
        else:
            self._ended(None)

    def writable(self) -> None:
        """Called by the poller."""
        if not self._queue:
            return
        try:
            sent = self._send(self._queue[0])
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(error)
            return
        self.sent_bytes += sent
        self.buffered_bytes -= sent
        if sent == len(self._queue[0]):
            self._queue.popleft()
        else:
            self._queue[0] = self._queue[0][sent:]
        if not self._queue:
            self._watch(self._watched & ~WRITE)
        if self.on_drain and self.buffered_bytes <= LOW_WATER_BYTES:
            self.on_drain()

    def failed(self, error: Exception) -> None:
        """Called by the poller."""
        self._loop.call_exception_handler({"message": "a connection failed", "exception": error})
        self.close()
        self.on_end(None)

    def _ended(self, error: OSError | None) -> None:
        self.read(False)
        self.on_end(error)

    def _broken(self, error: OSError) -> None:
        """A write failed. What the peer sent before may still be there; its end is read next.

        Told from the loop where nobody reads, since the writer may be in the middle of something.
        """
        if self._queue:
            self._watch(self._watched & ~WRITE)
            self._queue.clear()
            self.buffered_bytes = 0
        self._unwritable = True
        if not self._watched:
            self._loop.call_soon(self._tell_broken, error)

    def _tell_broken(self, error: OSError) -> None:
        if not self.closed:
            self.on_end(error)


def close_gently(loop: PollingLoop, sock: socket.socket) -> None:
    """Close a socket once its peer has; closing it with bytes unread would reset the connection.

    The peer would then lose what it has not read yet (RFC 9112 9.6). Loop thread; returns at once.
    """

    def ended(_error: OSError | None = None) -> None:
        timer.cancel()
        channel.close()

    try:
        sock.setblocking(False)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        sock.close()
        return
    channel = Channel(loop, sock, lambda _data: None, ended)
    channel.read(True)
    timer = loop.call_later(LINGER_S, ended)
