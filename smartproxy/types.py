"""Servers as plain values that more than one part speaks in, and units. No I/O.

Bytes are integers, times are Unix seconds unless a name says monotonic.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

MIB = 1 << 20
GIB = 1 << 30


class ServerState(StrEnum):
    STARTING = "starting"  # process spawned (or about to be), health not yet 200
    READY = "ready"  # health answered 200; takes leases
    DRAINING = "draining"  # takes no new leases, finishes those it has
    STOPPING = "stopping"  # TERM sent
    STOPPED = "stopped"
    FAILED = "failed"  # would not start, or died by itself


NEXT_STATES: Mapping[ServerState, frozenset[ServerState]] = {
    ServerState.STARTING: frozenset({ServerState.READY, ServerState.STOPPING, ServerState.FAILED}),
    ServerState.READY: frozenset({ServerState.DRAINING, ServerState.FAILED}),
    ServerState.DRAINING: frozenset({ServerState.READY, ServerState.STOPPING, ServerState.FAILED}),
    ServerState.STOPPING: frozenset({ServerState.STOPPED, ServerState.FAILED}),
    ServerState.STOPPED: frozenset(),
    ServerState.FAILED: frozenset(),
}

#: states in which a process may be alive and memory may be held
LIVE_STATES = frozenset(
    {ServerState.STARTING, ServerState.READY, ServerState.DRAINING, ServerState.STOPPING}
)
