"""A machine under a request trace, in simulated time, with the real planner in the middle.

Servers load, take requests, drain and stop as the manager makes them do; the clock jumps from event
to event. `plan` is called as often as the manager calls it: after every event, and once a second
while a model waits for room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count

from bench.traces import Request, Trace
from smartproxy.gpus.types import Gpu
from smartproxy.memory.types import Need
from smartproxy.planner.types import (
    Decision,
    Evict,
    PlacePolicy,
    PlanSettings,
    Promise,
    RunningServer,
    Snapshot,
    Start,
    WaitingLoad,
)
from smartproxy.planner.victims import HALF_LIFE_S
from smartproxy.types import GIB, ServerState
from tests.support.worlds import OVERHEAD_BYTES, sketch_of

#: starting a process and reading the model
START_S, READ_BYTES_PER_S = 2.0, 1.5 * GIB
#: from TERM until the memory is back
STOP_S = 1.5
TICK_S = 1.0
HEADROOM_BYTES = GIB // 4

#: what to do in this state of things
Policy = Callable[[Snapshot], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request: when it was asked, begun and done."""

    model: int
    asked_at: float
    began_at: float
    done_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    loads: int
    #: seconds that servers spent loading, all together
    loading_s: float
    served: tuple[Served, ...]


@dataclass(slots=True, kw_only=True)
class _Server:
    number: int
    model: int
    state: ServerState
    holds: dict[str, Promise]
    created_at: float
    ready_at: float | None = None
    last_used_at: float
    busy: int = 0


@dataclass(slots=True, kw_only=True)
class _Use:
    """Decaying counts of a model's late use."""

    requests: float = 0.0
    tokens: float = 0.0
    at: float = 0.0


@dataclass(slots=True, kw_only=True)
class _World:
    trace: Trace
    needs: list[Need]
    settings: PlanSettings
    now: float = 0.0
    #: (time, order, what to do then)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    orders: count[int] = field(default_factory=count)
    servers: dict[int, _Server] = field(default_factory=dict)
    #: by model: requests that no server has yet
    queues: dict[int, list[Request]] = field(default_factory=dict)
    #: models that wait for a place, with the time of the first request, oldest first
    waiting: dict[int, float] = field(default_factory=dict)
    uses: dict[int, _Use] = field(default_factory=dict)
    next_tick_at: float = -1.0
    loads: int = 0
    loading_s: float = 0.0
    served: list[Served] = field(default_factory=list)


def load_s(size: int) -> float:
    """Return how long a model of so many bytes takes to load."""
    return START_S + size / READ_BYTES_PER_S


def simulate(trace: Trace, policy: Policy, *, pool_size: int = 1000) -> Outcome:
    """Return what a policy makes of a trace."""
    world = _World(
        trace=trace,
        needs=[sketch_of(size).need() for size in trace.sizes],
        settings=PlanSettings(
            pool_size=pool_size,
            headroom_bytes=HEADROOM_BYTES,
            gpu_util_threshold=50.0,
            gpu_mem_threshold=0.5,
            min_residency_s=5.0,
            queue_timeout_s=1e9,
        ),
    )
    for request in trace.requests:
        _at(world, request.at, partial(_arrive, world, request))
    while world.events:
        world.now, _, happen = heappop(world.events)
        happen()
        if world.waiting:
            _carry_out(world, policy(snapshot(world)))
    assert not world.waiting
    assert len(world.served) == len(trace.requests)
    return Outcome(loads=world.loads, loading_s=world.loading_s, served=tuple(world.served))


def _at(world: _World, when: float, happen: Callable[[], None]) -> None:
    heappush(world.events, (when, next(world.orders), happen))


# --- what happens ----------------------------------------------------------------------------


def _arrive(world: _World, request: Request) -> None:
    _count_use(world, request)
    server = _server_of(world, request.model)
    if server is not None and server.state is ServerState.READY:
        _begin(world, server, request)
        return
    world.queues.setdefault(request.model, []).append(request)
    if server is None or server.state is not ServerState.STARTING:
        world.waiting.setdefault(request.model, world.now)


def _begin(world: _World, server: _Server, request: Request) -> None:
    server.busy += 1
    server.last_used_at = world.now
    done_at = world.now + request.duration_s
    world.served.append(
        Served(model=request.model, asked_at=request.at, began_at=world.now, done_at=done_at)
    )
    _at(world, done_at, partial(_finish, world, server))


