"""What holds of every decision, over generated machines: GPUs, servers, strangers, loads.

The oracles here count for themselves, from the snapshot; they share no code with the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from smartproxy.gpus.types import Gpu
from smartproxy.memory.types import Layout
from smartproxy.planner.explain import explain
from smartproxy.planner.plan import plan
from smartproxy.planner.types import (
    Decision,
    Placement,
    Promise,
    RunningServer,
    Snapshot,
    Strategy,
    WaitingLoad,
)
from smartproxy.types import GIB, ServerState
from tests.support.examples import examples
from tests.support.worlds import OVERHEAD_BYTES, split_worlds, worlds

generated = settings(
    max_examples=examples(100),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
LEAVING = (ServerState.DRAINING, ServerState.STOPPING)


# --- oracles ---------------------------------------------------------------------------------


def free_bytes(world: Snapshot, *, without: tuple[int, ...] = ()) -> dict[str, int]:
    """Return per healthy GPU what total, strangers, promises and headroom leave."""
    free = {}
    for gpu in world.gpus or ():
        if gpu.error is None:
            holds = [
                (one.server_id, one.holds[gpu.uuid])
                for one in world.servers
                if gpu.uuid in one.holds
            ]
            strangers = gpu.used_bytes - sum(hold.visible_bytes for _, hold in holds)
            promised = sum(h.reserved_bytes for number, h in holds if number not in without)
            free[gpu.uuid] = gpu.total_bytes - strangers - promised - world.settings.headroom_bytes
    return free


def fits_on(load: WaitingLoad, counts: tuple[int, ...], free: list[int], context: int) -> bool:
    """Return whether layers in these counts fit on GPUs with this much free."""
    layout = Layout(
        tensor_split=tuple(map(float, counts)),
        gpu_layers=sum(counts),
        context_size=context,
    )
    devices = load.need.estimate(layout).devices
    return all(d.total_bytes + OVERHEAD_BYTES <= f for d, f in zip(devices, free, strict=True))


def layers_of(load: WaitingLoad) -> int:
    fixed = load.policy.gpu_layers
    return load.need.layer_count if fixed is None else min(fixed, load.need.layer_count)


def allowed(world: Snapshot, load: WaitingLoad) -> list[Gpu]:
    uuids = load.policy.allowed_uuids
    return [g for g in world.gpus or () if g.error is None and (uuids is None or g.uuid in uuids)]


def divisions(layers: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to give at least one layer to each of `count` GPUs."""
    for cuts in combinations(range(1, layers), count - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True))


def fits_over(world: Snapshot, load: WaitingLoad, count: int, free: dict[str, int]) -> bool:
    """Return whether any `count` allowed GPUs can hold the model, biggest first; by trying all."""
    context = load.need.context_size or 4096
    cards = sorted(allowed(world, load), key=lambda g: -free[g.uuid])
    if count > 1:
        cards = [card for card in cards if not card.mig]
    return any(
        fits_on(load, counts, [free[card.uuid] for card in chosen], context)
        for chosen in combinations(cards, count)
        for counts in divisions(layers_of(load), count)
    )


def on_gpu(load: WaitingLoad) -> bool:
    return not load.policy.force_cpu and layers_of(load) > 0


def without_servers(world: Snapshot, gone: set[int]) -> Snapshot:
    """Return the world in which these servers have ended and their memory is back."""
    ended = [one for one in world.servers if one.server_id in gone]
    gpus = []
    for gpu in world.gpus or ():
        back = sum(one.holds[gpu.uuid].visible_bytes for one in ended if gpu.uuid in one.holds)
        gpus.append(
            replace(gpu, used_bytes=gpu.used_bytes - back, free_bytes=gpu.free_bytes + back)
        )
    left = tuple(one for one in world.servers if one.server_id not in gone)
    return replace(world, gpus=tuple(gpus), servers=left)


def outcomes(decision: Decision) -> list[str]:
    every = (*decision.starts, *decision.waits, *decision.refusals)
    return sorted(one.model_id for one in every)


# --- properties ------------------------------------------------------------------------------


@generated
@given(worlds())
def test_every_load_gets_exactly_one_outcome_and_a_reason(world: Snapshot) -> None:
    decision = plan(world)
    assert outcomes(decision) == sorted(load.model_id for load in world.loads)
    assert all(start.placement.reason for start in decision.starts)
    assert all(wait.reason for wait in decision.waits)
    assert all(eviction.reason for eviction in decision.evictions)


@generated
@given(worlds())
def test_no_gpu_is_ever_oversubscribed(world: Snapshot) -> None:
    free = free_bytes(world)
    for start in plan(world).starts:
        load = next(one for one in world.loads if one.model_id == start.model_id)
        estimate = load.need.estimate(start.placement.layout)
        assert len(estimate.devices) == len(start.placement.gpus)
        for share, device in zip(start.placement.gpus, estimate.devices, strict=True):
            assert share.bytes == device.total_bytes + OVERHEAD_BYTES
            assert device.weights_bytes > 0
            free[share.uuid] -= share.bytes
            assert free[share.uuid] >= 0


