"""A client's connection between answers: collects a whole request before anything looks at it.

Without this a client that sends slowly, or nothing, holds a thread. A request that is refused by
its head alone (its key, its length, its form) is refused before its body is read. A whole request
can be handled without ever touching the socket. All of it runs in the worker's loop.
"""

from __future__ import annotations

import re
import socket
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from smartproxy.errors import (
    BadRequest,
    HeadTooLarge,
    QueueFull,
    RequestTooSlow,
    SmartProxyError,
)
from smartproxy.proxy.wire.channel import Channel
from smartproxy.proxy.wire.heads import TOKEN, Framing, client_head
from smartproxy.proxy.wire.own_answers import error_answer
from smartproxy.proxy.wire.request_head import RequestHead, request_head
from smartproxy.proxy.worker.uploads import SMALL_BODY_BYTES, Room, Upload

HEAD_END = b"\r\n\r\n"
MAX_HEAD_BYTES = 65536
#: an upload lives as long as so many bytes come in each of the worker's windows (`keepalive`, 75 s)
MIN_PROGRESS_BYTES = 1024
#: and as long as so many do while others wait for the room that it takes
MIN_PROGRESS_IN_A_FULL_ROOM_BYTES = 1 << 20
#: an upload that is not read for want of room waits so long, then it is refused
MAX_WAIT_FOR_ROOM_S = 300.0
#: what a refused client still sends is thrown away so long, so that it can read its answer
LINGER_S = 30.0
LINGER_SILENCE_S = 2.0
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE)
#: a length that is no number: taken for none, the body would be the next request
ODD_LENGTH = re.compile(rb"\r\n[ \t]*content-length", re.IGNORECASE)
ORIGIN = re.compile(rb"\r\norigin:([\t\x20-\x7e]*)\r\n", re.IGNORECASE)
#: bodies of unknown length, and bodies that the client sends only when asked to
NOT_BY_LENGTH = re.compile(rb"\r\n(?:transfer-encoding|expect)[ \t]*:", re.IGNORECASE)
BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")


def origin_in(head: bytes | bytearray) -> bytes:
    """Return what a head that nobody could parse says of the page that asks, or nothing."""
    found = ORIGIN.search(head)
    return found[1].strip(b" \t") if found else b""


