"""The full stop: no new requests, time for those that run, then no llama-server is left."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.background import BackgroundScheduler

from smartproxy.errors import ShuttingDown, StateError
from smartproxy.llama import process
from smartproxy.llama.http import slots_busy
from smartproxy.manager.adopt import carry_on
from smartproxy.manager.bring_down import Draining, begin_drain, notice_exits, stop_now
from smartproxy.manager.bring_up import Loading
from smartproxy.state import demands as demand_rows
from smartproxy.state import servers as server_rows
from smartproxy.state.manager_row import update_manager
from smartproxy.state.store import Store
from smartproxy.types import ServerState

logger = logging.getLogger(__name__)

#: how long requests in flight may go on in a full stop: as gunicorn's graceful_timeout
STOP_GRACE_S = 30.0
#: how often the log says what a stop waits for
TELL_EVERY_S = 5.0
#: TERM, TERM and KILL of every server at once, with room to spare
STOP_DEADLINE_S = 45.0
#: how often a full stop looks at what is left
STOP_LOOK_EVERY_S = 0.05


def end_all(loading: Loading, scheduler: BackgroundScheduler) -> None:
    """End every server in order. Blocks until all have ended."""
    store = loading.tools.store
    logger.info("stopping: ending every llama-server when its requests are done")
    try:
        update_manager(store, stopping=True)
        _refuse_all(store)
    except StateError as error:
        logger.error("requests that wait can't be told that the proxy stops: %s", error)
    until = time.monotonic() + STOP_GRACE_S
    scheduler.add_job(
        _tell_waiting,
        "interval",
        [store, until],
        seconds=TELL_EVERY_S,
        next_run_time=datetime.now(UTC) + timedelta(seconds=1),
    )
    stop_all(loading, grace_s=STOP_GRACE_S, deadline_s=STOP_DEADLINE_S)


def _refuse_all(store: Store) -> None:
    ids = [demand.id for demand in demand_rows.open_demands(store)]
    demand_rows.answer(
        store,
        ids,
        now=store.now(),
        error_code=ShuttingDown.code,
        message="the proxy is being stopped",
    )


def _tell_waiting(store: Store, until: float) -> None:
    """Say what the stop waits for. until: time.monotonic() after which requests are ended."""
    left_s = until - time.monotonic()
    for row in server_rows.live_servers(store):
        if row.state == ServerState.DRAINING and left_s > 0:
            busy = max(row.leased, slots_busy(row.port, row.api_key) or 0)
            logger.info(
                "stopping: waiting for %d requests on model '%s', at most %.0f s more",
                *(busy, row.model_id, left_s),
            )
        else:
            logger.info(
                "stopping: waiting for the llama-server of model '%s' to end (%s)",
                *(row.model_id, row.state),
            )


def stop_all(loading: Loading, *, grace_s: float, deadline_s: float) -> None:
    """End every server: what a full stop does. Blocks until all have ended.

    Requests in flight may finish for grace_s seconds; deadline_s is for the ending after that.
    What is left then is killed, whatever the state file says.
    """
    began = time.monotonic()
    loading.children.close()
    was_logged = False
    while (passed_s := time.monotonic() - began) < grace_s + deadline_s:
        try:
            if not _end_more(loading, grace_s=grace_s, passed_s=passed_s):
                return
        except StateError as error:
            if not was_logged:
                logger.error("servers can't be ended in order, trying on: %s", error)
            was_logged = True
            if passed_s > grace_s:
                break
        time.sleep(STOP_LOOK_EVERY_S)
    for server_id, child in loading.children.snapshot().items():
        logger.error("server %d, pid %d, did not end in time: killed", server_id, child.pid)
        process.kill(child)


def _end_more(loading: Loading, *, grace_s: float, passed_s: float) -> bool:
    """Ask once more what does not end yet; a row whose thread has died gets another.

    Returns whether anything is left.
    """
    store, reason = loading.tools.store, "the proxy is being stopped"
    now = store.now()
    notice_exits(loading, now)
    for row in server_rows.live_servers(store):
        if row.state == ServerState.READY:
            begin_drain(loading, row.id, reason, Draining(only_if_idle=False), now=now)
        elif row.state == ServerState.STARTING:
            stop_now(loading, row.id, row.state, reason, now=now)
        elif row.state == ServerState.DRAINING and passed_s > grace_s:
            why = f"{reason}; requests were still running after {grace_s:g} s"
            stop_now(loading, row.id, row.state, why, now=now)
    carry_on(loading)
    return bool(server_rows.live_servers(store)) or loading.children.are_left()


def kill_all(loading: Loading) -> None:
    """End every llama-server on the spot."""
    logger.warning("a second signal: ending every llama-server at once")
    for child in loading.children.snapshot().values():
        process.kill(child, patience_s=0)
