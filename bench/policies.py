"""The policies that `bench.policy` compares: all place alike, with our planner; victims differ."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

from bench.simulator import Policy, load_s
from bench.traces import Trace
from smartproxy.planner import victims
from smartproxy.planner.booking import Cost
from smartproxy.planner.plan import plan
from smartproxy.planner.types import Decision, RunningServer, Snapshot
from smartproxy.types import GIB, ServerState


def ours(trace: Trace) -> Policy:
    return plan


def plain_lru(trace: Trace) -> Policy:
    """Whoever was used least lately goes, if that helps; nothing else counts."""

    def decide(snapshot: Snapshot) -> Decision:
        used_at = {server.server_id: server.last_used_at for server in snapshot.servers}
        return plan(snapshot, cost=_by_order(snapshot, used_at))

    return decide


def _by_order(snapshot: Snapshot, worths: Mapping[int, float]) -> Cost:
    """Return costs by which any one server is dearer than all of less worth together."""
    order = sorted(snapshot.servers, key=lambda s: (worths[s.server_id], s.server_id))
    costs = {server.server_id: 2.0**rank for rank, server in enumerate(order)}
    return lambda server, now: costs[server.server_id]


def count_lru(trace: Trace) -> Policy:
    """A fixed number of models, whatever their size (--models-max of llama-server's router).

    The number is what fits of the average model. The router knows nothing of memory: it would fail
    where they happen to be bigger; here it is spared that, it evicts more, least lately used first.
    """
    lru = plain_lru(trace)
    mean_bytes = sum(trace.sizes) / len(trace.sizes)
    pool_size = max(1, int(sum(trace.cards_gb) * GIB / mean_bytes))

    def decide(snapshot: Snapshot) -> Decision:
        return lru(replace(snapshot, settings=replace(snapshot.settings, pool_size=pool_size)))

    return decide


def evict_all(trace: Trace) -> Policy:
    """Where something has to go, everything idle goes."""
    lru = plain_lru(trace)

    def decide(snapshot: Snapshot) -> Decision:
        decision = lru(snapshot)
        if not decision.evictions:
            return decision
        why = decision.evictions[0]
        chosen = {eviction.server_id for eviction in decision.evictions}
        others = [
            replace(why, server_id=server.server_id, model_id=server.model_id, drains_busy=False)
            for server in snapshot.servers
            if server.state is ServerState.READY and not server.busy
        ]
        added = [eviction for eviction in others if eviction.server_id not in chosen]
        return replace(decision, evictions=(*decision.evictions, *added))

    return decide


def greedy_dual(trace: Trace) -> Policy:
    """GreedyDual-Size-Frequency: lowest first goes what `floor + requests * load time / size` says.

    The floor is what the last victim had; a model gets today's floor whenever it is used. Source:
    Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching", 1998.
    """
    arrivals = _arrivals(trace)
    floors: list[tuple[float, float]] = [(-1.0, 0.0)]

    def worth(server: RunningServer, now: float) -> float:
        model = int(server.model_id)
        times = arrivals[model]
        last = times[bisect_right(times, now) - 1]
        since_loaded = bisect_right(times, now) - bisect_right(times, server.created_at)
        floor = next(value for at, value in reversed(floors) if at < last)
        size = trace.sizes[model]
        return floor + (1 + since_loaded) * load_s(size) / (size / GIB)

    def decide(snapshot: Snapshot) -> Decision:
        worths = {server.server_id: worth(server, snapshot.now) for server in snapshot.servers}
        decision = plan(snapshot, cost=_by_order(snapshot, worths))
        if decision.evictions:
            lost = max(worths[eviction.server_id] for eviction in decision.evictions)
            floors.append((snapshot.now, max(floors[-1][1], lost)))
        return decision

    return decide


def told_popularity(trace: Trace) -> Policy:
    """Our formula with the true popularity of each model in place of its guess of it."""

    def cost(server: RunningServer, now: float) -> float:
        model = int(server.model_id)
        return _price(trace.sizes[model]) * trace.popularity(now)[model]

    return lambda snapshot: plan(snapshot, cost=cost)


def belady(trace: Trace) -> Policy:
    """Knows the future: Belady's rule on sizes.

    Whoever is asked for again last goes first; what a victim costs is our formula with the squared
    inverse of the time to its next request for a rate, the best of those we tried.
    """
    arrivals = _arrivals(trace)

    def cost(server: RunningServer, now: float) -> float:
        model = int(server.model_id)
        next_at = bisect_right(arrivals[model], now)
        if next_at == len(arrivals[model]):
            return 1e-12
        return _price(trace.sizes[model]) / (arrivals[model][next_at] - now + 1e-3) ** 2

    return lambda snapshot: plan(snapshot, cost=cost)


def _price(size: int) -> float:
    """Return evict.cost's part that does not depend on use."""
    return (victims.SWAP_S + load_s(size)) / (size / GIB) ** victims.SIZE_EXPONENT


def _arrivals(trace: Trace) -> dict[int, list[float]]:
    """Return when each model is asked for."""
    arrivals: dict[int, list[float]] = {}
    for request in trace.requests:
        arrivals.setdefault(request.model, []).append(request.at)
    return arrivals
