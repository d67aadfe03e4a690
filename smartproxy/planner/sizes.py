"""How big a model is in a given shape, and how its layers divide over several GPUs.

Input: a Need (a black box that estimates layouts) and bytes that GPUs can give. Output: estimates
that were checked to fit. Pure; remembers what it asked, since an estimate is the dearest step of a
decision (0.1 ms).

Layers go to devices as llama.cpp does it (src/llama-model.cpp, load_tensors, b11434): the last
`gpu_layers` of all layers are offloaded, in order, by cumulated shares. With whole layer counts as
shares, each device gets exactly that many layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from smartproxy.memory.types import DeviceBytes, Estimate, Layout, Need

#: bisection steps for the balance of a split: finer than one layer of the deepest models
_BALANCE_STEPS = 10
#: attempts to correct a split whose compute buffers turned out bigger than assumed
_SPLIT_ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is laid out, apart from over which GPUs."""

    #: 0 = on the CPU
    gpu_layers: int
    context_size: int
    cpu_moe_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A need with its answers so far; for one call of `plan`."""

    need: Need
    _estimates: dict[Layout, Estimate] = field(default_factory=dict)
    _singles: dict[Shape, int] = field(default_factory=dict)
    _sums: dict[Shape, list[int]] = field(default_factory=dict)
    _fixed: dict[tuple[Shape, int], list[int]] = field(default_factory=dict)

    def estimate(self, shape: Shape, split: tuple[float, ...]) -> Estimate:
        """Return the bytes of a shape over GPUs with these shares, without overhead per GPU."""
        layout = Layout(
            tensor_split=split,
            gpu_layers=shape.gpu_layers,
            context_size=shape.context_size,
            cpu_moe_layers=shape.cpu_moe_layers,
        )
        known = self._estimates.get(layout)
        if known is None:
            known = self._estimates[layout] = self.need.estimate(layout)
        return known

    def single_bytes(self, shape: Shape) -> int:
        """Return buffer bytes of a shape on one GPU."""
        known = self._singles.get(shape)
        if known is None:
            known = self._singles[shape] = self.estimate(shape, (1.0,)).devices[0].buffers_bytes
        return known

    def layer_sums(self, shape: Shape) -> list[int]:
        """Return cumulated bytes of the offloaded layers, in order; starts with 0.

        One device per layer shows each layer's weights and caches by themselves.
        """
        known = self._sums.get(shape)
        if known is None:
            devices = self.estimate(shape, (1.0,) * shape.gpu_layers).devices
            known = [0, *accumulate(_of_layers(device) for device in devices)]
            self._sums[shape] = known
        return known

    def fixed_bytes(self, shape: Shape, count: int) -> list[int]:
        """Return what each of `count` GPUs takes whatever layers it has (compute buffers).

        The first and the last may take more; those between are alike, and asked for once.
        """
        asked = min(count, 3)
        known = self._fixed.get((shape, asked))
        if known is None:
            layers = shape.gpu_layers
            even = [layers // asked + (i < layers % asked) for i in range(asked)]
            devices = self.estimate(shape, tuple(map(float, even))).devices
            known = [device.buffers_bytes - _of_layers(device) for device in devices]
            self._fixed[shape, asked] = known
        return [*known[:-1], *known[1:-1] * (count - asked), known[-1]]


def _of_layers(device: DeviceBytes) -> int:
    return device.weights_bytes + device.kv_cache_bytes + device.recurrent_bytes


def split(sizes: Sizes, shape: Shape, capacities: Sequence[int]) -> Estimate | None:
    """Return a checked estimate of the layers divided over GPUs, or None if they don't fit.

    capacities: bytes for buffers that each GPU can give, in device order. Every GPU gets at least
    one layer, and a share in proportion to what it can take; the fixed bytes are paid on each.
    """
    count = len(capacities)
    sums = sizes.layer_sums(shape)
    if count > shape.gpu_layers or sum(capacities) < sums[-1]:
        return None
    fixed = list(sizes.fixed_bytes(shape, count))
    for _ in range(_SPLIT_ATTEMPTS):
        rooms = [capacity - cost for capacity, cost in zip(capacities, fixed, strict=True)]
        counts = divide(sums, rooms)
        if counts is None:
            return None
        estimate = sizes.estimate(shape, tuple(map(float, counts)))
        pairs = list(zip(estimate.devices, capacities, strict=True))
        if all(device.buffers_bytes <= capacity for device, capacity in pairs):
            return estimate
        fixed = [
            max(cost, device.buffers_bytes - _of_layers(device))
            for cost, device in zip(fixed, estimate.devices, strict=True)
        ]
    return None


def divide(sums: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """Return how many layers each GPU gets, at least one, or None if they don't all find room.

    sums: cumulated layer sizes, from 0. rooms: bytes for layers, in device order. The fullest GPU
    is as little full as whole layers allow, which is a division in proportion to the rooms.
    """
    if min(rooms) < 0 or sum(rooms) < max(1, sums[-1]):
        return None
    full = _fill(sums, rooms, 1.0)
    if full is None:
        return None
    low, high, best = sums[-1] / sum(rooms), 1.0, full
    for _ in range(_BALANCE_STEPS):
        middle = (low + high) / 2
        counts = _fill(sums, rooms, middle)
        if counts is None:
            low = middle
        else:
            high, best = middle, counts
    return best if all(best) else _fill_every(sums, rooms)


def _fill(sums: Sequence[int], rooms: Sequence[int], part: float) -> list[int] | None:
    """Return counts when each GPU in turn takes what goes into `part` of its room."""
    counts, begin, last = [], 0, len(sums) - 1
    for room in rooms:
        end = max(begin, bisect_right(sums, sums[begin] + int(room * part)) - 1)
        counts.append(end - begin)
        begin = end
    return counts if begin == last else None


def _fill_every(sums: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """Return counts with at least one layer for each GPU, as much as possible to the first."""
    dead: set[tuple[int, int]] = set()

    def place(device: int, begin: int) -> list[int] | None:
        if device == len(rooms):
            return [] if begin == len(sums) - 1 else None
        if (device, begin) in dead:
            return None
        end = bisect_right(sums, sums[begin] + rooms[device]) - 1
        for stop in range(min(end, len(sums) - len(rooms) + device), begin, -1):
            rest = place(device + 1, stop)
            if rest is not None:
                return [stop - begin, *rest]
        dead.add((device, begin))
        return None

    return place(0, 0)
