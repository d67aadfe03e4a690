"""Who makes room: the cheapest set of servers whose end lets a model fit.

Input: a query, what each GPU can give, and servers that may be chosen, each with a cost. Output: a
set of victims every one of which is necessary, or None. Pure.

What a victim costs is the time that its model's requests are expected to wait for it to come back,
per second from now on:

    cost = (SWAP_S + reload_s) * (requests/s expected) / GB^0.2

`reload_s` is how long it took to load (where unknown, its bytes at _BYTES_PER_S). SWAP_S stands for
what a swap costs whatever the size: stopping, waiting for the memory, starting, and the prompts it
had in its cache. The rate is the mean of what two views of its past predict:

- the decayed count of its requests over the window that count covers: how much it is used (tokens
  count too: TOKENS_PER_REQUEST of them as one request);
- one request over the time since the last one: how long it has been silent.

Both fall as a model stays silent, so among servers alike in load time, size and use the cheapest is
the least recently used; where only chance made their costs differ, longest_unused.py sees to that.
How much room is needed is the search's business, which adds up costs until it is enough; dividing
by a little of the size is for what it can't see: room left over spares the next load an eviction.
SWAP_S, the half-life and the exponent were chosen on simulated traces (`python -m bench.policy`;
docs/placing.md says how, and what they are worth).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

from smartproxy.planner.place import PlaceQuery, find, several_allowed
from smartproxy.planner.types import RunningServer, Strategy
from smartproxy.types import GIB

#: seconds in which recent_requests and recent_tokens fall to half; who fills them must use it
HALF_LIFE_S = 3600.0
#: seconds that a swap costs beside the load itself
SWAP_S = 20.0
#: tokens that weigh like one request more
TOKENS_PER_REQUEST = 2000.0
#: a server used this moment is not infinitely dear
_SILENCE_FLOOR_S = 5.0
#: nor is one without any memory of a GPU
_LEAST_BYTES = GIB // 2
_BYTES_PER_S = GIB
SIZE_EXPONENT = 0.2

#: exact search up to this many servers on one GPU: 4096 sets
_EXACT_SERVERS = 12
#: sets looked at for a place over several GPUs before the search turns greedy
_EXACT_SETS = 200
#: and none where more victims than that are needed: the cheapest sets are small ones
_EXACT_VICTIMS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A server that may be chosen."""

    server: RunningServer
    cost: float
    #: how much more a server in its place may cost and still count as costing about the same
    tolerance: float
    #: (position, bytes) that each GPU gets back
    gains: tuple[tuple[int, int], ...]


def cost(server: RunningServer, now: float) -> float:
    """Return what a server's end costs (see above); comparable with others', no unit."""
    silent_s = max(0.0, now - server.last_used_at)
    used = server.recent_requests + server.recent_tokens / TOKENS_PER_REQUEST
    by_count = used * math.log(2) / HALF_LIFE_S
    by_silence = 1.0 / (_SILENCE_FLOOR_S + silent_s)
    held_bytes = sum(hold.reserved_bytes for hold in server.holds.values())
    reload_s = server.load_s or held_bytes / _BYTES_PER_S
    size = math.pow(max(held_bytes, _LEAST_BYTES) / GIB, SIZE_EXPONENT)
    return (SWAP_S + reload_s) * (by_count + by_silence) / 2 / size


def cheapest(
    query: PlaceQuery | None, capacity: Sequence[int], victims: Sequence[Victim], places: int
) -> tuple[Victim, ...] | None:
    """Return the victims that make a query fit and free this many places in the pool, or None.

    query: None for a model on the CPU, which needs places only. capacity: bytes for buffers by
    position. A single GPU is preferred at equal cost. Put any one victim back and it doesn't fit.
    """
    order = sorted(victims, key=lambda v: (v.cost, v.server.last_used_at, v.server.server_id))
    chosen = () if query is None else _for_memory(query, capacity, order)
    if chosen is None:
        return None
    rest = [victim for victim in order if victim not in chosen]
    missing = max(0, places - len(chosen))
    return (*chosen, *rest[:missing]) if missing <= len(rest) else None


def _for_memory(
    query: PlaceQuery, capacity: Sequence[int], order: Sequence[Victim]
) -> tuple[Victim, ...] | None:
    """Return victims, cheapest set first; `order` is sorted by cost."""
    positions = {site.position for site in query.sites}
    gained = {
        victim.server.server_id: sum(size for p, size in victim.gains if p in positions)
        for victim in order
    }
    order = [victim for victim in order if gained[victim.server.server_id]]
    missing = _least_bytes(query) - sum(max(0, capacity[p]) for p in positions)

    def fits(chosen: Sequence[Victim]) -> bool:
        if sum(gained[victim.server.server_id] for victim in chosen) < missing:
            return False  # spares the dear question in most cases
        return find(query, with_gains(capacity, chosen)) is not None

    if not fits(order):
        return None
    if fits(()):
        return ()
    if query.strategy is not Strategy.DISTRIBUTE or not several_allowed(query):
        chosen = _on_one_gpu(query, capacity, order)
        if chosen is not None:
            # a part of them may do over several GPUs
            return pruned(chosen, fits) if several_allowed(query) else chosen
    few = sorted(gained.values(), reverse=True)[:_EXACT_VICTIMS]
    return _over_several(order, fits, sets=_EXACT_SETS if sum(few) >= missing else 0)


