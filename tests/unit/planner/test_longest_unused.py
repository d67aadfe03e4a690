"""Who makes room among servers that cost about the same: over generated servers, by costs alone."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from smartproxy.planner.plan import plan
from smartproxy.planner.types import Decision, Snapshot
from smartproxy.planner.victims import cost
from tests.support.worlds import NOW, gpu, load, server, snapshot
from tests.unit.planner.test_plan_properties import generated

#: costs that differ by no more count as about the same (docs/placing.md)
ABOUT_THE_SAME_TIMES = 1.15
#: what sums of floats may be off
EXACT = 1.000001


def evicted(decision: Decision) -> list[str]:
    return [eviction.model_id for eviction in decision.evictions]


@st.composite
def alike(draw: st.DrawFn) -> Snapshot:
    """Generate idle servers of one size on one GPU; a few must go for the one load.

    Loads took 1 to 12 s, last uses lie within a minute: some cost about the same, some don't.
    """
    count, needed = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    idle = [
        server(
            number,
            f"loaded-{number}",
            {"GPU-0": 2},
            last_used_at=NOW - draw(st.integers(0, 60)),
            load_s=draw(st.integers(1, 12)),
            recent_requests=draw(st.sampled_from([0.0, 1.0])),
        )
        for number in range(1, count + 1)
    ]
    return snapshot([gpu(0, 2 * count)], idle, [load("m", 2 * min(needed, count))])


@generated
@given(alike())
def test_of_servers_that_cost_about_the_same_the_least_recently_used_goes(world: Snapshot) -> None:
    gone = {eviction.server_id for eviction in plan(world).evictions}
    costs = {one.server_id: cost(one, world.now) for one in world.servers}
    used_at = {one.server_id: one.last_used_at for one in world.servers}
    assert gone
    # all are of one size: the cheapest set is simply that of the cheapest servers
    cheapest = sorted(costs.values())[: len(gone)]
    assert sum(costs[number] for number in gone) <= ABOUT_THE_SAME_TIMES * sum(cheapest) * EXACT
    # a server stays only if those that go were not used for longer, or if it is dearer than all
    # of them may be
    newest = max(used_at[number] for number in gone)
    for number in costs.keys() - gone:
        if used_at[number] < newest:
            assert costs[number] * EXACT > ABOUT_THE_SAME_TIMES * cheapest[0]


@generated
@given(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 60), st.floats(0.001, 1))
def test_load_that_took_seconds_longer_by_chance_saves_nobody(
    older_load_s: float, newer_load_s: float, silent_s: float, between_s: float
) -> None:
    used_at = NOW - silent_s
    older = server(1, "older", {"GPU-0": 4}, last_used_at=used_at - between_s, load_s=older_load_s)
    newer = server(2, "newer", {"GPU-0": 4}, last_used_at=used_at, load_s=newer_load_s)
    for servers in ([older, newer], [newer, older]):
        decision = plan(snapshot([gpu(0, 8)], servers, [load("m", 4)]))
        assert evicted(decision) == ["older"]


def test_full_pool_lets_the_least_recently_used_of_about_equals_go() -> None:
    servers = [
        server(1, "older", {"GPU-0": 4}, last_used_at=NOW - 1.1, load_s=3),
        server(2, "newer", {"GPU-0": 4}, last_used_at=NOW - 1, load_s=1),
    ]
    for waiting in (load("m", 4), load("c", 4, force_cpu=True)):
        world = snapshot([gpu(0, 24)], servers, [waiting], pool_size=2)
        assert evicted(plan(world)) == ["older"]


def test_small_differences_do_not_add_up_to_a_big_one() -> None:
    """Each costs about what the next does; the longest unused costs half as much again."""
    servers = [
        server(n, f"m{n}", {"GPU-0": 4}, last_used_at=NOW - 500 - n, load_s=20 + 5 * n)
        for n in range(5)
    ]
    costs = [cost(one, NOW) for one in servers]
    assert all(b < ABOUT_THE_SAME_TIMES * a for a, b in pairwise(costs))
    assert costs[4] > ABOUT_THE_SAME_TIMES * costs[0]
    decision = plan(snapshot([gpu(0, 20)], servers, [load("m", 4)]))
    assert evicted(decision) == ["m1"]


def test_cheap_victim_beside_a_dear_one_is_exchanged_for_cheap_ones_only() -> None:
    """The dear one's tolerance is its own: it pays for nobody else."""
    servers = [
        server(1, "dear", {"GPU-0": 16}, last_used_at=NOW - 1, load_s=60),
        server(2, "cheap", {"GPU-1": 4}, last_used_at=NOW - 400, load_s=1),
        server(3, "older", {"GPU-1": 4}, last_used_at=NOW - 450, load_s=60),
    ]
    waiting = load("m", 26)
    decision = plan(snapshot([gpu(0, 16), gpu(1, 16, 0)], servers, [waiting]))
    assert sorted(evicted(decision)) == ["cheap", "dear"]


def test_busy_server_is_not_exchanged_for_idle_ones_that_add_up() -> None:
    """What sets a busy server apart is no part of what "about the same" is a share of."""
    servers = [
        server(1, "busy", {"GPU-0": 16}, busy=1, last_used_at=NOW - 10),
        server(2, "older", {"GPU-0": 8}, busy=1, last_used_at=NOW - 20, load_s=100),
        server(3, "pinned", {"GPU-0": 8}, pinned=True),
    ]
    waiting = load("m", 8, asked_at=NOW - 60)
    cheaper = min(servers[:2], key=lambda one: cost(one, NOW))
    decision = plan(snapshot([gpu(0, 32)], servers, [waiting]))
    assert evicted(decision) == [cheaper.model_id] == ["busy"]
