"""Answer bodies on their way: where the message ends, what the client gets of each piece.

Bytes stay untouched wherever client and server can use the same framing; chunks are only read, not
rebuilt. Trailers are left out: they would be headers that nobody looked at. Fed in any splitting of
the bytes.
"""

from __future__ import annotations

import re
from enum import Enum, auto

from smartproxy.proxy.wire.heads import AnswerHead, BadAnswer, Framing

#: a chunk of an event stream is passed on whole up to this size, so that an error event can follow
MAX_HELD_BYTES = 65536
#: of a chunk-size line or a trailer line, and of all trailer lines
MAX_LINE_BYTES = 8192
MAX_TRAILER_BYTES = 65536
HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")

LAST_CHUNK = b"0\r\n\r\n"
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


def chunk(payload: bytes) -> bytes:
    """Return `payload` as one chunk of a chunked body; nothing for nothing."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


class Body:
    """One answer's body; the base is the body that ends with the connection."""

    __slots__ = ("_rechunk", "done", "torn")

    def __init__(self, *, rechunk: bool = False) -> None:
        #: wrap payload in chunks for a client that is told `Transfer-Encoding: chunked`
        self._rechunk = rechunk
        #: the message has ended; later bytes are no part of it
        self.done = False
        #: what was passed on so far ends inside a chunk: no event can be put behind it
        self.torn = False

    def feed(self, data: bytes) -> bytes:
        """Return what to send to the client for these bytes of the server. Raises BadAnswer."""
        return self._framed(self._payload(data))

    def end_of_connection(self) -> bytes:
        """Return what to send now that the server has closed. Raises BadAnswer if too early."""
        self.done = True
        return self._framed(b"")

    def _payload(self, data: bytes) -> bytes:
        return data

    def _framed(self, payload: bytes) -> bytes:
        if not self._rechunk:
            return payload
        return chunk(payload) + LAST_CHUNK if self.done else chunk(payload)


class LengthBody(Body):
    """A body whose length was announced."""

    __slots__ = ("_left_bytes",)

    def __init__(self, length_bytes: int, *, rechunk: bool = False) -> None:
        super().__init__(rechunk=rechunk)
        self._left_bytes = length_bytes
        self.done = not length_bytes

    def _payload(self, data: bytes) -> bytes:
        payload = data if len(data) <= self._left_bytes else data[: self._left_bytes]
        self._left_bytes -= len(payload)
        self.done = not self._left_bytes
        return payload

    def end_of_connection(self) -> bytes:
        raise BadAnswer(f"closed with {self._left_bytes} bytes of its answer missing")


class DecodedChunks(Body):
    """A chunked body for a client that gets it in another framing."""

    __slots__ = ("_scan",)

    def __init__(self, *, rechunk: bool = False) -> None:
        super().__init__(rechunk=rechunk)
        self._scan = ChunkScan(keep_payload=True)

    def _payload(self, data: bytes) -> bytes:
        self._scan.feed(data)
        self.done = self._scan.done
        return self._scan.take_payload()

    def end_of_connection(self) -> bytes:
        raise BadAnswer("closed before the last chunk of its answer")


class PassedChunks(Body):
    """A chunked body for a client that gets the same chunks.

    Of an event stream only whole chunks are passed on (hold_bytes is the largest that is waited
    for): if the server dies inside one, the client's body can still end properly.
    """

    __slots__ = ("_held", "_hold_bytes", "_scan")

    def __init__(self, *, hold_bytes: int) -> None:
        super().__init__()
        self._scan = ChunkScan()
        self._hold_bytes = hold_bytes
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        if self._scan.at_start and not self._held and is_one_chunk(data):
            return data  # a token, nearly always
        whole = self._scan.feed(data)
        self.done = self._scan.done
        if self._scan.last_end >= 0:
            data = data[: self._scan.last_end] + (b"\r\n" if self.done else b"")
            whole = len(data) if self.done else whole
        if whole == len(data) or self.done:  # nearly always: a chunk comes in one piece
            passed, self._held = self._held + data[:whole], b""
            self.torn = False
            return passed
        if whole:
            passed, held = self._held + data[:whole], data[whole:]
            self.torn = False
        else:
            passed, held = b"", self._held + data
        if self.torn or len(held) > self._hold_bytes:
            passed, held, self.torn = passed + held, b"", True
        self._held = held
        return passed

    def end_of_connection(self) -> bytes:
        raise BadAnswer("closed before the last chunk of its answer")


