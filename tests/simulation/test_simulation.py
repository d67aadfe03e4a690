"""The simulation: seeds break no rule, and mends that are taken out are missed.

A seed that fails prints its history. `make simulate SEED=n` plays it again (docs/testing.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.simulation import worlds
from tests.simulation.old_faults import unmended
from tests.simulation.replaced import replaced
from tests.simulation.story import Kind, play

#: the short form: so many seeds, or as many as there is time for
SEEDS, TIME_S, LEAST_SEEDS = 300, 15.0, 10
#: fault, what its seeds are rich in, a seed that finds it where its mend is taken out
FOUND = [("F1", Kind.LEAVING, 0), ("F2", Kind.WRITES, 4), ("F27", Kind.WRITES, 2)]
#: another seed may have to find it, when the order of things changes
SEARCHED = 40
#: lines of a history that are shown
LINES = 150


@pytest.fixture(scope="module", autouse=True)
def _simulated() -> Iterator[None]:
    with replaced():
        yield
    worlds.forget()


def holds(seed: int, kind: Kind | None = None) -> None:
    """Play a seed; fails with its history where it breaks a rule."""
    went = play(seed, kind)
    told = "\n".join(went.history.splitlines()[-LINES:])
    assert went.broken is None, f"seed {seed}: {went.broken}\n{told}"


def test_seeds_break_no_rule() -> None:
    began = time.process_time()
    for seed in range(SEEDS):
        if seed >= LEAST_SEEDS and time.process_time() - began > TIME_S:
            break
        holds(seed)


@pytest.mark.parametrize(("fault", "kind", "seed"), FOUND)
def test_a_seed_that_found_a_fault_holds(fault: str, kind: Kind, seed: int) -> None:
    holds(seed, kind)


def test_a_seed_always_tells_the_same_history() -> None:
    first, second = play(3), play(3)
    assert first.steps > 100
    assert first.history == second.history


@pytest.mark.parametrize(("fault", "kind", "first"), FOUND)
def test_a_mend_that_is_taken_out_is_missed(fault: str, kind: Kind, first: int) -> None:
    with unmended(fault):
        assert any(play(seed, kind).broken for seed in range(first, first + SEARCHED))
