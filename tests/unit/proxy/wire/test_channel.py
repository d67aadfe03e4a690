"""A connection whose owner fails ends alone: the loop and the other connections go on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from smartproxy.proxy.wire.channel import HIGH_WATER_BYTES, Channel


@pytest.fixture
def loop() -> Iterator[Any]:
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()


def pair() -> tuple[socket.socket, socket.socket]:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.settimeout(5)
    return ours, peer


def fail(*_: object) -> None:
    raise RuntimeError("a fault of the owner")


def test_a_fault_in_an_owner_ends_its_connection_alone(loop: Any) -> None:
    told: list[str] = []
    ended: list[OSError | None] = []
    loop.set_exception_handler(lambda _loop, context: told.append(str(context["exception"])))
    (bad_sock, bad_peer), (good_sock, good_peer) = pair(), pair()
    bad = Channel(loop, bad_sock, fail, ended.append)
    got = loop.create_future()
    good = Channel(loop, good_sock, got.set_result, ended.append)
    bad.read(True)
    bad_peer.sendall(b"x")
    loop.run_until_complete(until(loop, lambda: bad.closed))
    good.read(True)
    good_peer.sendall(b"hello")
    assert loop.run_until_complete(got) == b"hello"
    assert told == ["a fault of the owner"]
    assert ended == [None]
    assert bad_peer.recv(1) == b""
    good.close()
    bad_peer.close()
    good_peer.close()


def test_a_fault_while_draining_ends_the_connection(loop: Any) -> None:
    loop.set_exception_handler(lambda _loop, _context: None)
    ours, peer = pair()
    ended: list[OSError | None] = []
    channel = Channel(loop, ours, fail, ended.append)
    channel.on_drain = fail
    channel.write(b"x" * 4 * HIGH_WATER_BYTES)
    assert channel.buffered_bytes > 0
    received = 0

    def drained() -> bool:
        nonlocal received
        if not channel.closed:
            received += len(peer.recv(1 << 16))
        return channel.closed

    loop.run_until_complete(until(loop, drained))
    assert received > HIGH_WATER_BYTES
    assert ended == [None]
    peer.close()


async def until(loop: Any, condition: Any) -> None:
    """Let the loop turn until a condition holds, at most five seconds."""
    deadline = loop.time() + 5
    while not condition():
        assert loop.time() < deadline
        await asyncio.sleep(0)
