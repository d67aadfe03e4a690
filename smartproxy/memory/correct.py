"""Correct a prediction by what loads of the same file were measured to take. Pure.

Input: an estimate by the rules, and lessons: what was predicted and what was measured, per device
and for the host. Output: the estimate to go by. Overhead per GPU is learned apart
(manager/measure.py).

- The same settings and layout: what was measured, device by device.
- Only the context size differs: the prediction, moved by the difference that was measured at the
  next sizes; never less than a smaller context was measured to take, nor less than the exact parts
  (weights, caches, states), nor more than a larger context was measured to take. So more context
  never needs less.
- Anything else of the same file: the prediction, and where a load took more than predicted, as
  much more. A load that took less proves nothing about other settings: nothing is taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from smartproxy.memory.types import DeviceBytes, Estimate, Layout
from smartproxy.types import MIB

#: the log rounds each of a device's buffers to 0.01 MiB
ROUNDING_BYTES = MIB // 50

#: bytes per device in the order of the layout, the host's last
Vector = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One load: buffers of llama.cpp, without overhead."""

    layout: Layout
    predicted: Vector
    measured: Vector
    #: file, build and settings are those of the model that is asked about, the layout apart
    same_options: bool
    #: told by llama-fit-params, not by a server: a server that ran knows better
    asked: bool = False

    @property
    def difference(self) -> Vector:
        pairs = zip(self.measured, self.predicted, strict=True)
        return tuple(measured - predicted for measured, predicted in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Lessons, ready to be asked."""

    #: by layout
    exact: Mapping[Layout, Lesson] = field(default_factory=dict)
    #: by layout with context size 0: smallest context first, never falling
    by_context: Mapping[Layout, tuple[Lesson, ...]] = field(default_factory=dict)
    #: the most that any device of a load took beyond what was predicted for it, and the host
    shortfall_bytes: int = 0
    host_shortfall_bytes: int = 0


def learn(lessons: Iterable[Lesson]) -> Learned:
    """Return what lessons of one file teach, in any order."""
    exact: dict[Layout, Lesson] = {}
    shortfall = host_shortfall = 0
    for lesson in map(_unrounded, lessons):
        *devices, host = lesson.difference
        if not lesson.asked:
            shortfall = max(shortfall, *devices, 0)
            host_shortfall = max(host_shortfall, host)
        if lesson.same_options:
            known = exact.get(lesson.layout)
            exact[lesson.layout] = lesson if known is None else _better(known, lesson)
    by_context = _by_context(exact.values())
    return Learned(
        exact={lesson.layout: lesson for family in by_context.values() for lesson in family},
        by_context=by_context,
        shortfall_bytes=shortfall,
        host_shortfall_bytes=host_shortfall,
    )


def corrected(predicted: Estimate, learned: Learned) -> Estimate:
    """Return the estimate to go by."""
    known = learned.exact.get(predicted.layout)
    if known is not None:
        return _with(predicted, known.measured)
    family = learned.by_context.get(replace(predicted.layout, context_size=0))
    if family:
        return _with(predicted, _between(predicted, family))
    if not learned.shortfall_bytes and not learned.host_shortfall_bytes:
        return predicted
    used = (bool(device.buffers_bytes) for device in predicted.devices)
    more = (*(learned.shortfall_bytes * each for each in used), learned.host_shortfall_bytes)
    return _with(predicted, _sum(buffers_of(predicted), more))


def overridden(predicted: Estimate, *, wanted_bytes: int, whole_bytes: int) -> Estimate:
    """Return an estimate scaled so that the whole model on one GPU takes `wanted_bytes`.

    whole_bytes: what is predicted for that. The host's part stays.
    """
    *devices, host = buffers_of(predicted)
    scaled = [size * wanted_bytes // max(whole_bytes, 1) for size in devices]
    return _with(predicted, (*scaled, host))


def at_least(predicted: Estimate, learned: Learned) -> Estimate:
    """Return an estimate raised to what the same settings and layout were measured to take."""
    known = learned.exact.get(predicted.layout)
    if known is None:
        return predicted
    pairs = zip(buffers_of(predicted), known.measured, strict=True)
    return _with(predicted, tuple(max(pair) for pair in pairs))


def buffers_of(estimate: Estimate) -> Vector:
    """Return bytes per device and the host's, without overhead."""
    return (*(device.buffers_bytes for device in estimate.devices), estimate.host.buffers_bytes)


def _unrounded(lesson: Lesson) -> Lesson:
    """Make up for the log's rounding, upwards."""
    measured = (
        max(measured, predicted)
        if abs(measured - predicted) <= ROUNDING_BYTES
        else measured + ROUNDING_BYTES
        for measured, predicted in zip(lesson.measured, lesson.predicted, strict=True)
    )
    return replace(lesson, measured=tuple(measured))


def _better(one: Lesson, other: Lesson) -> Lesson:
    """Return what a server told before what a tool told; of equals the most of each device."""
    if one.asked != other.asked:
        return other if one.asked else one
    pairs = zip(one.measured, other.measured, strict=True)
    return replace(other, measured=tuple(max(pair) for pair in pairs))


def _by_context(lessons: Iterable[Lesson]) -> dict[Layout, tuple[Lesson, ...]]:
    families: dict[Layout, list[Lesson]] = {}
    for lesson in sorted(lessons, key=lambda each: each.layout.context_size):
        family = families.setdefault(replace(lesson.layout, context_size=0), [])
        if family:
            pairs = zip(lesson.measured, family[-1].measured, strict=True)
            lesson = replace(lesson, measured=tuple(max(pair) for pair in pairs))
        family.append(lesson)
    return {layout: tuple(family) for layout, family in families.items()}


def _between(predicted: Estimate, family: tuple[Lesson, ...]) -> Vector:
    """Return the prediction moved by what its neighbours in context size were off."""
    context = predicted.layout.context_size
    below = [lesson for lesson in family if lesson.layout.context_size < context]
    above = [lesson for lesson in family if lesson.layout.context_size > context]
    near = (*below[-1:], *above[:1])
    exact_parts = (*(_exact(device) for device in predicted.devices), _exact(predicted.host))
    sizes = []
    for place, size in enumerate(buffers_of(predicted)):
        off = max(lesson.difference[place] for lesson in near)
        # a shortfall at any size counts at all of them
        worst = max(lesson.difference[place] for lesson in family)
        off = max(off, worst) if worst > 0 else off
        least = max(exact_parts[place], below[-1].measured[place] if below else 0)
        size = max(size + off, least)
        sizes.append(min(size, above[0].measured[place]) if above else size)
    return tuple(sizes)


def _exact(device: DeviceBytes) -> int:
    return device.weights_bytes + device.kv_cache_bytes + device.recurrent_bytes


def _sum(one: Vector, other: Vector) -> Vector:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _with(predicted: Estimate, sizes: Vector) -> Estimate:
    """Return an estimate whose devices and host have these sizes in all."""
    *devices, host = sizes
    return replace(
        predicted,
        devices=tuple(
            _resized(device, size) for device, size in zip(predicted.devices, devices, strict=True)
        ),
        host=_resized(predicted.host, host),
    )


def _resized(device: DeviceBytes, size: int) -> DeviceBytes:
    """Return parts that add up to `size`: the compute buffer gives and takes, it is the estimate.

    Only what was measured to be less than the exact parts (tensors moved by hand) shrinks those.
    """
    more = size - device.buffers_bytes
    if not more:
        return device
    if device.compute_bytes + more >= 0:
        return replace(device, compute_bytes=device.compute_bytes + more)
    parts = _exact(device)
    cache, state = (
        part * size // parts for part in (device.kv_cache_bytes, device.recurrent_bytes)
    )
    return replace(
        device,
        weights_bytes=size - cache - state,
        kv_cache_bytes=cache,
        recurrent_bytes=state,
        compute_bytes=0,
    )