def _finish(world: _World, server: _Server) -> None:
    server.busy -= 1
    server.last_used_at = world.now
    if server.state is ServerState.DRAINING and not server.busy:
        _stop(world, server)


def _ready(world: _World, server: _Server) -> None:
    server.state, server.ready_at = ServerState.READY, world.now
    for request in world.queues.pop(server.model, []):
        _begin(world, server, request)


def _stop(world: _World, server: _Server) -> None:
    server.state = ServerState.STOPPING
    _at(world, world.now + STOP_S, partial(world.servers.__delitem__, server.number))


def _count_use(world: _World, request: Request) -> None:
    use = world.uses.setdefault(request.model, _Use())
    left = 0.5 ** ((world.now - use.at) / HALF_LIFE_S)
    use.requests, use.tokens = use.requests * left + 1, use.tokens * left + request.tokens
    use.at = world.now


def _server_of(world: _World, model: int) -> _Server | None:
    return next((one for one in world.servers.values() if one.model == model), None)


# --- what is decided -------------------------------------------------------------------------


def _carry_out(world: _World, decision: Decision) -> None:
    assert not decision.refusals, decision.refusals
    for eviction in decision.evictions:
        _evict(world, eviction)
    for start in decision.starts:
        _start(world, start)
    if world.waiting and world.next_tick_at <= world.now:
        world.next_tick_at = world.now + TICK_S
        _at(world, world.next_tick_at, lambda: None)


def _evict(world: _World, eviction: Evict) -> None:
    server = world.servers[eviction.server_id]
    if server.busy:
        server.state = ServerState.DRAINING
    else:
        _stop(world, server)


def _start(world: _World, start: Start) -> None:
    model = int(start.model_id)
    server = _Server(
        number=world.loads,
        model=model,
        state=ServerState.STARTING,
        holds={
            share.uuid: Promise(reserved_bytes=share.bytes, visible_bytes=share.bytes)
            for share in start.placement.gpus
        },
        created_at=world.now,
        last_used_at=world.now,
    )
    world.servers[server.number] = server
    del world.waiting[model]
    took_s = load_s(world.trace.sizes[model])
    world.loads += 1
    world.loading_s += took_s
    _at(world, world.now + took_s, partial(_ready, world, server))


# --- what the planner sees -------------------------------------------------------------------


def snapshot(world: _World) -> Snapshot:
    """Return the state of things as the manager would look at it."""
    return Snapshot(
        now=world.now,
        gpus=tuple(_gpu(world, index, size) for index, size in enumerate(world.trace.cards_gb)),
        servers=tuple(_seen(world, server) for server in world.servers.values()),
        loads=tuple(
            WaitingLoad(
                model_id=str(model),
                asked_at=asked_at,
                requests=len(world.queues[model]),
                need=world.needs[model],
                policy=PlacePolicy(),
            )
            for model, asked_at in world.waiting.items()
        ),
        settings=world.settings,
        overhead_bytes={
            f"GPU-{index}": OVERHEAD_BYTES for index in range(len(world.trace.cards_gb))
        },
    )


def _gpu(world: _World, index: int, size_gb: int) -> Gpu:
    uuid, total = f"GPU-{index}", size_gb * GIB
    holds = (server.holds.get(uuid) for server in world.servers.values())
    used = sum(hold.visible_bytes for hold in holds if hold)
    return Gpu(
        index=index,
        uuid=uuid,
        name=f"Card {size_gb}",
        pci_bus_id=f"0000:{index:02x}:00.0",
        total_bytes=total,
        free_bytes=total - used,
        used_bytes=used,
    )


def _seen(world: _World, server: _Server) -> RunningServer:
    use = world.uses[server.model]
    left = 0.5 ** ((world.now - use.at) / HALF_LIFE_S)
    return RunningServer(
        server_id=server.number,
        model_id=str(server.model),
        state=server.state,
        holds=server.holds,
        busy=server.busy,
        pinned=False,
        created_at=server.created_at,
        ready_at=server.ready_at,
        last_used_at=server.last_used_at,
        load_s=server.ready_at - server.created_at if server.ready_at is not None else 0.0,
        recent_requests=use.requests * left,
        recent_tokens=use.tokens * left,
    )
