"""A proven lower bound of loads: what no policy could do with less, had it known all in advance.

Given when each request was served, every model is in memory while it serves. Between two uses a
model either stays, holding its memory, or is loaded again. At any moment, what serves and what
stays fits into the memory of all GPUs together. The fewest loads under these conditions are a bound
for every schedule that serves these requests at these times, whatever it knows: it is also let off
dividing memory over GPUs, and may keep parts of models.

That is a linear program (the relaxation of caching with sizes: Albers, Arora, Khanna, "Page
replacement for general caching problems", 1999). Any prices >= 0 for memory at each moment give a
lower bound of it (Lagrangian duality): a model stays where its memory costs less than a load,

    bound = models + sum over gaps of min(1, bytes * price over the gap)
                   - sum over moments of price * bytes not needed for serving

and better prices give a better bound; they are found by following the slope.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bench.simulator import Served
from smartproxy.types import GIB

Floats = NDArray[np.float64]
STEPS = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """Gaps as half-open ranges of moments; sizes and memory as parts of all memory."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    sizes: Floats
    #: per moment: what serving leaves
    left: Floats


def fewest_loads(served: Sequence[Served], sizes: Sequence[int], memory_bytes: int) -> float:
    """Return a number of loads that can't be gone below when requests are served at these times."""
    stretches = {model: list(_stretches(served, model)) for model in {s.model for s in served}}
    program = _program(stretches, sizes, memory_bytes)
    goal = float(sum(map(len, stretches.values())) - len(stretches))
    return len(stretches) + _best_dual(program, goal)


def _stretches(served: Sequence[Served], model: int) -> Iterator[tuple[float, float]]:
    """Yield from when to when a model serves without a pause."""
    begin = end = -1.0
    for one in sorted((s for s in served if s.model == model), key=lambda s: s.began_at):
        if one.began_at > end and begin >= 0:
            yield begin, end
        begin = one.began_at if one.began_at > end else begin
        end = max(end, one.done_at)
    yield begin, end


def _program(
    stretches: dict[int, list[tuple[float, float]]], sizes: Sequence[int], memory_bytes: int
) -> _Program:
    moments = np.array(sorted({begin for each in stretches.values() for begin, _ in each}))
    left = np.full(len(moments), float(memory_bytes))
    first, last, gap_sizes = [], [], []
    for model, each in stretches.items():
        for begin, end in each:
            left[np.searchsorted(moments, begin) : np.searchsorted(moments, end)] -= sizes[model]
        for (_, end), (begin, _) in pairwise(each):
            first.append(np.searchsorted(moments, end))
            last.append(np.searchsorted(moments, begin))
            gap_sizes.append(sizes[model] / memory_bytes)
    return _Program(
        first=np.array(first, dtype=np.int64),
        last=np.array(last, dtype=np.int64),
        sizes=np.array(gap_sizes),
        left=left / memory_bytes,
    )


def _best_dual(program: _Program, goal: float) -> float:
    """Return the best bound found for reloads. goal: more than it can be."""
    prices, best, reach, stale = np.zeros(len(program.left)), 0.0, 1.0, 0
    for _ in range(STEPS):
        value, slope = _dual(program, prices)
        stale = 0 if value > best + 1e-6 else stale + 1
        best = max(best, value)
        if stale >= 20:
            reach, stale = reach / 2, 0
        step = reach * (best + 0.1 * (goal - best) - value) / max(1e-12, float(slope @ slope))
        prices = np.maximum(0.0, prices + step * slope)
    return best


def _dual(program: _Program, prices: Floats) -> tuple[float, Floats]:
    """Return the bound that prices give, and how it changes with each price."""
    sums = np.concatenate(([0.0], np.cumsum(prices)))
    stay = program.sizes * (sums[program.last] - sums[program.first])
    value = float(np.minimum(1.0, stay).sum() - prices @ program.left)
    staying = np.where(stay < 1.0, program.sizes, 0.0)
    change = np.zeros(len(prices) + 1)
    np.add.at(change, program.first, staying)
    np.add.at(change, program.last, -staying)
    return value, np.cumsum(change)[:-1] - program.left


def memory_bytes(cards_gb: Sequence[int], headroom_bytes: int) -> int:
    """Return what servers may take of all GPUs together."""
    return sum(card * GIB - headroom_bytes for card in cards_gb)