@generated
@given(worlds())
def test_pool_is_never_overfull(world: Snapshot) -> None:
    starts = plan(world).starts
    assert not starts or len(world.servers) + len(starts) <= world.settings.pool_size


@generated
@given(worlds())
def test_model_goes_only_where_its_policy_allows(world: Snapshot) -> None:
    for start in plan(world).starts:
        load = next(one for one in world.loads if one.model_id == start.model_id)
        may = {gpu.uuid for gpu in allowed(world, load)}
        assert {share.uuid for share in start.placement.gpus} <= may
        assert len(start.placement.gpus) <= (load.policy.max_gpus or 99)
        assert on_gpu(load) or not start.placement.gpus


@generated
@given(worlds())
def test_a_slice_of_a_gpu_is_never_one_of_several(world: Snapshot) -> None:
    slices = {gpu.uuid for gpu in world.gpus or () if gpu.mig}
    for start in plan(world).starts:
        uuids = {share.uuid for share in start.placement.gpus}
        assert len(uuids) == 1 or not uuids & slices


@generated
@given(st.one_of(split_worlds(), worlds(max_loads=1)))
def test_one_gpu_whenever_one_fits_and_never_more_than_needed(world: Snapshot) -> None:
    load = world.loads[0]
    free = free_bytes(world)
    for start in plan(world).starts:
        used, layout = len(start.placement.gpus), start.placement.layout
        whole = layout.gpu_layers == layers_of(load) and not layout.cpu_moe_layers
        if whole and load.policy.strategy is not Strategy.DISTRIBUTE:
            assert not any(fits_over(world, load, count, free) for count in range(1, used))


@generated
@given(worlds(max_loads=1))
def test_fits_means_start_and_nothing_is_evicted_then(world: Snapshot) -> None:
    load = world.loads[0]
    assume(on_gpu(load) and len(world.servers) < world.settings.pool_size)
    least = 1
    if load.policy.strategy is Strategy.DISTRIBUTE and (load.policy.max_gpus or 99) > 1:
        whole_cards = [card for card in allowed(world, load) if not card.mig]
        least = min(2, len(whole_cards), layers_of(load))
    counts = range(max(1, least), min(load.policy.max_gpus or 99, len(allowed(world, load))) + 1)
    free = free_bytes(world)
    leaving = tuple(one.server_id for one in world.servers if one.state in LEAVING)
    if any(fits_over(world, load, count, free) for count in counts):
        decision = plan(world)
        assert [start.model_id for start in decision.starts] == [load.model_id]
        assert all(e.for_model_id == e.model_id for e in decision.evictions)
    elif any(fits_over(world, load, n, free_bytes(world, without=leaving)) for n in counts):
        assert all(e.for_model_id == e.model_id for e in plan(world).evictions)


@generated
@given(worlds())
def test_no_pinned_or_starting_or_young_server_goes_and_busy_ones_only_drain(
    world: Snapshot,
) -> None:
    by_id = {one.server_id: one for one in world.servers}
    asked_at = {load.model_id: load.asked_at for load in world.loads}
    evictions = plan(world).evictions
    assert len({eviction.server_id for eviction in evictions}) == len(evictions)
    for eviction in evictions:
        victim = by_id[eviction.server_id]
        assert victim.state is ServerState.READY
        assert not victim.pinned
        assert victim.ready_at is not None
        assert world.now - victim.ready_at >= world.settings.min_residency_s
        assert eviction.drains_busy == (victim.busy > 0)
        if victim.busy:
            assert world.now - asked_at[eviction.for_model_id] >= 10


@settings(generated, max_examples=examples(60))
@given(worlds(max_loads=1, crowded=True))
def test_evictions_make_room_and_each_of_them_is_necessary(world: Snapshot) -> None:
    leaving = {one.server_id for one in world.servers if one.state in LEAVING}
    load = world.loads[0]
    gone = {e.server_id for e in plan(world).evictions if e.for_model_id == load.model_id}
    assume(gone)
    # nothing else may go, or the planner would answer with another eviction
    rest = tuple(replace(one, pinned=True) for one in world.servers if one.server_id not in gone)
    victims = tuple(one for one in world.servers if one.server_id in gone)
    strict = replace(load, policy=replace(load.policy, partial_offload=False, cpu_fallback=False))
    partly = (
        load != strict
        and not plan(replace(without_servers(world, gone | leaving), loads=(strict,))).starts
    )
    world = replace(world, servers=(*rest, *victims), loads=(load if partly else strict,))
    assert plan(without_servers(world, gone | leaving)).starts
    if partly:
        return  # what fits partly depends on what is out of reach: `rest` is pinned now
    for number in gone:
        back = replace(world, servers=tuple(replace(s, pinned=True) for s in world.servers))
        assert not plan(without_servers(back, (gone | leaving) - {number})).starts


