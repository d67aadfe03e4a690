"""Decide for one waiting load: start it, let it wait for what is being freed, or refuse it.

Input: the work in hand and a load. Output: a Verdict; what it takes or waits for is booked. Pure.
Who makes room is chosen in make_room.
"""

from __future__ import annotations

from dataclasses import replace

from smartproxy.errors import GpuMemoryBusy, NoFit, PoolBusy
from smartproxy.planner import reasons, shapes
from smartproxy.planner.booking import (
    Verdict,
    Work,
    await_coming,
    placement_of,
    query_of,
    start,
    wait,
)
from smartproxy.planner.ledger import LEAVING, overhead_bytes
from smartproxy.planner.make_room import make_room
from smartproxy.planner.place import PlaceQuery, capacities, find, most_gpus, sites_for, splittable
from smartproxy.planner.sizes import Sizes
from smartproxy.planner.types import Placement, Refuse, WaitingLoad


def decide(work: Work, load: WaitingLoad) -> Verdict:
    """Return one load's verdict and book what it takes or waits for."""
    server = work.live.get(load.model_id)
    if server is not None:
        reason = f"model '{load.model_id}' has a server: it is {server.state.value}"
        return wait(load, reason, GpuMemoryBusy.code)
    if work.snapshot.gpus is None:
        reason = f"model '{load.model_id}' waits for the first look at the GPUs"
        return wait(load, reason, GpuMemoryBusy.code)
    if load.policy.force_cpu:
        return _on_cpu(work, load, "`cpu` is set for it")
    if load.policy.gpu_layers == 0:
        return _on_cpu(work, load, "its `gpu_layers` is 0")
    if not work.snapshot.gpus:
        return _on_cpu(work, load, "there is no GPU", for_want_of_gpu=True)
    return _on_gpu(work, load, query_of(work, load))


def _on_cpu(work: Work, load: WaitingLoad, why: str, *, for_want_of_gpu: bool = False) -> Verdict:
    """Return a load's verdict where only places count: host memory is the system's to divide."""
    estimate = Sizes(need=load.need).estimate(shapes.on_cpu(load.need), ())
    placement = Placement(
        gpus=(),
        layout=estimate.layout,
        estimate=estimate,
        reason=reasons.on_cpu(load.model_id, why),
        on_cpu_for_want_of_gpu=for_want_of_gpu,
    )
    if min(work.ledger.places_now, work.ledger.places_later) > 0:
        return start(work, load, placement)
    if work.ledger.places_later > 0:
        return await_coming(work, load, (placement, None), PoolBusy.code)
    return replace(make_room(work, load, None, PoolBusy.code), placement=placement)


def _on_gpu(work: Work, load: WaitingLoad, query: PlaceQuery) -> Verdict:
    """Return a load's verdict: now, when what leaves is gone, or after evictions."""
    ledger = work.ledger
    room = ledger.room()
    fit = shapes.find_grown(query, capacities(query.sites, room))
    if fit is None:
        within_reach = _within_reach(work, load, query)
        if isinstance(within_reach, Verdict):
            return within_reach
        if within_reach is not query:
            query = within_reach
            fit = shapes.find_grown(query, capacities(query.sites, room))
    if fit is not None and min(ledger.places_now, ledger.places_later) > 0:
        return start(work, load, placement_of(load, query, fit, room), fit)
    code = PoolBusy.code if fit is not None else GpuMemoryBusy.code
    goal = shapes.find_grown(query, capacities(query.sites, ledger.later))
    if goal is not None and ledger.places_later > 0:
        placement = placement_of(load, query, goal, ledger.later)
        return await_coming(work, load, (placement, goal), code)
    return make_room(work, load, query, code)


def _within_reach(work: Work, load: WaitingLoad, query: PlaceQuery) -> PlaceQuery | Verdict:
    """Return the query in a shape that we could make room for, or what happens instead.

    We could end every server that is not pinned; strangers' memory is not ours to free. Where it is
    not clear whose memory is, no model is sent to the CPU for it: a later look tells.
    """
    ledger = work.ledger
    reach = [free + unclear for free, unclear in zip(ledger.at_first, ledger.unclear, strict=True)]
    for server in work.snapshot.servers:
        if not server.pinned or server.state in LEAVING:
            for position, size in ledger.gains[server.server_id]:
                reach[position] += size
    capacity = capacities(query.sites, reach)
    if find(query, capacity) is not None:
        return query
    if load.policy.partial_offload and load.policy.gpu_layers is None:
        shape = shapes.partial(query, capacity)
        if shape is not None:
            return replace(query, shape=shape)
    if load.policy.cpu_fallback:
        why = "the GPUs can't give it enough, and cpu_fallback is set"
        return _on_cpu(work, load, why, for_want_of_gpu=not work.ledger.gpus)
    return _out_of_reach(work, load, query, reach)


def _out_of_reach(work: Work, load: WaitingLoad, query: PlaceQuery, reach: list[int]) -> Verdict:
    """Refuse what would not fit the machine if it were empty; else strangers may leave: wait."""
    gpus = work.snapshot.gpus or ()
    settings = work.snapshot.settings
    sites = sites_for(
        load.policy, gpus, [overhead_bytes(gpu, work.snapshot) for gpu in gpus], settings
    )
    empty = [gpu.total_bytes - settings.headroom_bytes for gpu in gpus]
    machine = replace(query, sites=sites, max_gpus=load.policy.max_gpus or len(sites))
    needed, available, count = _needed(machine, empty)
    if find(machine, capacities(sites, empty)) is None:
        message = reasons.too_big(load.model_id, needed, available, count)
        code = NoFit.code
        action = Refuse(model_id=load.model_id, code=code, message=message)
        return Verdict(action=action)
    free = {gpu.uuid: free for gpu, free in zip(work.ledger.gpus, reach, strict=True)}
    states = [reasons.gpu_state(site.gpu, free.get(site.gpu.uuid, 0)) for site in sites]
    pinned = [server.model_id for server in work.snapshot.servers if server.pinned]
    reason = reasons.blocked(load.model_id, needed, states, pinned)
    return wait(load, reason, GpuMemoryBusy.code)


def _needed(machine: PlaceQuery, empty: list[int]) -> tuple[int, int, int]:
    """Return bytes needed over the largest set of GPUs, overhead included, its bytes and size."""
    count = max(1, most_gpus(machine))
    sites = splittable(machine.sites) if count > 1 else machine.sites
    largest = sorted(sites, key=lambda site: -empty[site.position])[:count]
    sizes, shape = machine.sizes, machine.shape
    if count < 2:
        needed = sizes.single_bytes(shape)
    else:
        needed = sizes.layer_sums(shape)[-1] + sum(sizes.fixed_bytes(shape, count))
    needed += sum(site.overhead_bytes for site in largest)
    return needed, sum(empty[site.position] for site in largest), len(largest)
