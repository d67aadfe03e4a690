"""The simulator of bench.policy in small: the planner chooses victims better than simple rules."""

from __future__ import annotations

from functools import cache

import pytest

from bench import policies
from bench.bound import fewest_loads, memory_bytes
from bench.simulator import HEADROOM_BYTES, STOP_S, Outcome, Served, load_s, simulate
from bench.traces import KINDS, Request, Trace, make
from smartproxy.types import GIB

CARDS_GB = (12, 16, 24)
SEEDS = (1, 2)


@cache
def trace_of(kind: str, seed: int) -> Trace:
    return make(kind, CARDS_GB, seed, 250)


@cache
def outcome_of(policy: str, kind: str, seed: int) -> Outcome:
    trace = trace_of(kind, seed)
    return simulate(trace, getattr(policies, policy)(trace))


def loads(policy: str) -> int:
    return sum(outcome_of(policy, kind, seed).loads for kind in KINDS for seed in SEEDS)


def waited_s(policy: str) -> float:
    return sum(
        one.began_at - one.asked_at
        for kind in KINDS
        for seed in SEEDS
        for one in outcome_of(policy, kind, seed).served
    )


@pytest.mark.parametrize("simple", ["plain_lru", "count_lru", "evict_all"])
def test_we_load_less_often_and_wait_less_than_with_simple_rules(simple: str) -> None:
    assert loads("ours") < loads(simple)
    assert waited_s("ours") < waited_s(simple)


def test_who_knows_the_future_loads_less_often_and_the_bound_lies_below() -> None:
    assert loads("belady") < loads("ours")
    memory = memory_bytes(CARDS_GB, HEADROOM_BYTES)
    for kind in KINDS:
        for policy in ("belady", "ours"):
            outcome = outcome_of(policy, kind, SEEDS[0])
            sizes = trace_of(kind, SEEDS[0]).sizes
            bound = fewest_loads(outcome.served, sizes, memory)
            assert len({one.model for one in outcome.served}) <= bound <= outcome.loads


def test_every_request_is_served_once_and_not_before_it_asked() -> None:
    for kind in KINDS:
        trace = trace_of(kind, SEEDS[0])
        served = outcome_of("ours", kind, SEEDS[0]).served
        assert sorted(one.asked_at for one in served) == [one.at for one in trace.requests]
        assert all(one.began_at >= one.asked_at for one in served)


# --- by hand ---------------------------------------------------------------------------------


def by_hand(*asked: tuple[float, int]) -> Trace:
    """Return requests of ten seconds for models of 20 GB on a card of 24 GB."""
    return Trace(
        kind="by hand",
        seed=0,
        cards_gb=(24,),
        sizes=(20 * GIB, 20 * GIB),
        requests=tuple(Request(at=at, model=model, duration_s=10, tokens=9) for at, model in asked),
        popularity=lambda _: (0.5, 0.5),
    )


def test_a_load_takes_its_time_and_the_next_request_finds_it_done() -> None:
    trace = by_hand((0, 0), (5, 0), (100, 0))
    outcome = simulate(trace, policies.ours(trace))
    took_s = load_s(20 * GIB)
    assert outcome.loads == 1
    assert [one.began_at for one in outcome.served] == [took_s, took_s, 100]


def test_a_swap_waits_for_the_memory_and_then_for_the_load() -> None:
    trace = by_hand((0, 0), (100, 1))
    outcome = simulate(trace, policies.ours(trace))
    assert outcome.loads == 2
    assert outcome.served[1].began_at == pytest.approx(100 + STOP_S + load_s(20 * GIB))


def test_two_models_that_do_not_fit_together_are_served_in_turns_not_one_by_one() -> None:
    trace = by_hand(*((float(second), second % 2) for second in range(60)))
    assert simulate(trace, policies.ours(trace)).loads <= 4


def test_bound_of_models_that_fill_the_memory_is_a_load_for_each_turn() -> None:
    served = [
        Served(model=turn % 2, asked_at=turn, began_at=10.0 * turn, done_at=10.0 * turn + 5)
        for turn in range(6)
    ]
    assert fewest_loads(served, (GIB, GIB), GIB) == pytest.approx(6, abs=0.1)
    assert fewest_loads(served, (GIB, GIB), 2 * GIB) == pytest.approx(2, abs=0.1)
