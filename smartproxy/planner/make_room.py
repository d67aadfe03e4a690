"""Nothing fits now: choose who makes room for a load, or say what it waits for. Pure."""

from __future__ import annotations

from enum import StrEnum

from smartproxy.planner import reasons
from smartproxy.planner.booking import Verdict, Work, is_idle, placement_of, resident_until, wait
from smartproxy.planner.ledger import LEAVING
from smartproxy.planner.longest_unused import ABOUT_THE_SAME, longest_unused
from smartproxy.planner.place import PlaceQuery, capacities
from smartproxy.planner.shapes import find_grown
from smartproxy.planner.types import Evict, Placement, RunningServer, Wait, WaitingLoad
from smartproxy.planner.victims import Victim, cheapest
from smartproxy.types import ServerState

#: seconds that a load waits for busy servers before they are drained for it (or min_residency,
#: where that is longer)
FAIR_WAIT_S = 10.0
#: part of queue_timeout that a busy server may at most serve on for having taken long to load
_MOST_OF_TIMEOUT = 0.2
#: a busy server is dearer than any number of idle ones
_BUSY_COST = 1e9


class _Keeps(StrEnum):
    """What keeps a server that could be asked to go."""

    NOTHING = "idle"
    RESIDENCY = "idle, but loaded less than min_residency ago"
    REQUESTS = "busy"
    MORE = "starting, or busy and loaded so lately that its load was not worth it yet"


def make_room(work: Work, load: WaitingLoad, query: PlaceQuery | None, code: str) -> Verdict:
    """Return who goes for a load, or what it waits for. query: None for a model on the CPU.

    In this order: idle servers go now; young ones are waited for; busy ones are waited for, and
    drained once the load has waited long; then whatever else could go one day.
    """
    groups = _grouped(work)
    idle, fresh = groups[_Keeps.NOTHING], groups[_Keeps.RESIDENCY]
    busy, more = groups[_Keeps.REQUESTS], groups[_Keeps.MORE]
    settings, now = work.snapshot.settings, work.snapshot.now
    waited_long = now - load.asked_at >= max(FAIR_WAIT_S, settings.min_residency_s)

    chosen = _choose(work, query, idle)
    if chosen is not None:
        return _evict(work, load, query, chosen, code=code)
    chosen = _choose(work, query, idle + fresh) if fresh else None
    if chosen is not None:
        until = max(resident_until(work, server) for server in chosen)
        reason = reasons.fresh(load.model_id, chosen, until - now)
        return wait(load, reason, code, _book(work, load, query, chosen))
    chosen = _choose(work, query, idle + busy) if busy else None
    if chosen is not None and waited_long:
        return _evict(work, load, query, chosen, code=code)
    if chosen is None:
        chosen = _choose(work, query, idle + fresh + busy + more)
    if chosen is None:
        return wait(load, _why_none(work, load, query), code)
    placement = _book(work, load, query, chosen) if waited_long else None
    return wait(load, reasons.in_the_way(load.model_id, chosen), code, placement)


def _grouped(work: Work) -> dict[_Keeps, list[RunningServer]]:
    """Return who could go, claimed and pinned ones and those that go already left out."""
    groups: dict[_Keeps, list[RunningServer]] = {keeps: [] for keeps in _Keeps}
    for server in work.snapshot.servers:
        if not (server.pinned or server.state in LEAVING or server.server_id in work.claimed):
            groups[_keeps(work, server)].append(server)
    return groups


def _keeps(work: Work, server: RunningServer) -> _Keeps:
    now = work.snapshot.now
    if server.state is not ServerState.READY:
        return _Keeps.MORE
    if server.busy:
        return _Keeps.MORE if _worth_its_load_at(work, server) > now else _Keeps.REQUESTS
    return _Keeps.RESIDENCY if resident_until(work, server) > now else _Keeps.NOTHING


def _worth_its_load_at(work: Work, server: RunningServer) -> float:
    """Return when a busy server has served as long as it took to load, or min_residency.

    Models that don't fit together would else spend most of the time on loading each other away.
    """
    loaded_at = server.created_at if server.ready_at is None else server.ready_at
    most_s = _MOST_OF_TIMEOUT * work.snapshot.settings.queue_timeout_s
    return max(resident_until(work, server), loaded_at + min(server.load_s, most_s))


def _choose(
    work: Work, query: PlaceQuery | None, servers: list[RunningServer]
) -> list[RunningServer] | None:
    """Return those of these servers whose end lets the load in at least cost, or None.

    Among those that cost about the same, the least recently used.
    """
    ledger = work.ledger
    victims = [_victim(work, server) for server in servers]
    capacity = capacities(query.sites, ledger.later) if query else []
    places = 1 - ledger.places_later
    chosen = cheapest(query, capacity, victims, places)
    if chosen is None:
        return None
    chosen = longest_unused(chosen, victims, query=query, capacity=capacity, places=places)
    return [victim.server for victim in chosen]


def _victim(work: Work, server: RunningServer) -> Victim:
    cost = work.cost(server, work.snapshot.now)
    return Victim(
        server=server,
        cost=cost + (0.0 if is_idle(server) else _BUSY_COST),
        tolerance=ABOUT_THE_SAME * cost,
        gains=work.ledger.gains[server.server_id],
    )


def _book(
    work: Work, load: WaitingLoad, query: PlaceQuery | None, chosen: list[RunningServer]
) -> Placement | None:
    """Count the victims' memory as coming, and as this load's; return where it goes then."""
    ledger = work.ledger
    ledger.release_later(server.server_id for server in chosen)
    work.claimed.update(server.server_id for server in chosen)
    fit = find_grown(query, capacities(query.sites, ledger.later)) if query else None
    placement = placement_of(load, query, fit, ledger.later) if query and fit else None
    ledger.take(fit.shares() if fit else (), starts=False)
    return placement


def _evict(
    work: Work,
    load: WaitingLoad,
    query: PlaceQuery | None,
    chosen: list[RunningServer],
    *,
    code: str,
) -> Verdict:
    now = work.snapshot.now
    placement = _book(work, load, query, chosen)
    evictions = tuple(
        Evict(
            server_id=server.server_id,
            model_id=server.model_id,
            for_model_id=load.model_id,
            reason=reasons.evicted(server, load.model_id, now),
            drains_busy=server.busy > 0,
        )
        for server in chosen
    )
    reason = reasons.making_room(load.model_id, chosen)
    return Verdict(
        action=Wait(model_id=load.model_id, reason=reason, code_at_timeout=code),
        evictions=evictions,
        placement=placement,
    )


def _why_none(work: Work, load: WaitingLoad, query: PlaceQuery | None) -> str:
    """Return why not even everyone's end would do: pinned servers and older loads are left."""
    size = work.snapshot.settings.pool_size
    pinned = [server.model_id for server in work.snapshot.servers if server.pinned]
    if len(pinned) >= size:
        return reasons.pool_pinned(load.model_id, size, pinned)
    return reasons.behind_others(load.model_id)
