"""End servers in order: wait until nothing is in flight, stop the process, say so.

Input: a row in state draining or stopping. Output: the row in stopped. `drain` and `take_down` run
in threads; what begins them is the main loop's, as is to notice the ends that nobody wanted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smartproxy.errors import UpstreamError
from smartproxy.llama import log, process
from smartproxy.llama.http import slots_busy
from smartproxy.manager.children import Children
from smartproxy.manager.context import Tools, in_thread
from smartproxy.manager.lingering import Lingering
from smartproxy.state import servers as server_rows
from smartproxy.types import ServerState

logger = logging.getLogger(__name__)

DRAIN_LOOK_EVERY_S = 0.02
#: a draining server that says for so long nothing of its slots is ended all the same: it hangs
SILENT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What it takes to end servers."""

    tools: Tools
    children: Children
    lingering: Lingering


def on_server(ending: Ending, server_id: int, work: Callable[..., None], *args: Any) -> None:
    """Have a thread carry a server on: `work(ending, server_id, *args)`.

    While it runs the server is its own. One that ends with an error (the state file could not be
    written), or can't be started, leaves a row that a later pass gives to another thread
    (adopt.carry_on).
    """
    #: held by whoever has the work: a pool that can't start a thread may still run it later
    mine = threading.Lock()

    def owned() -> None:
        if not mine.acquire(blocking=False):
            return
        failed = True
        try:
            work(ending, server_id, *args)
            failed = False
        finally:
            ending.children.end(server_id, failed=failed)
            ending.tools.poke()

    ending.children.begin(server_id)
    try:
        in_thread(ending.tools, owned)
    except RuntimeError as error:
        if mine.acquire(blocking=False):
            logger.warning("server %d must wait for a thread: %s", server_id, error)
            ending.children.end(server_id, failed=True)


def drain(ending: Ending, server_id: int, *, only_if_idle: bool = False) -> None:
    """Wait until nothing is in flight on a draining server, then end it.

    only_if_idle: what turns out to be in use stays; who wanted its place chooses anew.
    """
    heard_at = time.monotonic()
    while True:
        row = next(
            (r for r in server_rows.live_servers(ending.tools.store) if r.id == server_id), None
        )
        if row is None or row.state != ServerState.DRAINING:
            return  # it died, or a full stop took over
        # leases are ours; what nginx carries only the server itself knows
        slots = slots_busy(row.port, row.api_key)
        if slots is not None:
            heard_at = time.monotonic()
        hangs = time.monotonic() - heard_at > SILENT_S
        if not row.leased and (slots == 0 or hangs):
            break
        if only_if_idle and (slots or row.leased):
            _keep(ending.tools, server_id, slots or 0)
            return
        time.sleep(DRAIN_LOOK_EVERY_S)
    if server_rows.transition(
        ending.tools.store,
        server_id,
        ServerState.DRAINING,
        ServerState.STOPPING,
        now=ending.tools.store.now(),
        reason="drained",
    ):
        take_down(ending, server_id)


def _keep(tools: Tools, server_id: int, slots: int) -> None:
    """Take a server back that was in use after all; the next decision sees its slots."""
    now = tools.store.now()
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
    ending.lingering.note_end(server_id, ending.tools.store.now())
    server_rows.transition(
        ending.tools.store,
        server_id,
        ServerState.STOPPING,
        ServerState.STOPPED,
        now=ending.tools.store.now(),
        reason=f"{said}, {time.monotonic() - began:.2f} s",
        exit_code=child.exit_code() if child else None,
    )
    ending.children.take(server_id)
    ending.tools.poke()


def unload(
    ending: Ending, model_id: str, reason: str, now: float, *, only_if_idle: bool = False
) -> None:
    """Bring a model's server down in order, whatever state it is in."""
    for row in server_rows.live_servers(ending.tools.store):
        if row.model_id != model_id:
            continue
        if row.state == ServerState.READY:
            begin_drain(ending, row.id, reason, Draining(only_if_idle=only_if_idle), now=now)
        elif row.state == ServerState.STARTING:
            stop_now(ending, row.id, row.state, reason, now=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """How a server is drained."""

    #: what turns out to be in use is kept
    only_if_idle: bool
    #: for its event
    data: dict[str, float] | None = None


def begin_drain(ending: Ending, server_id: int, reason: str, how: Draining, *, now: float) -> bool:
    """Return whether it was ready, and now drains."""
    moved = server_rows.transition(
        ending.tools.store,
        server_id,
        ServerState.READY,
        ServerState.DRAINING,
        now=now,
        reason=reason,
        data=how.data,
    )
    if moved:
        on_server(ending, server_id, partial(drain, only_if_idle=how.only_if_idle))
    return moved


def stop_now(
    ending: Ending, server_id: int, state: ServerState, reason: str, *, now: float
) -> None:
    """Stop a server that is in this state: one that starts, or one that drains, at once."""
    if server_rows.transition(
        ending.tools.store,
        server_id,
        state,
        ServerState.STOPPING,
        now=now,
        reason=reason,
    ):
        on_server(ending, server_id, take_down)


def notice_exits(ending: Ending, now: float) -> None:
    """Carry servers whose process is gone to failed; starting ones are seen by their thread."""
    for row in server_rows.live_servers(ending.tools.store):
        child = ending.children.get(row.id)
        state = row.state
        if state not in (ServerState.READY, ServerState.DRAINING) or (child and child.alive()):
            continue
        ending.lingering.note_end(row.id, now)
        exit_code = child.exit_code() if child else None
        why = log.explain_exit(exit_code, log.tail(Path(row.log_path)))
        message = f"model '{row.model_id}': its llama-server {why}"
        server_rows.transition(
            ending.tools.store,
            row.id,
            state,
            ServerState.FAILED,
            now=now,
            reason=message,
            error_code=UpstreamError.code,
            error_message=message,
            exit_code=exit_code,
        )
        ending.children.take(row.id)
