"""End servers in order: wait until nothing is in flight, stop the process, say so. In threads.

Input: a row in state draining or stopping. Output: the row in stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smartproxy.llama import process
from smartproxy.llama.http import slots_busy
from smartproxy.manager.children import Children
from smartproxy.manager.context import Tools, in_thread
from smartproxy.manager.lingering import Lingering
from smartproxy.state import servers as server_rows
from smartproxy.types import ServerState

DRAIN_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What it takes to end servers."""

    tools: Tools
    children: Children
    lingering: Lingering


def on_server(ending: Ending, server_id: int, work: Callable[..., None], *args: Any) -> None:
    """Have a thread carry a server on: `work(ending, server_id, *args)`.

    While it runs the server is its own. One that ends with an error (the state file could not be
    written) leaves a row that the next pass gives to another thread (adopt.carry_on).
    """
    ending.children.begin(server_id)

    def owned() -> None:
        try:
            work(ending, server_id, *args)
        finally:
            ending.children.end(server_id)
            ending.tools.poke()

    in_thread(ending.tools, owned)


def drain(ending: Ending, server_id: int, *, only_if_idle: bool = False) -> None:
    """Wait until nothing is in flight on a draining server, then end it.

    only_if_idle: what turns out to be in use stays; who wanted its place chooses anew.
    """
    while True:
        row = next(
            (r for r in server_rows.live_servers(ending.tools.store) if r.id == server_id), None
        )
        if row is None or row.state != ServerState.DRAINING:
            return  # it died, or a full stop took over
        # leases are ours; what nginx carries only the server itself knows
        slots = slots_busy(row.port, row.api_key)
        if not row.leased and not slots:
            break
        if only_if_idle:
            _keep(ending.tools, server_id, slots)
            return
        time.sleep(DRAIN_LOOK_EVERY_S)
    if server_rows.transition(
        ending.tools.store,
        server_id,
        ServerState.DRAINING,
        ServerState.STOPPING,
        now=time.time(),
        reason="drained",
    ):
        take_down(ending, server_id)


def _keep(tools: Tools, server_id: int, slots: int) -> None:
    """Take a server back that was in use after all; the next decision sees its slots."""
    now = time.time()
    server_rows.transition(
        tools.store,
        server_id,
        ServerState.DRAINING,
        ServerState.READY,
        now=now,
        reason="kept: it was in use after all",
        slots_busy=slots,
        watched_at=now,
        last_used_at=now,
    )
    tools.poke()


def take_down(ending: Ending, server_id: int, grace_s: float = process.TERM_GRACE_S) -> None:
    """End the process of a row in state stopping and carry it to stopped.

    grace_s: from the first TERM to the second, which ends requests in flight too.
    """
    child = ending.children.get(server_id)
    began = time.monotonic()
    said = process.stop(child, grace_s=grace_s) if child is not None else "it had no process"
    ending.lingering.note_end(server_id, time.time())
    server_rows.transition(
        ending.tools.store,
        server_id,
        ServerState.STOPPING,
        ServerState.STOPPED,
        now=time.time(),
        reason=f"{said}, {time.monotonic() - began:.2f} s",
        exit_code=child.exit_code() if child else None,
    )
    ending.children.take(server_id)
    ending.tools.poke()
