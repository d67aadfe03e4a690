"""The count of open requests of a key."""

from __future__ import annotations

import pytest

from smartproxy.errors import RateLimitExceeded
from smartproxy.proxy.permits import Board, KeyPermit


def test_as_many_permits_as_allowed_are_out_at_a_time() -> None:
    board = Board()
    first, second = KeyPermit("a", 1, board), KeyPermit("a", 1, board)
    first.take()
    with pytest.raises(RateLimitExceeded, match='"a" has 1 requests'):
        second.take()
    second.give_back()  # it had none: nothing happens
    with pytest.raises(RateLimitExceeded):
        second.take()
    KeyPermit("b", 1, board).take()
    first.give_back()
    first.give_back()
    second.take()