@generated
@given(worlds())
def test_same_snapshot_gives_the_same_plan(world: Snapshot) -> None:
    assert plan(world) == plan(replace(world))


@generated
@given(worlds(max_loads=1), st.integers(0, 3), st.integers(1, 40))
def test_more_free_memory_never_turns_a_yes_into_a_no(
    world: Snapshot, which: int, quarters: int
) -> None:
    before = plan(world)
    gpus = list(world.gpus or ())
    gpu = gpus[which % len(gpus)]
    more = quarters * GIB // 4
    gpus[which % len(gpus)] = replace(
        gpu, total_bytes=gpu.total_bytes + more, free_bytes=gpu.free_bytes + more
    )
    after = plan(replace(world, gpus=tuple(gpus)))
    assert before.refusals or not after.refusals
    policy = world.loads[0].policy
    if not policy.partial_offload and not policy.cpu_fallback:
        assert len(after.starts) >= len(before.starts)


@generated
@given(worlds())
def test_explanation_agrees_with_the_plan(world: Snapshot) -> None:
    decision = plan(world)
    for load in world.loads:
        told = explain(world, load)
        starts = [s.placement for s in decision.starts if s.model_id == load.model_id]
        assert (told.action == "start") == bool(starts)
        assert not starts or told.placement == starts[0]
        assert list(told.evictions) == [
            e
            for e in decision.evictions
            if e.for_model_id == load.model_id and e.model_id != load.model_id
        ]


# --- every wait ends -------------------------------------------------------------------------


@settings(generated, max_examples=examples(100))
@given(worlds(crowded=True))
def test_every_wait_ends_however_busy_the_servers_are(world: Snapshot) -> None:
    """Servers are busy without a pause for as long as they take new requests."""
    within_reach = {load.model_id for load in world.loads if is_within_reach(world, load)}
    waiting, steps = {load.model_id for load in world.loads}, 0
    while waiting & within_reach and steps < 200:
        decision = plan(world)
        waiting -= {one.model_id for one in (*decision.starts, *decision.refusals)}
        world = one_second_later(world, decision)
        steps += 1
    assert not waiting & within_reach


def is_within_reach(world: Snapshot, load: WaitingLoad) -> bool:
    """Return whether the load could start if only pinned servers and strangers were there."""
    others = {one.server_id for one in world.servers if not one.pinned or one.state in LEAVING}
    alone = replace(without_servers(world, others), loads=(load,))
    return bool(plan(alone).starts)


def one_second_later(world: Snapshot, decision: Decision) -> Snapshot:
    """Return the world after the decision was carried out and a second went by."""
    going = {eviction.server_id for eviction in decision.evictions}
    gone = {one.server_id for one in world.servers if one.state is ServerState.STOPPING}
    world = without_servers(world, gone)
    servers = [stepped(one, world.now, drained=one.server_id in going) for one in world.servers]
    number = max([one.server_id for one in world.servers], default=0)
    for start in decision.starts:
        number += 1
        servers.append(started(number, start.model_id, start.placement, world.now))
    settled = {one.model_id for one in (*decision.starts, *decision.refusals)}
    loads = tuple(load for load in world.loads if load.model_id not in settled)
    after = replace(world, now=world.now + 1, loads=loads)
    return shown(world, replace(after, servers=tuple(servers)))


def stepped(one: RunningServer, now: float, *, drained: bool) -> RunningServer:
    if one.state is ServerState.STARTING:
        whole = {
            uuid: Promise(reserved_bytes=hold.reserved_bytes, visible_bytes=hold.reserved_bytes)
            for uuid, hold in one.holds.items()
        }
        return replace(one, state=ServerState.READY, ready_at=now, busy=1, holds=whole)
    if one.state is ServerState.DRAINING and not one.busy:
        return replace(one, state=ServerState.STOPPING)
    if one.state is ServerState.DRAINING:
        return replace(one, busy=one.busy - 1)
    if one.state is ServerState.READY and drained:
        return replace(one, state=ServerState.DRAINING)
    return one


def started(number: int, model_id: str, placement: Placement, now: float) -> RunningServer:
    return RunningServer(
        server_id=number,
        model_id=model_id,
        state=ServerState.STARTING,
        holds={s.uuid: Promise(reserved_bytes=s.bytes, visible_bytes=0) for s in placement.gpus},
        busy=0,
        pinned=False,
        created_at=now,
        ready_at=None,
        last_used_at=now,
        load_s=0.0,
    )


def shown(before: Snapshot, after: Snapshot) -> Snapshot:
    """Return the world with NVML showing what became visible."""
    gpus = []
    for gpu in after.gpus or ():
        change = sum(
            sign * one.holds[gpu.uuid].visible_bytes
            for sign, world in ((1, after), (-1, before))
            for one in world.servers
            if gpu.uuid in one.holds
        )
        gpus.append(
            replace(gpu, used_bytes=gpu.used_bytes + change, free_bytes=gpu.free_bytes - change)
        )
    return replace(after, gpus=tuple(gpus))
