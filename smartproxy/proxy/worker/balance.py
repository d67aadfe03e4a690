"""How many connections the workers of one master have, so that they take new ones evenly.

All wait on one listening socket, and who wakes first would take a whole burst, with its streams and
for as long as they last. The figures lie in memory shared since before the fork; they are hints.
"""

from __future__ import annotations

import mmap
import struct
import time

#: a slot is this worker's alone as long as no more than so many workers live
SLOTS = 64
#: monotonic seconds (the same clock in all processes) and connections
SLOT = struct.Struct("II")
#: who has not written for so long is gone, or too busy to be counted on
STALE_S = 3
#: so many more connections than the least burdened worker, and it should take the next one
MORE = 2

_board = mmap.mmap(-1, SLOTS * SLOT.size)  # anonymous and shared: the master's import makes it


class Neighbours:
    """One worker's view."""

    __slots__ = ("_own",)

    def __init__(self, number: int) -> None:
        """number: of the worker, counted by its master."""
        self._own = number % SLOTS

    def tell(self, connections: int) -> None:
        """Say how many connections this worker has; at least once a second."""
        SLOT.pack_into(_board, self._own * SLOT.size, int(time.monotonic()), connections)

    def leave(self) -> None:
        """Say that this worker takes no more."""
        SLOT.pack_into(_board, self._own * SLOT.size, 0, 0)

    def have_less(self, connections: int) -> bool:
        """Return whether a living neighbour should rather take the next connection."""
        if connections < MORE:
            return False
        alive_since = int(time.monotonic()) - STALE_S
        return any(
            seen_at >= alive_since and theirs + MORE <= connections
            for slot, (seen_at, theirs) in enumerate(SLOT.iter_unpack(_board))
            if slot != self._own
        )