def is_one_chunk(data: bytes) -> bool:
    """Return whether these bytes are exactly one chunk, and not the last."""
    match = CHUNK_SIZE.match(data)
    if match is None:
        return False
    size = int(match[1], 16)
    return size > 0 and match.end() + size + 2 == len(data) and data.endswith(b"\r\n")


class _Expect(Enum):
    SIZE = auto()
    DATA_END = auto()
    TRAILER = auto()


class ChunkScan:
    """Follows chunked framing (RFC 9112 7.1) through pieces of any size."""

    __slots__ = (
        "_expect",
        "_left_bytes",
        "_line",
        "_payload",
        "_trailer_bytes",
        "done",
        "last_end",
    )

    def __init__(self, *, keep_payload: bool = False) -> None:
        #: where trailers begin in what was fed last; -1: not in there
        self.last_end = -1
        self._trailer_bytes = 0
        self._left_bytes = 0
        self._line = b""
        self._expect = _Expect.SIZE
        self._payload: list[bytes] | None = [] if keep_payload else None
        self.done = False

    @property
    def at_start(self) -> bool:
        """Whether the next byte is the first of a chunk, or of the last one."""
        return self._expect is _Expect.SIZE and not self._left_bytes and not self._line

    def feed(self, data: bytes) -> int:
        """Return how many bytes of `data` its last whole chunk ends at. Raises BadAnswer."""
        position = whole = 0
        size = len(data)
        if self._expect is _Expect.TRAILER:
            self.last_end = 0
        while position < size and not self.done:
            if self._left_bytes:
                step = min(self._left_bytes, size - position)
                if self._payload is not None:
                    self._payload.append(data[position : position + step])
                self._left_bytes -= step
                position += step
                continue
            newline = data.find(b"\n", position) + 1
            self._line += data[position : newline or size]
            if len(self._line) > MAX_LINE_BYTES:
                raise BadAnswer(f"a line between chunks is over {MAX_LINE_BYTES} bytes")
            if not newline:
                self._check_part_of_line()
                break
            position = newline
            if self._end_line():
                whole = position
            elif self._expect is _Expect.TRAILER and self.last_end < 0:
                self.last_end = position
        return whole

    def take_payload(self) -> bytes:
        """Return the payload scanned since the last call."""
        assert self._payload is not None
        payload = b"".join(self._payload)
        self._payload.clear()
        return payload

    def _check_part_of_line(self) -> None:
        """Refuse what can't become a line: its end might never come."""
        if self._expect is _Expect.DATA_END and not b"\r\n".startswith(self._line):
            raise BadAnswer("chunk longer than its size")
        if self._expect is _Expect.SIZE and self._line[0] not in HEX_DIGITS:
            raise BadAnswer(f"bad chunk size {self._line[:40]!r}")

    def _end_line(self) -> bool:
        """Take the line just read; true where it ends a chunk or the message."""
        line, self._line = self._line, b""
        if self._expect is _Expect.SIZE:
            match = CHUNK_SIZE.fullmatch(line)
            if not match:
                raise BadAnswer(f"bad chunk size {line[:40]!r}")
            self._left_bytes = int(match[1], 16)
            self._expect = _Expect.DATA_END if self._left_bytes else _Expect.TRAILER
            return False
        if self._expect is _Expect.DATA_END:
            if line != b"\r\n":
                raise BadAnswer("chunk longer than its size")
            self._expect = _Expect.SIZE
            return True
        if not line.endswith(b"\r\n"):
            raise BadAnswer("bare line feed in a trailer")
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise BadAnswer(f"trailers of more than {MAX_TRAILER_BYTES} bytes")
        self.done = line == b"\r\n"
        return self.done


def body_for(head: AnswerHead, client_framing: Framing) -> Body:
    """Return the body that turns the server's framing of `head` into the client's."""
    rechunk = client_framing is Framing.CHUNKED
    if head.framing is Framing.CHUNKED and rechunk:
        return PassedChunks(hold_bytes=MAX_HELD_BYTES if head.is_event_stream else 0)
    if head.framing is Framing.CHUNKED:
        return DecodedChunks()
    if head.framing is Framing.CLOSE:
        return Body(rechunk=rechunk)
    return LengthBody(head.length_bytes or 0, rechunk=rechunk)
