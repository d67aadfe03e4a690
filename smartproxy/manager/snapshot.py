"""The state file, the last look at the GPUs and the processes as one Snapshot of plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from smartproxy.errors import SmartProxyError
from smartproxy.manager import lessons, lingering, needs, shortage
from smartproxy.manager import use as recent_use
from smartproxy.manager.context import Manager
from smartproxy.planner.types import Hold, PlanSettings, RunningServer, Snapshot, WaitingLoad
from smartproxy.state import demands as demand_rows
from smartproxy.state import events
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments
from smartproxy.state.demands import Demand
from smartproxy.state.server_row import LiveServer
from smartproxy.types import MIB, ServerState


def snapshot(manager: Manager, demands: list[Demand], now: float) -> Snapshot:
    """Return everything the planner may look at.

    Demands whose model's need can't be known (its file is missing or unreadable) are answered with
    that reason here and do not reach the planner.
    """
    live = server_rows.live_servers(manager.store)
    promised = assignments(manager.store)
    recent_use.count(manager.store, manager.recent, now)
    lingering.note_others(manager, live, promised)
    gpus = manager.gpus.gpus if manager.gpus else None
    settings = manager.settings
    return Snapshot(
        now=now,
        gpus=gpus,
        servers=(
            *_running(manager, live, promised, (demands, now)),
            *lingering.still_held(manager, {row.id for row in live}, now),
        ),
        loads=tuple(_waiting(manager, live, demands, now)),
        settings=PlanSettings(
            pool_size=settings.server_pool.size,
            headroom_bytes=settings.gpu_headroom_mb * MIB,
            gpu_util_threshold=settings.gpu_util_threshold,
            gpu_mem_threshold=settings.gpu_mem_threshold,
            min_residency_s=settings.min_residency,
            queue_timeout_s=settings.queue_timeout,
        ),
        overhead_bytes=lessons.overheads(manager),
    )


def _running(
    manager: Manager,
    live: list[LiveServer],
    promised: Mapping[int, list[AssignmentRow]],
    asked: tuple[list[Demand], float],
) -> Iterator[RunningServer]:
    demands, now = asked
    wanted = Counter(wish.model_id for wish in demands if wish.kind == "load")
    for row in live:
        spec = manager.catalog.models.get(row.model_id)
        use = manager.recent.uses.get(row.model_id)
        requests, tokens = recent_use.decayed(use, now) if use else (0.0, 0.0)
        yield RunningServer(
            server_id=row.id,
            model_id=row.model_id,
            state=row.state,
            holds=_holds(manager, row.pid, promised.get(row.id, [])),
            # who waits for a server that is ready is about to use it
            busy=max(row.leased, slots_busy(row)) + wanted[row.model_id],
            pinned=bool(spec and spec.pinned),
            created_at=row.created_at,
            ready_at=row.ready_at,
            last_used_at=row.used_at,
            load_s=row.load_s or 0.0,
            recent_requests=requests,
            recent_tokens=tokens,
            on_cpu_for_want_of_gpu=row.on_cpu_for_want_of_gpu,
        )


def _holds(manager: Manager, pid: int | None, parts: list[AssignmentRow]) -> dict[str, Hold]:
    gpus = {gpu.uuid: gpu for gpu in (manager.gpus.gpus if manager.gpus else ())}
    holds = {}
    for part in parts:
        gpu, reserved = gpus.get(part.gpu_uuid), part.reserved_bytes
        visible = lingering.visible_bytes(manager, gpu, pid, reserved) if gpu else 0
        holds[part.gpu_uuid] = Hold(reserved_bytes=reserved, visible_bytes=visible)
    return holds


def slots_busy(row: LiveServer) -> int:
    """Return how many requests a server has by its own count, as far as that is news.

    What nginx carries has no lease. A count from before the last lease's end is of that lease.
    """
    news = row.watched_at is not None and row.watched_at >= row.used_at
    return row.slots_busy or 0 if news else 0


def _waiting(
    manager: Manager, live: list[LiveServer], demands: list[Demand], now: float
) -> Iterator[WaitingLoad]:
    up = {row.model_id for row in live}
    waiting: dict[str, WaitingLoad] = {}
    for model_id, asked_at in _wanted(manager, demands, now):
        if model_id in up:
            continue
        if model_id in waiting:
            earlier = waiting[model_id]
            waiting[model_id] = replace(earlier, requests=earlier.requests + 1)
            continue
        spec = manager.catalog.models[model_id]
        try:
            waiting[model_id] = WaitingLoad(
                model_id=model_id,
                asked_at=asked_at,
                expires_at=asked_at + manager.settings.queue_timeout,
                requests=1,
                need=shortage.need_of(manager, spec),
                policy=needs.policy_of(manager, spec),
            )
        except SmartProxyError as error:
            _refuse_unreadable(manager, model_id, demands, error, now)
    yield from waiting.values()


def _wanted(manager: Manager, demands: list[Demand], now: float) -> Iterator[tuple[str, float]]:
    for wish in demands:
        if wish.kind == "load":
            yield wish.model_id, wish.asked_at
    for model_id in sorted(manager.preload):
        yield model_id, now


def _refuse_unreadable(
    manager: Manager, model_id: str, demands: list[Demand], error: SmartProxyError, now: float
) -> None:
    ids = [wish.id for wish in demands if wish.kind == "load" and wish.model_id == model_id]
    demand_rows.answer(
        manager.store, ids, now=now, error_code="model_load_failed", message=str(error)
    )
    manager.preload.discard(model_id)
    events.event(manager.store, now, "load", f"model '{model_id}': {error}", model_id=model_id)


def idle_too_long(
    manager: Manager, demands: list[Demand], now: float
) -> Iterator[tuple[str, float]]:
    """Yield model and idle seconds of ready servers past their ttl that nobody uses or wants."""
    wanted = {wish.model_id for wish in demands if wish.kind == "load"}
    for row in server_rows.live_servers(manager.store):
        spec = manager.catalog.models.get(row.model_id)
        idle_s = now - row.used_at
        if (
            row.state == ServerState.READY
            and spec is not None
            and spec.ttl_s
            and not spec.pinned
            and not row.leased
            and not slots_busy(row)
            and row.model_id not in wanted
            and idle_s > spec.ttl_s
        ):
            yield row.model_id, idle_s
