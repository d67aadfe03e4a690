"""Carry out a decision: every start, eviction, wait and refusal, and what exits mean."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smartproxy.errors import LoadFailed, SmartProxyError, StateRefused
from smartproxy.llama import process
from smartproxy.manager import lingering
from smartproxy.manager.bring_down import drain, take_down
from smartproxy.manager.bring_up import argv_of, bring_up, free_port
from smartproxy.manager.context import Manager
from smartproxy.manager.served import loaded_of, options_key, settings_key
from smartproxy.planner.types import Decision, Evict, GpuShare, Start
from smartproxy.state import counts, events
from smartproxy.state import demands as demand_rows
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import NewAssignment
from smartproxy.state.demands import Demand
from smartproxy.state.manager_row import update_manager
from smartproxy.state.server_row import NewServer
from smartproxy.types import ServerState

logger = logging.getLogger(__name__)


def carry_out(manager: Manager, decision: Decision, demands: list[Demand], now: float) -> None:
    """Do what the planner decided; every action is written down before it is begun."""
    if decision.starts or decision.evictions or decision.refusals:
        update_manager(manager.store, decision_s=manager.decision_s)
    for eviction in decision.evictions:
        evict(manager, eviction, now)
    for start_ in decision.starts:
        try:
            start(manager, start_, now)
        except (SmartProxyError, OSError) as error:
            # no port, no such device, the file has just gone: the load's failure, not the pass's
            code = error.code if isinstance(error, SmartProxyError) else LoadFailed.code
            manager.failed(start_.model_id, code, f"model '{start_.model_id}': {error}")
    for refusal in decision.refusals:
        manager.preload.discard(refusal.model_id)
        _answer(manager, demands, refusal.model_id, refusal.code, refusal.message, now)
    for wait in decision.waits:
        late = [
            wish
            for wish in demands
            if wish.model_id == wait.model_id
            and now - wish.asked_at > manager.settings.queue_timeout
        ]
        message = (
            f"model '{wait.model_id}' still waits after {manager.settings.queue_timeout:g} s"
            f" (queue_timeout): {wait.reason}"
        )
        _answer(manager, late, wait.model_id, wait.code_at_timeout, message, now)
    waits = {wait.model_id: wait.reason for wait in decision.waits}
    demand_rows.set_waits(manager.store, waits, now=now, data=_decided(manager))


def _answer(
    manager: Manager, demands: list[Demand], model_id: str, code: str, message: str, now: float
) -> None:
    ids = [wish.id for wish in demands if wish.kind == "load" and wish.model_id == model_id]
    if not ids:
        return
    demand_rows.answer(manager.store, ids, now=now, error_code=code, message=message)
    events.event(
        manager.store,
        now,
        "load",
        f"model '{model_id}' refused to {len(ids)} requests: {code}: {message}",
        model_id=model_id,
        data=_decided(manager),
    )


def _decided(manager: Manager) -> dict[str, float]:
    """Return what an event says of the decision behind it."""
    return {"decision_ms": round(manager.decision_s * 1000, 3)}


# --- starting --------------------------------------------------------------------------------


def start(manager: Manager, decided: Start, now: float) -> None:
    """Write the server and what it is promised, then bring it up in a thread."""
    manager.preload.discard(decided.model_id)
    spec = manager.catalog.models[decided.model_id]
    placement = decided.placement
    layout, estimate = placement.layout, placement.estimate
    port = free_port(manager)
    loaded = loaded_of(manager.store, spec)
    argv = argv_of(manager, spec, placement, port)
    options = options_key(spec, loaded, manager.binary.build)
    new = NewServer(
        model_id=spec.id,
        port=port,
        api_key=secrets.token_urlsafe(24),
        command=json.dumps(argv),
        log_path=str(_log_path(manager, spec.id, now)),
        settings_key=settings_key(options, layout),
        on_cpu_for_want_of_gpu=placement.on_cpu_for_want_of_gpu,
        context_size=layout.context_size,
        parallel=spec.parallel,
        gpu_layers=layout.gpu_layers if placement.gpus else 0,
        layer_count=loaded.metadata.layer_count + 1,
        tensor_split=",".join(f"{share:g}" for share in layout.tensor_split),
        estimated_bytes=sum(share.bytes for share in placement.gpus),
        host_estimated_bytes=estimate.host.total_bytes,
    )
    try:
        server_id = server_rows.insert_server(
            manager.store,
            new,
            [_assigned(share) for share in placement.gpus],
            now=now,
            reason=placement.reason,
            data=_decided(manager),
        )
    except StateRefused as error:
        # an index refused a second live server: the next pass sees the first
        logger.error("model '%s' not started: %s", spec.id, error)
        return
    in_thread(manager, bring_up, manager, server_id, spec, placement)


def _assigned(share: GpuShare) -> NewAssignment:
    return NewAssignment(
        gpu_uuid=share.uuid,
        gpu_index=share.index,
        estimated_bytes=share.bytes,
        free_bytes=share.free_bytes,
    )


def _log_path(manager: Manager, model_id: str, now: float) -> Path:
    safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in model_id).lstrip(".")
    return manager.log_dir / f"{safe[:80]}-{int(now * 1000)}.log"


# --- stopping --------------------------------------------------------------------------------


def evict(manager: Manager, eviction: Evict, now: float) -> None:
    """Drain a victim; it stops when its last request is done. One that only moves comes back."""
    row = server_rows.server(manager.store, eviction.server_id)
    if row.state != ServerState.READY:
        return
    how = Draining(only_if_idle=not eviction.drains_busy, data=_decided(manager))
    if not _drain(manager, row.id, eviction.reason, now, how):
        return
    if eviction.for_model_id == eviction.model_id:
        manager.preload.add(eviction.model_id)
    else:
        counts.add_eviction(manager.store, eviction.model_id)


def unload(
    manager: Manager, model_id: str, reason: str, now: float, *, only_if_idle: bool = False
) -> None:
    """Bring a model's server down in order, whatever state it is in."""
    for row in server_rows.live_servers(manager.store):
        if row.model_id != model_id:
            continue
        if row.state == ServerState.READY:
            _drain(manager, row.id, reason, now, Draining(only_if_idle=only_if_idle))
        elif row.state == ServerState.STARTING:
            stop_starting(manager, row.id, reason, now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """How a server is drained."""

    #: what turns out to be in use is kept
    only_if_idle: bool
    #: for its event
    data: dict[str, float] | None = None


def _drain(manager: Manager, server_id: int, reason: str, now: float, how: Draining) -> bool:
    """Return whether it was ready, and now drains."""
    moved = server_rows.transition(
        manager.store,
        server_id,
        ServerState.READY,
        ServerState.DRAINING,
        now=now,
        reason=reason,
        data=how.data,
    )
    if moved:
        in_thread(manager, partial(drain, manager, server_id, only_if_idle=how.only_if_idle))
    return moved


def stop_starting(manager: Manager, server_id: int, reason: str, now: float) -> None:
    """Stop a server that is not ready yet."""
    if server_rows.transition(
        manager.store,
        server_id,
        ServerState.STARTING,
        ServerState.STOPPING,
        now=now,
        reason=reason,
    ):
        in_thread(manager, take_down, manager, server_id)


def in_thread(manager: Manager, work: Callable[..., None], *args: Any) -> None:
    def guarded() -> None:
        try:
            work(*args)
        except Exception:
            logger.exception("%s failed", work)
            raise

    manager.threads.submit(guarded)


# --- exits -----------------------------------------------------------------------------------


def notice_exits(manager: Manager, now: float) -> None:
    """Carry servers whose process is gone to failed; starting ones are seen by their thread."""
    for row in server_rows.live_servers(manager.store):
        child = manager.children.get(row.id)
        state = ServerState(row.state)
        if state not in (ServerState.READY, ServerState.DRAINING) or (child and child.alive()):
            continue
        lingering.note_end(manager, row.id, now)
        exit_code = child.exit_code() if child else None
        why = process.explain_exit(exit_code, process.tail(Path(row.log_path)))
        message = f"model '{row.model_id}': its llama-server {why}"
        server_rows.transition(
            manager.store,
            row.id,
            state,
            ServerState.FAILED,
            now=now,
            reason=message,
            error_code="backend_failed",
            error_message=message,
            exit_code=exit_code,
        )
        manager.children.pop(row.id, None)


def stop_all(manager: Manager, *, grace_s: float, deadline_s: float) -> None:
    """End every server: what a full stop does. Blocks until all have ended.

    Requests in flight may finish for grace_s seconds; deadline_s is for the ending after that.
    """
    reason = "the proxy is being stopped"
    now = time.time()
    for row in server_rows.live_servers(manager.store):
        unload(manager, row.model_id, reason, now)
    _until_none_live(manager, grace_s)
    for row in server_rows.live_servers(manager.store):
        if server_rows.transition(
            manager.store,
            row.id,
            ServerState.DRAINING,
            ServerState.STOPPING,
            now=time.time(),
            reason=f"{reason}; requests were still running after {grace_s:g} s",
        ):
            in_thread(manager, take_down, manager, row.id)
    _until_none_live(manager, deadline_s)


def _until_none_live(manager: Manager, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while server_rows.live_servers(manager.store) and time.monotonic() < deadline:
        time.sleep(0.02)
