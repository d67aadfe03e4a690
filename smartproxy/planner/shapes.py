"""In which shape a model is placed: all of it, as much as fits, with how much context.

Input: a query and bytes that each GPU can give. Output: shapes and fits. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from smartproxy.memory.types import Need
from smartproxy.planner.place import Fit, PlaceQuery, find, fit_on
from smartproxy.planner.sizes import Shape
from smartproxy.planner.types import PlacePolicy

#: llama.cpp pads a context to this many tokens (src/llama-context.cpp, b11434)
CONTEXT_STEP = 256
#: tokens below which an automatic context is not worth having (llama-server's own --fit-ctx)
LEAST_CONTEXT = 4096
#: tokens of an automatic context on the CPU, whose memory nobody divides
CPU_CONTEXT = 8192


def whole(need: Need, policy: PlacePolicy) -> Shape:
    """Return the model as configured; an automatic context is the least one worth having."""
    layers = need.layer_count if policy.gpu_layers is None else policy.gpu_layers
    context = need.context_size
    if context is None:
        context = min(LEAST_CONTEXT, need.max_context_size)
    return Shape(gpu_layers=min(layers, need.layer_count), context_size=context)


def on_cpu(need: Need) -> Shape:
    """Return the model without any GPU."""
    context = need.context_size or min(CPU_CONTEXT, need.max_context_size)
    return Shape(gpu_layers=0, context_size=context)


def find_grown(query: PlaceQuery, capacity: Sequence[int]) -> Fit | None:
    """Return the best place, with the largest context there if that is automatic.

    A whole context on several GPUs does not beat a smaller one on one GPU.
    """
    need = query.sizes.need
    if need.context_size is not None:
        return find(query, capacity)
    top = replace(query.shape, context_size=_multiple(need.max_context_size))
    if top.context_size <= query.shape.context_size:
        return find(query, capacity)
    least, most = find(query, capacity), find(replace(query, shape=top), capacity)
    if least is None or (most is not None and len(most.sites) <= len(least.sites)):
        return most or least
    return _grown(query, least, capacity)


def _grown(query: PlaceQuery, fit: Fit, capacity: Sequence[int]) -> Fit:
    """Return the same place with the largest context that fits there."""

    def with_context(steps: int) -> Fit | None:
        shape = replace(query.shape, context_size=steps * CONTEXT_STEP)
        return fit_on(replace(query, shape=shape), fit.sites, capacity)

    low = -(-query.shape.context_size // CONTEXT_STEP)
    steps = most(low, query.sizes.need.max_context_size // CONTEXT_STEP, with_context)
    return fit if steps is None else with_context(steps) or fit


def _multiple(context: int) -> int:
    return max(CONTEXT_STEP, context // CONTEXT_STEP * CONTEXT_STEP)


def partial(query: PlaceQuery, capacity: Sequence[int]) -> Shape | None:
    """Return the shape with the most on the GPUs that fits, or None if not even one layer does.

    Expert weights go to the host first: they are big and each token reads few of them, so a
    mixture of experts loses least that way. Only then whole layers, the first ones first.
    """
    need = query.sizes.need

    def without_experts(kept: int) -> Fit | None:
        shape = replace(query.shape, cpu_moe_layers=need.moe_layer_count - kept)
        return find(replace(query, shape=shape), capacity)

    shape = query.shape
    if need.moe_layer_count:
        kept = most(0, need.moe_layer_count - 1, without_experts)
        if kept is not None:
            return replace(shape, cpu_moe_layers=need.moe_layer_count - kept)
        shape = replace(shape, cpu_moe_layers=need.moe_layer_count)

    def with_layers(layers: int) -> Fit | None:
        return find(replace(query, shape=replace(shape, gpu_layers=layers)), capacity)

    layers = most(1, shape.gpu_layers - 1, with_layers)
    return None if layers is None else replace(shape, gpu_layers=layers)


def most(low: int, high: int, fits: Callable[[int], object | None]) -> int | None:
    """Return the largest number from low to high that fits, or None if low doesn't. Bisects."""
    if high < low or fits(low) is None:
        return None
    if fits(high) is not None:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle) is None:
            high = middle
        else:
            low = middle
    return low
