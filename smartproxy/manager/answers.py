"""Answer the demands that need no decision: done already, unknown, or failed a moment ago.

Questions of kind plan are answered with what would happen to a model now, as JSON; nothing of it
is carried out. Memory is GB (2^30 bytes), as everywhere that users look.
"""

from __future__ import annotations

from typing import Any

from smartproxy.errors import ModelNotFound, SmartProxyError
from smartproxy.manager import needs, shortage
from smartproxy.manager.context import NotYet, Tools
from smartproxy.manager.failures import Failures
from smartproxy.manager.snapshot import Sources
from smartproxy.memory.types import DeviceBytes, Estimate, Layout
from smartproxy.planner import shapes
from smartproxy.planner.explain import explain
from smartproxy.planner.ledger import overhead_bytes
from smartproxy.planner.types import (
    CandidateGpu,
    Evict,
    Explanation,
    Placement,
    Snapshot,
    WaitingLoad,
)
from smartproxy.state import demands as demand_rows
from smartproxy.state import servers as server_rows
from smartproxy.state.demands import Demand
from smartproxy.state.server_row import LiveServer
from smartproxy.types import GIB, ServerState


def answer_settled(
    tools: Tools, failures: Failures, demands: list[Demand], now: float
) -> list[Demand]:
    """Answer what is settled and return the rest, oldest first."""
    if not demands:
        return []
    live = {row.model_id: row for row in server_rows.live_servers(tools.store)}
    rest = []
    for demand in demands:
        settled, code, message = _settled(
            tools, failures, demand, live.get(demand.model_id), now=now
        )
        if settled:
            demand_rows.answer(tools.store, [demand.id], now=now, error_code=code, message=message)
        else:
            rest.append(demand)
    return rest


def _settled(
    tools: Tools, failures: Failures, demand: Demand, row: LiveServer | None, *, now: float
) -> tuple[bool, str | None, str | None]:
    """Return whether a demand is settled, and the error it is answered with (None: done)."""
    if demand.model_id not in tools.catalog.models:
        return True, ModelNotFound.code, f"no model '{demand.model_id}' is configured"
    if demand.kind == "unload":
        return row is None, None, None
    if demand.kind == "plan":
        return False, None, None
    if row is not None:
        # a request takes the ready server by itself; only a person waits to be told
        return demand.explicit and row.state == ServerState.READY, None, None
    failure = failures.get(demand.model_id)
    if failure is None:
        return False, None, None
    waited_for_it = demand.asked_at <= failure.at
    if waited_for_it or (failure.holds(now) and not demand.explicit):
        return True, failure.code, failure.message
    return False, None, None


def answer_plans(sources: Sources, world: Snapshot, demands: list[Demand], now: float) -> None:
    """Answer every plan demand, once the GPUs were looked at."""
    if world.gpus is None:
        return
    for demand in demands:
        if demand.kind != "plan":
            continue
        try:
            load = _as_if_asked(sources, demand, now)
        except NotYet:
            continue
        except SmartProxyError as error:
            demand_rows.answer(
                sources.tools.store, [demand.id], now=now, error_code=error.code, message=str(error)
            )
            continue
        told = as_json(world, load, explain(world, load))
        demand_rows.answer(sources.tools.store, [demand.id], now=now, answer=told)


def _as_if_asked(sources: Sources, demand: Demand, now: float) -> WaitingLoad:
    """Return the load that a request would cause. Raises where the model's file can't be read."""
    tools, view = sources.tools, sources.view
    spec = tools.catalog.models[demand.model_id]
    return WaitingLoad(
        model_id=spec.id,
        asked_at=now,
        requests=1,
        need=shortage.ask(sources.ahead, tools, sources.shortages, spec).need,
        policy=needs.policy_of(view.gpus, spec),
    )


def as_json(view: Snapshot, load: WaitingLoad, told: Explanation) -> dict[str, Any]:
    """Return an explanation as users get it."""
    return {
        "model": told.model_id,
        "action": told.action,
        "reason": told.reason,
        "code": told.code,
        "placement": _placement(load, told.placement) if told.placement else None,
        "estimate": _estimate(view, load, told.placement),
        "candidates": [_candidate(gpu) for gpu in told.candidates],
        "headroom_memory": _gb(view.settings.headroom_bytes),
        "evictions": [_eviction(victim) for victim in told.evictions],
    }


def _placement(load: WaitingLoad, placement: Placement) -> dict[str, Any]:
    layout = placement.layout
    return {
        "gpus": [
            {"id": share.index, "uuid": share.uuid, "needed_memory": _gb(share.bytes)}
            for share in placement.gpus
        ],
        "tensor_split": list(layout.tensor_split),
        "gpu_layers": layout.gpu_layers if placement.gpus else 0,
        "layer_count": load.need.layer_count,
        "context_size": layout.context_size,
        "cpu_moe_layers": layout.cpu_moe_layers,
        "reason": placement.reason,
    }


def _estimate(view: Snapshot, load: WaitingLoad, placement: Placement | None) -> dict[str, Any]:
    """Return the memory of the placement, or of the whole model on one GPU where it has none."""
    estimate = placement.estimate if placement else _on_one_gpu(load)
    gpus = [share.index for share in placement.gpus] if placement else []
    overheads = [overhead_bytes(gpu, view) for gpu in view.gpus or ()]
    spare = 0 if placement else max(overheads, default=0)
    devices: list[dict[str, Any]] = [
        {"id": gpus[place] if gpus else None, **_parts(device, spare)}
        for place, device in enumerate(estimate.devices)
    ]
    return {
        "devices": devices,
        "host": _parts(estimate.host, 0),
        "total_memory": round(sum(device["total_memory"] for device in devices), 3),
        "confident": estimate.confident,
    }


def _on_one_gpu(load: WaitingLoad) -> Estimate:
    shape = shapes.whole(load.need, load.policy)
    return load.need.estimate(
        Layout(tensor_split=(1.0,), gpu_layers=shape.gpu_layers, context_size=shape.context_size)
    )


def _parts(device: DeviceBytes, spare_bytes: int) -> dict[str, float]:
    return {
        "weights_memory": _gb(device.weights_bytes),
        "kv_cache_memory": _gb(device.kv_cache_bytes),
        "recurrent_memory": _gb(device.recurrent_bytes),
        "compute_memory": _gb(device.compute_bytes),
        "overhead_memory": _gb(device.overhead_bytes + spare_bytes),
        "total_memory": _gb(device.total_bytes + spare_bytes),
    }


def _candidate(gpu: CandidateGpu) -> dict[str, Any]:
    return {
        "id": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "free_memory": _gb(max(0, gpu.free_bytes)),
        "free_later_memory": _gb(max(0, gpu.free_later_bytes)),
        "needed_memory": None if gpu.needed_bytes is None else _gb(gpu.needed_bytes),
        "fits": gpu.fits_now,
        "note": gpu.note,
    }


def _eviction(victim: Evict) -> dict[str, Any]:
    return {
        "server": str(victim.server_id),
        "model": victim.model_id,
        "reason": victim.reason,
        "busy": victim.drains_busy,
    }


def _gb(size_bytes: int) -> float:
    return round(size_bytes / GIB, 3)
