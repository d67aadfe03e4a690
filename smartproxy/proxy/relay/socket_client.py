"""A client on a socket of the worker's loop; afterwards the connection goes on or closes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.wire.channel import HIGH_WATER_BYTES, Channel, close_gently
from smartproxy.proxy.wire.heads import AnswerHead, Framing, client_head

#: of a client's next request, read while it still gets this answer
MAX_READ_AHEAD_BYTES = 65536
#: for a client to take something of an answer that is complete on our side
FLUSH_STALL_S = 60.0

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
#: until a client that is gone has answered a probe: the way there and back
PROBED_S = 0.05
LOOK_AT_HALF_EVERY_S = 0.5
#: of the kernel's enum of TCP states
TCP_CLOSE = 7


def is_reset(sock: socket.socket) -> bool:
    """Return whether the peer of a TCP socket has reset the connection."""
    if sock.family == socket.AF_UNIX:
        return False  # there a write fails at once
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE


class SocketClient(Client):
    """A client whose channel the relay holds until the answer is complete."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: Channel,
        *,
        keep_alive: bool,
        on_done: Callable[[SocketClient], None],
        http11: bool = True,
        head_only: bool = False,
    ) -> None:
        """on_done: called once, when the channel is free again (keep_alive) or is closed."""
        super().__init__()
        self.chunked = http11
        self.keep_alive = keep_alive
        #: bytes of the next request that came meanwhile
        self.read_ahead = b""
        self.sent_body_bytes = 0
        self._head_only = head_only
        self._loop = loop
        self._head = b""
        self._on_done = on_done
        self._timer: asyncio.TimerHandle | None = None
        self._channel = channel
        channel.on_data, channel.on_end, channel.on_drain = (
            self._on_data,
            self._on_end,
            self._drained,
        )
        self._channel.read(True)

    @property
    def full(self) -> bool:
        return self._channel.buffered_bytes > HIGH_WATER_BYTES

    def progress_bytes(self) -> int:
        return self._channel.sent_bytes

    def write(self, data: bytes) -> None:
        if self._head_only:
            data = b""
        self.sent_body_bytes += len(data)
        if self._head:
            data, self._head = self._head + data, b""
        if data:
            self._channel.write(data)

    def finish(self) -> None:
        if not self.ended:
            self.ended = True
            if self._channel.buffered_bytes:
                self._watch_flush(self._channel.sent_bytes)
            else:
                self._let_go()

    def cut(self) -> None:
        self.ended = True
        self.keep_alive = False
        self._close()

    def _send_head(self, head: AnswerHead) -> None:
        if self.framing is Framing.CLOSE:
            self.keep_alive = False
        self._head = client_head(head, self.framing, self.keep_alive)

    def _on_data(self, data: bytes) -> None:
        self.read_ahead += data
        if len(self.read_ahead) > MAX_READ_AHEAD_BYTES:
            self._channel.read(False)

    def _on_end(self, error: OSError | None) -> None:
        self.keep_alive = False
        if self.ended:
            self._close()
        elif error is None and self.chunked and not self.began:
            self._probe()
        else:
            self.on_gone()

    def _probe(self) -> None:
        """Find out whether a client that sends no more still reads, as `nc -N` does.

        One that is gone answers whatever it gets with a reset. An interim answer is what it may get
        before the answer (RFC 9110 15.2).
        """
        self._channel.write(INTERIM)
        self._loop.call_later(PROBED_S, self._look_at_half)

    def _look_at_half(self) -> None:
        if self.ended or self._channel.closed:
            return
        if is_reset(self._channel.sock):
            self.on_gone()
        else:
            self._loop.call_later(LOOK_AT_HALF_EVERY_S, self._look_at_half)

    def _drained(self) -> None:
        if not self.ended:
            self.on_room()
        elif not self._channel.buffered_bytes:
            self._let_go()

    def _watch_flush(self, before_bytes: int) -> None:
        """Look again later whether the client took any of the rest; else it could stay for ever."""
        self._timer = self._loop.call_later(FLUSH_STALL_S, self._check_flush, before_bytes)

    def _check_flush(self, before_bytes: int) -> None:
        if self._channel.sent_bytes == before_bytes:
            self.cut()
        else:
            self._watch_flush(self._channel.sent_bytes)

    def _let_go(self) -> None:
        """All is written: give the socket back, or close it without a reset (RFC 9112 9.6)."""
        if self._timer:
            self._timer.cancel()
        self._channel.on_drain = None
        if not self.keep_alive:
            close_gently(self._loop, self._channel.detach())
        self._on_done(self)

    def _close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if not self._channel.closed:
            self._channel.close()
            self._on_done(self)
