"""Bodies in pieces, and the room for them: the oldest goes on, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from smartproxy.errors import BadRequest, RequestTooLarge
from smartproxy.proxy.wire.bodies import LAST_CHUNK, chunk
from smartproxy.proxy.wire.request_head import RequestHead, request_head
from smartproxy.proxy.worker.uploads import Room, Upload

MAX_BYTES = 100


def head(lines: bytes) -> RequestHead:
    return request_head(b"POST /x HTTP/1.1\r\nHost: p\r\n" + lines + b"\r\n")


CHUNKED = head(b"Transfer-Encoding: chunked\r\n")


def length(size: int) -> RequestHead:
    return head(b"Content-Length: %d\r\n" % size)


class Sender:
    """An upload and whether its connection is read."""

    def __init__(self, room: Room, size: int) -> None:
        self.reads = True
        self.upload = Upload(length(size), 1 << 30, room)
        room.enter(self.upload, self._read)

    def _read(self, on: bool) -> None:
        self.reads = on

    def send(self, size: int) -> None:
        assert self.reads
        self.upload.feed(b"x" * size)


def test_a_body_ends_at_its_length_and_gives_the_rest_back() -> None:
    upload = Upload(length(5), MAX_BYTES, Room(1000))
    assert upload.feed(b"abc") == b""
    assert upload.feed(b"defgh") == b"fgh"
    assert upload.done
    assert upload.data == b"abcde"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_chunks_are_joined_however_they_come(step: int) -> None:
    data = chunk(b"abc") + b"4;x=1\r\ndefg\r\n" + b"0\r\nX-Trailer: 1\r\n\r\n" + b"next"
    upload, rest = Upload(CHUNKED, MAX_BYTES, Room(1000)), b""
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        rest += piece if upload.done else upload.feed(piece)
    assert (bytes(upload.data), rest) == (b"abcdefg", b"next")


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"zz",
        b"5\nabcde",
        b"2\r\nabc",
        b"-1\r\n",
        b"0\r\nX: 1\n\r\n",
        b"\r\n",
        b"1" * 9000,
        b"0\r\n" + b"X: 1\r\n" * 20000,
    ],
)
def test_broken_chunks_are_refused_at_once(data: bytes) -> None:
    with pytest.raises(BadRequest):
        Upload(CHUNKED, MAX_BYTES, Room(1000)).feed(data)


def test_chunks_over_the_limit_are_refused() -> None:
    upload = Upload(CHUNKED, MAX_BYTES, Room(1000))
    upload.feed(chunk(b"x" * MAX_BYTES))
    with pytest.raises(RequestTooLarge):
        upload.feed(chunk(b"x"))


def test_an_empty_chunked_body_is_whole() -> None:
    upload = Upload(CHUNKED, MAX_BYTES, Room(1000))
    assert upload.feed(LAST_CHUNK) == b""
    assert upload.done
    assert not upload.data


def test_without_room_only_the_oldest_goes_on() -> None:
    room = Room(100)
    first, second, third = (Sender(room, 200) for _ in range(3))
    second.send(60)
    assert not room.full
    first.send(60)
    assert [first.reads, second.reads, third.reads] == [True, False, False]
    assert room.waits(second.upload)
    fourth = Sender(room, 10)
    fourth.send(5)
    assert not fourth.reads


def test_a_whole_body_is_waited_for_and_makes_room_when_it_is_answered() -> None:
    room = Room(100)
    first, second = Sender(room, 90), Sender(room, 90)
    first.send(90)
    second.send(20)
    assert not second.reads
    room.leave(first.upload)
    assert second.reads
    assert room.used_bytes == 20
    room.leave(second.upload)
    room.leave(second.upload)
    assert room.used_bytes == 0


def test_a_sender_that_goes_lets_the_next_go_on() -> None:
    room = Room(100)
    first, second = Sender(room, 200), Sender(room, 200)
    first.send(101)
    second.reads = second.reads and room.waits(second.upload) is False
    assert not second.reads
    room.leave(first.upload)
    assert second.reads


@pytest.mark.parametrize("seed", range(20))
def test_any_crowd_is_served_and_memory_stays_bounded(seed: int) -> None:
    """At most the room and one body more are held, and there is always somebody to go on."""
    rng = random.Random(seed)
    room, largest = Room(1000), 400
    senders = [Sender(room, rng.randint(1, largest)) for _ in range(40)]
    whole: list[Sender] = []
    while senders or whole:
        going = [sender for sender in senders if sender.reads]
        assert going or whole, "nobody goes on"
        if whole and (not going or rng.random() < 0.2):
            room.leave(whole.pop(rng.randrange(len(whole))).upload)
            continue
        sender = rng.choice(going)
        left = sender.upload.missing_bytes()
        assert left
        sender.send(min(left, rng.randint(1, 50)))
        assert room.used_bytes <= 1000 + largest + 50
        if sender.upload.done:
            senders.remove(sender)
            whole.append(sender)
        elif rng.random() < 0.02:
            senders.remove(sender)
            room.leave(sender.upload)
    assert room.used_bytes == 0
    assert not room.full
