"""Bodies on their way: the same bytes whatever the splitting, and the end found exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartproxy.proxy.wire.bodies import (
    LAST_CHUNK,
    Body,
    DecodedChunks,
    LengthBody,
    PassedChunks,
    body_for,
    chunk,
)
from smartproxy.proxy.wire.heads import BadAnswer, Framing, parse_head

PAYLOADS = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
CUTS = st.lists(st.integers(min_value=0, max_value=400), max_size=12)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return (data[a:b] for a, b in itertools.pairwise(edges) if b > a)


def encoded(payloads: list[bytes]) -> bytes:
    return b"".join(chunk(payload) for payload in payloads) + LAST_CHUNK


@given(payloads=PAYLOADS, cuts=CUTS, hold_bytes=st.sampled_from([0, 10, 65536]))
def test_chunks_pass_byte_for_byte_however_they_are_split(
    payloads: list[bytes], cuts: list[int], hold_bytes: int
) -> None:
    body = PassedChunks(hold_bytes=hold_bytes)
    data = encoded(payloads)
    assert b"".join(body.feed(piece) for piece in pieces(data, cuts)) == data
    assert body.done
    assert not body.torn


@given(payloads=PAYLOADS, cuts=CUTS)
def test_held_chunks_only_leave_whole(payloads: list[bytes], cuts: list[int]) -> None:
    body = PassedChunks(hold_bytes=65536)
    ends, position = {0}, 0
    for payload in payloads:
        position += len(chunk(payload))
        ends.add(position)
    ends.add(position + len(LAST_CHUNK))
    passed = 0
    for piece in pieces(encoded(payloads), cuts):
        passed += len(body.feed(piece))
        assert passed in ends
        assert not body.torn


@given(payloads=PAYLOADS, cuts=CUTS)
def test_decoded_chunks_give_the_payload(payloads: list[bytes], cuts: list[int]) -> None:
    body = DecodedChunks()
    data = encoded(payloads)
    assert b"".join(body.feed(piece) for piece in pieces(data, cuts)) == b"".join(payloads)
    assert body.done


@given(payload=st.binary(min_size=1, max_size=300), cuts=CUTS)
def test_length_body_ends_at_its_length_and_drops_the_rest(payload: bytes, cuts: list[int]) -> None:
    body = LengthBody(len(payload))
    assert b"".join(body.feed(piece) for piece in pieces(payload + b"more", cuts)) == payload
    assert body.done


def test_a_chunk_larger_than_the_hold_is_passed_on_and_marks_the_body_torn() -> None:
    body = PassedChunks(hold_bytes=10)
    data = chunk(b"x" * 100)
    assert body.feed(data[:50]) == data[:50]
    assert body.torn
    assert body.feed(data[50:] + b"5\r\nab") == data[50:]
    assert not body.torn


def test_bytes_behind_the_last_chunk_are_dropped() -> None:
    body = PassedChunks(hold_bytes=65536)
    assert body.feed(b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200") == b"1\r\na\r\n0\r\n\r\n"
    assert body.done


@pytest.mark.parametrize("hold_bytes", [0, 65536])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("trailers", [b"", b"X-Sum: 1\r\n", b"Set-Cookie: a\r\nX: b\r\n"])
def test_trailers_are_left_out(hold_bytes: int, step: int, trailers: bytes) -> None:
    chunks = b"1;ext=1\r\na\r\n0\r\n"
    data = chunks + trailers + b"\r\n"
    body = PassedChunks(hold_bytes=hold_bytes)
    passed = b"".join(body.feed(data[i : i + step]) for i in range(0, len(data), step))
    assert passed == chunks + b"\r\n"
    assert body.done


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"-5\r\n",
        b"0x5\r\n",
        b"5\nabcde",
        b"2\r\nabc\r\n",
        b"\r\n",
        b"5_0\r\n",
        b"g" * 9000,
        b"z",
        b"1\r\nab",
        b"0\r\n" + b"X: 1\r\n" * 20000,
    ],
)
def test_broken_chunk_framing_is_refused(data: bytes) -> None:
    with pytest.raises(BadAnswer):
        PassedChunks(hold_bytes=0).feed(data)


def test_an_early_end_of_connection_is_refused() -> None:
    for body in (LengthBody(3), DecodedChunks(), PassedChunks(hold_bytes=0)):
        with pytest.raises(BadAnswer):
            body.end_of_connection()


def test_a_body_that_ends_with_the_connection_becomes_chunks() -> None:
    body = Body(rechunk=True)
    assert body.feed(b"abc") == b"3\r\nabc\r\n"
    assert not body.done
    assert body.end_of_connection() == LAST_CHUNK


@pytest.mark.parametrize("rechunk", [False, True])
def test_an_empty_body_is_done_at_once(rechunk: bool) -> None:
    body = LengthBody(0, rechunk=rechunk)
    assert body.done
    assert body.feed(b"") == (LAST_CHUNK if rechunk else b"")


def test_body_for_picks_by_both_framings() -> None:
    chunked = parse_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "POST")
    sized = parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "POST")
    assert type(body_for(chunked, Framing.CHUNKED)) is PassedChunks
    assert type(body_for(chunked, Framing.CLOSE)) is DecodedChunks
    assert body_for(sized, Framing.LENGTH).feed(b"12345") == b"12345"
    assert body_for(sized, Framing.CHUNKED).feed(b"12345") == b"5\r\n12345\r\n0\r\n\r\n"