def _least_bytes(query: PlaceQuery) -> int:
    """Return bytes that a model takes of all its GPUs together, or more."""
    alone = query.sizes.single_bytes(query.shape)
    if not several_allowed(query):
        return alone
    # measured, a layout can take less than its layers by themselves do (tensors moved by hand)
    return min(alone, query.sizes.layer_sums(query.shape)[-1])


def with_gains(capacity: Sequence[int], chosen: Sequence[Victim]) -> list[int]:
    """Return the capacities once these servers are gone."""
    after = list(capacity)
    for victim in chosen:
        for position, size in victim.gains:
            after[position] += size
    return after


def _on_one_gpu(
    query: PlaceQuery, capacity: Sequence[int], order: Sequence[Victim]
) -> tuple[Victim, ...] | None:
    """Return the cheapest set that makes the whole model fit on one GPU, over all of them."""
    best: tuple[Victim, ...] | None = None
    best_cost = math.inf
    needed = query.sizes.single_bytes(query.shape)
    for site in query.sites:
        missing = needed - capacity[site.position]
        items = [(victim, dict(victim.gains).get(site.position, 0)) for victim in order]
        chosen = _cover([item for item in items if item[1] > 0], missing, best_cost)
        if chosen is not None:
            best, best_cost = chosen, sum(victim.cost for victim in chosen)
    return best


def _cover(
    items: Sequence[tuple[Victim, int]], missing: int, bound: float
) -> tuple[Victim, ...] | None:
    """Return the cheapest victims that give `missing` bytes for less than `bound`, or None.

    Exact for few (branch and bound: dear or useless branches are cut); greedy and pruned for many.
    """
    if sum(gain for _, gain in items) < missing:
        return None
    if len(items) > _EXACT_SERVERS:
        return _greedy_cover(items, missing, bound)
    after = [sum(gain for _, gain in items[i:]) for i in range(len(items) + 1)]
    best: tuple[Victim, ...] | None = None

    def take(index: int, chosen: tuple[Victim, ...], spent: float, lacking: int) -> None:
        nonlocal best, bound
        if spent >= bound:
            return
        if lacking <= 0:
            best, bound = chosen, spent
            return
        if index == len(items) or after[index] < lacking:
            return
        victim, gain = items[index]
        take(index + 1, (*chosen, victim), spent + victim.cost, lacking - gain)
        take(index + 1, chosen, spent, lacking)

    take(0, (), 0.0, missing)
    return best


def _greedy_cover(
    items: Sequence[tuple[Victim, int]], missing: int, bound: float
) -> tuple[Victim, ...] | None:
    by_worth = sorted(items, key=lambda item: item[0].cost / min(item[1], missing))
    gains = {item[0].server.server_id: item[1] for item in items}

    def covers(chosen: Sequence[Victim]) -> bool:
        return sum(gains[victim.server.server_id] for victim in chosen) >= missing

    chosen = pruned(_prefix([item[0] for item in by_worth], covers), covers)
    return chosen if sum(victim.cost for victim in chosen) < bound else None


def _over_several(
    order: Sequence[Victim], fits: Callable[[Sequence[Victim]], bool], *, sets: int
) -> tuple[Victim, ...]:
    """Return the cheapest set by trying so many in order of cost; then by cost per byte."""
    for chosen in islice(_sets_by_cost(order), sets):
        if fits(chosen):
            return chosen
    by_worth = sorted(order, key=lambda v: v.cost / sum(size for _, size in v.gains))
    return pruned(_prefix(by_worth, fits), fits)


def _sets_by_cost(order: Sequence[Victim]) -> Iterator[tuple[Victim, ...]]:
    """Yield sets of victims, cheapest first; `order` is sorted by cost.

    Each set has two successors, with its last victim replaced by the next one and with the next
    one added: neither is cheaper, and every set has exactly one predecessor.
    """
    heap: list[tuple[float, tuple[int, ...]]] = [(order[0].cost, (0,))] if order else []
    while heap:
        total, picked = heappop(heap)
        yield tuple(order[index] for index in picked)
        last = picked[-1]
        if last + 1 < len(order):
            more = order[last + 1].cost
            heappush(heap, (total + more, (*picked, last + 1)))
            heappush(heap, (total - order[last].cost + more, (*picked[:-1], last + 1)))


def _prefix(
    order: Sequence[Victim], enough: Callable[[Sequence[Victim]], bool]
) -> tuple[Victim, ...]:
    """Return as many of the first as are enough; all together are."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if enough(order[:middle]):
            high = middle
        else:
            low = middle + 1
    return tuple(order[:low])


def pruned(
    chosen: Sequence[Victim], enough: Callable[[Sequence[Victim]], bool]
) -> tuple[Victim, ...]:
    """Return the set without those it can do without, the dearest spared first."""
    kept = list(chosen)
    for victim in sorted(chosen, key=lambda v: -v.cost):
        rest = [other for other in kept if other is not victim]
        if enough(rest):
            kept = rest
    return tuple(kept)
