"""Bodies that come in pieces: collected in the loop, and as many at a time as memory is meant for.

A worker keeps a body until its server has answered. Who sends more than there is room for is read
slower, not refused: its bytes wait in the kernel, and the oldest goes on first.
"""

from __future__ import annotations

from collections.abc import Callable

from smartproxy.errors import BadRequest, RequestTooLarge
from smartproxy.proxy.wire.bodies import ChunkScan
from smartproxy.proxy.wire.heads import BadAnswer
from smartproxy.proxy.wire.request_head import RequestHead

#: bytes of bodies that one worker holds, and one body more
LARGE_ROOM_BYTES = 192 << 20
#: of those up to SMALL_BODY_BYTES: chats do not wait for uploads
SMALL_ROOM_BYTES = 64 << 20
SMALL_BODY_BYTES = 1 << 20


class Upload:
    """One body on its way. Has one owner, the reception of its connection."""

    __slots__ = ("_left_bytes", "_max_bytes", "_room", "_scan", "data", "done")

    def __init__(self, head: RequestHead, max_bytes: int, room: Room) -> None:
        """max_bytes: of the whole body; the length in the head is within it."""
        self.data = bytearray()
        self.done = not head.chunked and not head.length_bytes
        self._left_bytes = head.length_bytes
        self._max_bytes = max_bytes
        self._scan = ChunkScan(keep_payload=True) if head.chunked else None
        self._room = room

    def feed(self, piece: bytes | bytearray) -> bytes:
        """Take bytes; returns those that are no part of the body.

        Raises BadRequest or RequestTooLarge.
        """
        before = len(self.data)
        rest = self._feed_chunks(piece) if self._scan else self._feed_length(piece)
        self._room.grow(self, len(self.data) - before)
        return rest

    def missing_bytes(self) -> int | None:
        """Return how many bytes are still to come; None: only the client knows."""
        return None if self._scan else self._left_bytes

    def _feed_length(self, piece: bytes | bytearray) -> bytes:
        taken = piece if len(piece) <= self._left_bytes else piece[: self._left_bytes]
        self.data += taken
        self._left_bytes -= len(taken)
        self.done = not self._left_bytes
        return bytes(piece[len(taken) :])

    def _feed_chunks(self, piece: bytes | bytearray) -> bytes:
        assert self._scan
        try:
            end = self._scan.feed(bytes(piece))
        except BadAnswer as error:
            raise BadRequest(f"the body's chunks are broken: {error}") from None
        self.data += self._scan.take_payload()
        if len(self.data) > self._max_bytes:
            raise RequestTooLarge(
                f"the body is larger than {self._max_bytes >> 20} MB (max_body_mb)"
            )
        self.done = self._scan.done
        return bytes(piece[end:]) if self.done else b""


class Room:
    """What bodies of one worker may take together. Loop thread only.

    Bodies that still come, the oldest first, and whole ones whose requests are being answered.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._used_bytes = 0
        #: of each upload that is still coming, what stops and starts its reading
        self._coming: dict[Upload, Callable[[bool], None]] = {}
        self._whole: set[Upload] = set()
        self._paused: set[Upload] = set()

    @property
    def full(self) -> bool:
        """Whether uploads are being kept waiting."""
        return bool(self._paused)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def enter(self, upload: Upload, read: Callable[[bool], None]) -> None:
        """Let an upload begin. read: told whether its connection is to be read."""
        self._coming[upload] = read

    def waits(self, upload: Upload) -> bool:
        """Return whether an upload is not read for want of room."""
        return upload in self._paused

    def grow(self, upload: Upload, size_bytes: int) -> None:
        """Count bytes of an upload that have come."""
        self._used_bytes += size_bytes
        if upload.done:
            self._coming.pop(upload, None)
            self._paused.discard(upload)
            self._whole.add(upload)
        over = self._used_bytes > self._size_bytes
        if (upload.done and self._paused) or (over and not self._goes_first(upload)):
            self._share()

    def leave(self, upload: Upload) -> None:
        """Forget an upload: answered, refused, or its client is gone."""
        if self._coming.pop(upload, None) is None and upload not in self._whole:
            return
        self._whole.discard(upload)
        self._paused.discard(upload)
        self._used_bytes -= len(upload.data)
        if self._paused:
            self._share()

    def _goes_first(self, upload: Upload) -> bool:
        return bool(self._paused) and next(iter(self._coming), None) is upload

    def _share(self) -> None:
        """Have those read that there is room for.

        With no room left the oldest goes on, unless a whole body will make room: nobody else would.
        """
        full = self._used_bytes > self._size_bytes
        oldest_goes_on = not self._whole
        for upload, read in list(self._coming.items()):
            waits = full and not oldest_goes_on
            oldest_goes_on = False
            if waits is not (upload in self._paused):
                (self._paused.add if waits else self._paused.discard)(upload)
                read(not waits)
