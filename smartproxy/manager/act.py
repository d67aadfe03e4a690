"""Carry out a decision: every start, eviction, wait and refusal, and what exits mean."""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from smartproxy.errors import (
    LoadFailed,
    SmartProxyError,
    StateRefused,
)
from smartproxy.manager import shortage
from smartproxy.manager.bring_down import (
    Draining,
    begin_drain,
    on_server,
)
from smartproxy.manager.bring_up import Loading, argv_of, bring_up, free_port
from smartproxy.manager.context import NotYet, Tools
from smartproxy.manager.served import settings_key
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A decision, and how long it took."""

    decision: Decision
    took_s: float

    def data(self) -> dict[str, float]:
        """Return what an event says of the decision behind it."""
        return {"decision_ms": round(self.took_s * 1000, 3)}


def carry_out(loading: Loading, decided: Decided, demands: list[Demand], now: float) -> None:
    """Do what the planner decided; every action is written down before it is begun."""
    tools, decision, preload = loading.tools, decided.decision, loading.shortages.preload
    if decision.starts or decision.evictions or decision.refusals:
        update_manager(tools.store, decision_s=decided.took_s)
    for eviction in decision.evictions:
        evict(loading, eviction, decided, now)
    for start_ in decision.starts:
        try:
            start(loading, start_, decided, now)
        except NotYet:
            continue  # the next pass has it
        except (SmartProxyError, OSError) as error:
            # no port, no such device, the file has just gone: the load's failure, not the pass's
            code = error.code if isinstance(error, SmartProxyError) else LoadFailed.code
            loading.failures.add(start_.model_id, code, f"model '{start_.model_id}': {error}")
    for refusal in decision.refusals:
        preload.discard(refusal.model_id)
        refused = Refused(model_id=refusal.model_id, code=refusal.code, message=refusal.message)
        _answer(tools, demands, refused, decided, now=now)
    for wait in decision.waits:
        late = [
            demand
            for demand in demands
            if demand.model_id == wait.model_id
            and now - demand.asked_at > tools.settings.queue_timeout
        ]
        message = (
            f"model '{wait.model_id}' still waits after {tools.settings.queue_timeout:g} s"
            f" (queue_timeout): {wait.reason}"
        )
        refused = Refused(model_id=wait.model_id, code=wait.code_at_timeout, message=message)
        _answer(tools, late, refused, decided, now=now)
    waits = {wait.model_id: wait.reason for wait in decision.waits}
    demand_rows.set_waits(tools.store, waits, now=now, data=decided.data())


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """What the requests for a model are told."""

    model_id: str
    code: str
    message: str


def _answer(
    tools: Tools, demands: list[Demand], refused: Refused, decided: Decided, *, now: float
) -> None:
    model_id, code, message = refused.model_id, refused.code, refused.message
    ids = [demand.id for demand in demands if demand.kind == "load" and demand.model_id == model_id]
    if not ids:
        return
    demand_rows.answer(tools.store, ids, now=now, error_code=code, message=message)
    events.event(
        tools.store,
        now,
        "load",
        f"model '{model_id}' refused to {len(ids)} requests: {code}: {message}",
        model_id=model_id,
        data=decided.data(),
    )


def start(loading: Loading, begun: Start, decided: Decided, now: float) -> None:
    """Write the server and what it is promised, then bring it up in a thread."""
    tools = loading.tools
    spec = tools.catalog.models[begun.model_id]
    facts = shortage.ask(loading.ahead, tools, loading.shortages, spec)
    loading.shortages.preload.discard(begun.model_id)
    placement = begun.placement
    layout, estimate = placement.layout, placement.estimate
    port = free_port(tools)
    argv = argv_of(tools, loading.view, spec, placement, port=port, loaded=facts.loaded)
    new = NewServer(
        model_id=spec.id,
        port=port,
        api_key=secrets.token_urlsafe(24),
        command=json.dumps(argv),
        log_path=str(_log_path(tools, spec.id, now)),
        settings_key=settings_key(facts.options_key, layout),
        on_cpu_for_want_of_gpu=placement.on_cpu_for_want_of_gpu,
        context_size=layout.context_size,
        parallel=spec.parallel,
        gpu_layers=layout.gpu_layers if placement.gpus else 0,
        layer_count=facts.loaded.metadata.layer_count + 1,
        tensor_split=",".join(f"{share:g}" for share in layout.tensor_split),
        estimated_bytes=sum(share.bytes for share in placement.gpus),
        host_estimated_bytes=estimate.host.total_bytes,
    )
    try:
        server_id = server_rows.insert_server(
            tools.store,
            new,
            [_assigned(share) for share in placement.gpus],
            now=now,
            reason=placement.reason,
            data=decided.data(),
        )
    except StateRefused as error:
        # an index refused a second live server: the next pass sees the first
        logger.error("model '%s' not started: %s", spec.id, error)
        return
    on_server(loading, server_id, bring_up, spec, placement)


def _assigned(share: GpuShare) -> NewAssignment:
    return NewAssignment(
        gpu_uuid=share.uuid,
        gpu_index=share.index,
        estimated_bytes=share.bytes,
        free_bytes=share.free_bytes,
    )


def _log_path(tools: Tools, model_id: str, now: float) -> Path:
    safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in model_id).lstrip(".")
    return tools.log_dir / f"{safe[:80]}-{int(now * 1000)}.log"


def evict(loading: Loading, eviction: Evict, decided: Decided, now: float) -> None:
    """Drain a victim; it stops when its last request is done. One that only moves comes back."""
    tools = loading.tools
    row = server_rows.server(tools.store, eviction.server_id)
    if row.state != ServerState.READY:
        return
    how = Draining(only_if_idle=not eviction.drains_busy, data=decided.data())
    if not begin_drain(loading, row.id, eviction.reason, how, now=now):
        return
    if eviction.for_model_id == eviction.model_id:
        loading.shortages.preload.add(eviction.model_id)
    else:
        counts.add_eviction(tools.store, eviction.model_id)
