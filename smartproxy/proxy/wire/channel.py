"""One non-blocking socket in the relay's loop: buffered writing, pausable reading, letting go.

Not an asyncio transport: those can't let go of a socket, and a client's goes back to gunicorn after
the answer; and this is less work per chunk (docs/datapath.md). uvloop's readers and writers tell
when the socket is ready; they cost no more than an epoll set of our own (docs/measured.md).
"""

from __future__ import annotations

import socket
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable

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
        "_queue",
        "_reading",
        "_recv",
        "_send",
        "_unwritable",
        "_writing",
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
        loop: AbstractEventLoop,
        sock: socket.socket,
        on_data: Callable[[bytes], None],
        on_end: Callable[[OSError | None], None],
    ) -> None:
        """on_end: the peer has sent its last byte (None), or the connection broke (why).

        Whoever takes the channel over puts its own callbacks in place.
        """
        self.sock = sock
        self._loop = loop
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
        #: what the loop watches the socket for
        self._reading = False
        self._writing = False
        self._unwritable = False
        self.closed = False

    def read(self, on: bool) -> None:
        """Start or stop reading; stopped, an end is not noticed either."""
        if on is self._reading or self.closed:
            return
        self._reading = on
        if on:
            self._loop.add_reader(self._fd, self._readable)
        else:
            self._loop.remove_reader(self._fd)

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
            self._watch_writing(True)
            self._queue.append(memoryview(data)[sent:])
            self.buffered_bytes = len(data) - sent
            return
        self._queue.append(memoryview(data))
        self.buffered_bytes += len(data)

    def detach(self) -> socket.socket:
        """Stop watching the socket and return it, open."""
        if not self.closed:
            self.read(False)
            self._watch_writing(False)
            self.closed = True
            self._queue.clear()
        return self.sock

    def close(self) -> None:
        """Close the socket at once; what is buffered is lost."""
        self.detach().close()

    def _watch_writing(self, on: bool) -> None:
        if on is self._writing:
            return
        self._writing = on
        if on:
            self._loop.add_writer(self._fd, self._writable)
        else:
            self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        """Called by the loop: there is something to read, or the end, or an error."""
        try:
            data = self._recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._tell(self._ended, error)
            return
        try:
            if data:
                self.on_data(data)
            else:
                self._ended(None)
        except Exception as error:  # noqa: BLE001  # a fault in one connection ends it alone
            self._failed(error)

    def _writable(self) -> None:
        """Called by the loop: there is room to write, or an error."""
        if not self._queue:
            return
        try:
            sent = self._send(self._queue[0])
        except BlockingIOError:
            return
        except OSError as error:
            self._tell(self._broken, error)
            return
        self.sent_bytes += sent
        self.buffered_bytes -= sent
        if sent == len(self._queue[0]):
            self._queue.popleft()
        else:
            self._queue[0] = self._queue[0][sent:]
        if not self._queue:
            self._watch_writing(False)
        if self.on_drain and self.buffered_bytes <= LOW_WATER_BYTES:
            self._tell(self.on_drain)

    def _tell(self, whom: Callable[..., None], *why: OSError) -> None:
        try:
            whom(*why)
        except Exception as error:  # noqa: BLE001  # as in _readable
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Whoever owns this connection raised: it ends, and nothing else."""
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
            self._watch_writing(False)
            self._queue.clear()
            self.buffered_bytes = 0
        self._unwritable = True
        if not self._reading:
            self._loop.call_soon(self._tell_broken, error)

    def _tell_broken(self, error: OSError) -> None:
        if not self.closed:
            self.on_end(error)


def close_gently(loop: AbstractEventLoop, sock: socket.socket) -> None:
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
