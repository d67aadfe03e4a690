"""The state file, the last look at the GPUs and the processes as one Snapshot of plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from smartproxy.errors import SmartProxyError
from smartproxy.gpus.types import Gpu, GpuSnapshot
from smartproxy.manager import needs, shortage
from smartproxy.manager import use as recent_use
from smartproxy.manager.context import Ahead, NotYet, Preload, Tools
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.lingering import Lingering
from smartproxy.manager.shortage import Facts, Shortages
from smartproxy.manager.use import RecentUse
from smartproxy.planner.types import PlanSettings, Promise, RunningServer, Snapshot, WaitingLoad
from smartproxy.state import demands as demand_rows
from smartproxy.state import events
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments
from smartproxy.state.demands import Demand
from smartproxy.state.server_row import LiveServer
from smartproxy.types import MIB, ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a snapshot is taken of. The main thread only."""

    tools: Tools
    view: GpuView
    lingering: Lingering
    shortages: Shortages
    ahead: Ahead[Facts]
    recent: RecentUse

    @property
    def preload(self) -> Preload:
        return self.shortages.preload


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What one pass goes by. Read once: a look at the GPUs in the middle of it would contradict."""

    #: Unix seconds
    now: float
    #: None before the first look
    seen: GpuSnapshot | None

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return self.seen.gpus if self.seen is not None else ()


def snapshot(sources: Sources, demands: list[Demand], now: float) -> Snapshot:
    """Return everything the planner may look at.

    Demands whose model's need can't be known (its file is missing or unreadable) are answered with
    that reason here and do not reach the planner.
    """
    tools, lingering = sources.tools, sources.lingering
    # before the rows: who ended after this look has its memory held back until the next one
    moment = Moment(now=now, seen=sources.view.seen)
    live = server_rows.live_servers(tools.store)
    promised = assignments(tools.store)
    recent_use.count(tools.store, sources.recent, now)
    if moment.seen is not None:
        lingering.note_others(live, promised, moment.seen)
    settings = tools.settings
    return Snapshot(
        now=now,
        gpus=moment.seen.gpus if moment.seen is not None else None,
        servers=(
            *_running(sources, live, promised, demands, moment),
            *lingering.still_held({row.id for row in live}, moment.seen, now),
        ),
        loads=tuple(_waiting(sources, live, demands, moment)),
        settings=PlanSettings(
            pool_size=settings.server_pool.size,
            headroom_bytes=settings.gpu_headroom_mb * MIB,
            gpu_util_threshold=settings.gpu_util_threshold,
            gpu_mem_threshold=settings.gpu_mem_threshold,
            min_residency_s=settings.min_residency,
            queue_timeout_s=settings.queue_timeout,
        ),
        overhead_bytes=needs.overheads(tools, moment.gpus),
    )


def _running(
    sources: Sources,
    live: list[LiveServer],
    promised: Mapping[int, list[AssignmentRow]],
    demands: list[Demand],
    moment: Moment,
) -> Iterator[RunningServer]:
    wanted = Counter(demand.model_id for demand in demands if demand.kind == "load")
    for row in live:
        spec = sources.tools.catalog.models.get(row.model_id)
        use = sources.recent.uses.get(row.model_id)
        requests, tokens = recent_use.decayed(use, moment.now) if use else (0.0, 0.0)
        yield RunningServer(
            server_id=row.id,
            model_id=row.model_id,
            state=row.state,
            holds=_holds(sources.lingering, row.pid, promised.get(row.id, []), moment),
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


def _holds(
    lingering: Lingering, pid: int | None, parts: list[AssignmentRow], moment: Moment
) -> dict[str, Promise]:
    gpus = {gpu.uuid: gpu for gpu in moment.gpus}
    holds = {}
    for part in parts:
        gpu, reserved = gpus.get(part.gpu_uuid), part.reserved_bytes
        visible = lingering.visible_bytes(gpu, pid, reserved) if gpu else 0
        holds[part.gpu_uuid] = Promise(reserved_bytes=reserved, visible_bytes=visible)
    return holds


def slots_busy(row: LiveServer) -> int:
    """Return how many requests a server has by its own count, as far as that is news.

    What nginx carries has no lease. A count from before the last lease's end is of that lease.
    """
    news = row.watched_at is not None and row.watched_at >= row.used_at
    return row.slots_busy or 0 if news else 0


def _waiting(
    sources: Sources, live: list[LiveServer], demands: list[Demand], moment: Moment
) -> Iterator[WaitingLoad]:
    up = {row.model_id for row in live}
    waiting: dict[str, WaitingLoad] = {}
    for model_id, asked_at in _wanted(sources, demands, moment.now):
        if model_id in up:
            continue
        if model_id in waiting:
            earlier = waiting[model_id]
            waiting[model_id] = replace(earlier, requests=earlier.requests + 1)
            continue
        spec = sources.tools.catalog.models[model_id]
        try:
            waiting[model_id] = WaitingLoad(
                model_id=model_id,
                asked_at=asked_at,
                requests=1,
                need=shortage.ask(sources.ahead, sources.tools, sources.shortages, spec).need,
                policy=needs.policy_of(moment.gpus, spec),
            )
        except NotYet:
            continue
        except SmartProxyError as error:
            _refuse_unreadable(sources, model_id, demands, error, moment.now)
    yield from waiting.values()


def _wanted(sources: Sources, demands: list[Demand], now: float) -> Iterator[tuple[str, float]]:
    for demand in demands:
        if demand.kind == "load":
            yield demand.model_id, demand.asked_at
    for model_id in sources.preload.ids():
        yield model_id, now


def _refuse_unreadable(
    sources: Sources, model_id: str, demands: list[Demand], error: SmartProxyError, now: float
) -> None:
    ids = [demand.id for demand in demands if demand.kind == "load" and demand.model_id == model_id]
    demand_rows.answer(sources.tools.store, ids, now=now, error_code=error.code, message=str(error))
    sources.preload.discard(model_id)
    events.event(
        sources.tools.store, now, "load", f"model '{model_id}': {error}", model_id=model_id
    )


def idle_too_long(tools: Tools, demands: list[Demand], now: float) -> Iterator[tuple[str, float]]:
    """Yield model and idle seconds of ready servers past their ttl that nobody uses or wants."""
    wanted = {demand.model_id for demand in demands if demand.kind == "load"}
    for row in server_rows.live_servers(tools.store):
        spec = tools.catalog.models.get(row.model_id)
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