def path_in(head: bytes | bytearray) -> str:
    """Return a request's path as it stands in its head."""
    target = head.split(b" ", 2)[1:2]
    return target[0].partition(b"?")[0].decode("latin-1") if target else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A client's connection."""

    sock: socket.socket
    #: the other side's address, as `accept` gives it
    peer: Any
    #: the listener's address
    server: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What all receptions of a worker share."""

    loop: AbstractEventLoop
    #: for bodies up to SMALL_BODY_BYTES, and for larger ones
    small_room: Room
    large_room: Room
    #: returns how many bytes a body may have; raises SmartProxyError for a head that is refused
    admit: Callable[[Connection, RequestHead], int]
    #: `head` and `body` are there to be taken
    on_request: Callable[[Reception], None]
    #: it is refused, with this status, and ends soon
    on_refused: Callable[[Reception, int], None]
    on_gone: Callable[[Reception], None]
    #: returns the origin whose pages may read the answer to a head that nobody could parse
    reader: Callable[[bytes | bytearray], bytes]


class Reception:
    """One connection. Either it waits for a request, or somebody else has the channel."""

    __slots__ = (
        "_buffer",
        "_desk",
        "_discarded_bytes",
        "_fresh",
        "_full_head",
        "_room",
        "_seen_bytes",
        "_upload",
        "_waiting_since",
        "_waits",
        "body",
        "channel",
        "conn",
        "deadline",
        "head",
    )

    def __init__(self, desk: Desk, conn: Connection) -> None:
        self.conn = conn
        self.channel = Channel(desk.loop, conn.sock, self._on_data, self._on_end)
        #: up to and with its blank line; chunks are told as a length
        self.head = b""
        self.body: bytes | bytearray = b""
        #: monotonic; kept by the worker
        self.deadline = 0.0
        self._desk = desk
        self._waits = False
        self._buffer = bytearray()
        #: a body that did not come in one piece with its head, until its request is answered
        self._upload: Upload | None = None
        self._room = desk.large_room
        self._full_head: RequestHead | None = None
        #: a request began, or its body did, since `lives_on` was asked
        self._fresh = False
        self._seen_bytes = 0
        self._waiting_since: float | None = None
        self._discarded_bytes = 0

    def wait(self, read_ahead: bytes = b"") -> None:
        """Take the channel and wait for the next request; read_ahead: what came of it already."""
        self.head, self.body = b"", b""
        self.forget_body()
        self.channel.on_data, self.channel.on_end = self._on_data, self._on_end
        self.channel.read(True)
        self._waits = True
        if read_ahead:
            self._buffer += read_ahead
        if self._buffer:  # not right here: who sends a thousand requests at once would nest as deep
            self._desk.loop.call_soon(self._look)

    def forget_body(self) -> None:
        """Give back the room that the body takes: nobody needs it any more."""
        if self._upload:
            self._room.leave(self._upload)
            self._upload = None

    def close(self) -> None:
        """Close the connection and forget what was collected."""
        self._waits = False
        self._buffer.clear()
        self.forget_body()
        self.channel.close()

    @property
    def has_large_body(self) -> bool:
        """Whether `forget_body` gives back anything."""
        return self._upload is not None

    def lives_on(self, now: float) -> bool:
        """Return whether it may have another window; else it is refused, or gone if it is idle.

        Asked at its deadline. now: monotonic.
        """
        fresh, self._fresh = self._fresh, False
        upload = self._upload
        if fresh and (self._buffer or upload):  # else it is that of the request before
            return True
        if upload is None:
            if self._buffer:
                self._refuse(RequestTooSlow("the request's head did not come to its end in time"))
            else:
                self._desk.on_gone(self)
            return False
        if self._room.waits(upload):
            return self._waits_on(now)
        new_bytes, self._seen_bytes = len(upload.data) - self._seen_bytes, len(upload.data)
        needed = MIN_PROGRESS_IN_A_FULL_ROOM_BYTES if self._room.full else MIN_PROGRESS_BYTES
        if new_bytes >= needed:
            return True
        self._refuse(
            RequestTooSlow(
                f"the request's body came too slowly: {new_bytes} bytes since the last look, at"
                f" least {needed} are needed"
            )
        )
        return False

    def _waits_on(self, now: float) -> bool:
        if self._waiting_since is None:
            self._waiting_since = now
        if now - self._waiting_since < MAX_WAIT_FOR_ROOM_S:
            return True
        held_mb = self._room.used_bytes >> 20
        self._refuse(QueueFull(f"bodies of other requests take all room for them: {held_mb} MB"))
        return False

    def _on_data(self, data: bytes) -> None:
        if self._upload and self._waits:
            self._feed(self._upload, data)
            return
        if not self._buffer:
            self._fresh = True
        self._buffer += data
        self._look()

    def _look(self) -> None:
        """Give the request away if it is there, or begin with its body."""
        if not self._waits or self._upload:
            return
        buffer = self._buffer
        while buffer[:2] == b"\r\n":  # RFC 9112 2.2
            del buffer[:2]
        head_bytes = buffer.find(HEAD_END) + len(HEAD_END)
        if head_bytes < len(HEAD_END):
            self._check_part_of_head()
            return
        if not NOT_BY_LENGTH.search(buffer, 0, head_bytes):
            length = LENGTH.search(buffer, 0, head_bytes)
            whole_bytes = head_bytes + (int(length[1]) if length else 0)
            odd = length is None and ODD_LENGTH.search(buffer, 0, head_bytes)
            if len(buffer) >= whole_bytes and not odd:
                view = memoryview(buffer)
                self.head, self.body = bytes(view[:head_bytes]), bytes(view[head_bytes:whole_bytes])
                view.release()
                self._give(whole_bytes)
                return
        self._begin_body(head_bytes)

    def _check_part_of_head(self) -> None:
        if self._buffer and not TOKEN.match(self._buffer) and self._buffer != b"\r":
            self._refuse(BadRequest("not HTTP: the first byte begins no method"))
        elif BARE_LINE_FEED.search(self._buffer):
            self._refuse(BadRequest("a line of the request ends without a carriage return"))
        elif len(self._buffer) > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the head is over {MAX_HEAD_BYTES} bytes"))

    def _begin_body(self, head_bytes: int) -> None:
        """See whether a request is worth its body, and take what came of that."""
        self.head = bytes(memoryview(self._buffer)[:head_bytes])
        try:
            head = request_head(self.head)
            max_bytes = self._desk.admit(self.conn, head)
        except SmartProxyError as error:
            self._refuse(error)
            return
        rest = bytes(memoryview(self._buffer)[head_bytes:])
        self._buffer.clear()
        small = not head.chunked and head.length_bytes <= SMALL_BODY_BYTES
        self._room = self._desk.small_room if small else self._desk.large_room
        self._upload = upload = Upload(head, max_bytes, self._room)
        self._full_head, self._fresh = head, True
        self._seen_bytes, self._waiting_since = 0, None
        self._room.enter(upload, self.channel.read)
        if head.expects_continue and not rest:
            self.channel.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if rest or upload.done:
            self._feed(upload, rest)

    def _feed(self, upload: Upload, data: bytes) -> None:
        try:
            rest = upload.feed(data)
        except SmartProxyError as error:
            self._refuse(error)
            return
        if not upload.done:
            return
        head = self._full_head
        if head and (head.chunked or head.expects_continue):
            self.head = head.with_length(len(upload.data))
        self.body = upload.data
        self._full_head = None
        self._buffer += rest
        self._give(0)

    def _give(self, taken_bytes: int) -> None:
        del self._buffer[:taken_bytes]
        self._waits = False
        self._desk.on_request(self)

    def _refuse(self, error: SmartProxyError) -> None:
        """Answer what is not going to be handled, and end the connection as its client allows."""
        self._waits = False
        answer = error_answer(error, self._desk.reader(self.head or self._buffer))
        head = client_head(answer.head, Framing.LENGTH, keep_alive=False)
        self.channel.write(head + answer.body)
        self._buffer.clear()
        self.forget_body()
        self._desk.on_refused(self, error.http_status)
        if self.channel.buffered_bytes:  # it reads nothing, not even this
            self._desk.on_gone(self)
        else:
            self._linger()

    def _linger(self) -> None:
        """Read on what the client sends: closed with bytes unread, it would lose its answer."""
        self.channel.on_data, self.channel.on_end = self._discard, self._lingered
        self.channel.read(True)
        with suppress(OSError):
            self.conn.sock.shutdown(socket.SHUT_WR)
        self._desk.loop.call_later(LINGER_SILENCE_S, self._look_at_linger, 0, time.monotonic())

    def _discard(self, data: bytes) -> None:
        self._discarded_bytes += len(data)

    def _look_at_linger(self, before_bytes: int, since: float) -> None:
        if self.channel.closed:
            return
        if self._discarded_bytes == before_bytes or time.monotonic() - since > LINGER_S:
            self._lingered(None)
            return
        self._desk.loop.call_later(
            LINGER_SILENCE_S, self._look_at_linger, self._discarded_bytes, since
        )

    def _lingered(self, _error: OSError | None) -> None:
        self._desk.on_gone(self)

    def _on_end(self, error: OSError | None) -> None:
        if error is None and self._waits and (self._buffer or self._upload):
            self._refuse(BadRequest("the request ends before it is whole"))
        else:
            self._desk.on_gone(self)
