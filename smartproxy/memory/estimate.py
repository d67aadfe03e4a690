"""Predict, per device, the memory that llama-server takes for a model in a layout. Pure.

Input: metadata, options, layout; output: `Estimate`. Weights, caches and states are exact, they
follow llama.cpp's own arithmetic; compute buffers follow a measured rule that stays above
(docs/memory.md). Takes about 0.3 ms for 32 layers. Corrections by what was measured are the
caller's (`make_need`).
Source: llama.cpp b11434.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from smartproxy.memory.compute_buffer import device_bytes, mask_bytes
from smartproxy.memory.host import host_bytes
from smartproxy.memory.layer_split import HOST
from smartproxy.memory.layout import (
    InContext,
    LaidOut,
    clamped_context,
    in_context,
    lay_out,
    resolved_flash_attn,
    with_flash_attn_resolved,
)
from smartproxy.memory.streaming import streaming_bytes
from smartproxy.memory.types import DeviceBytes, Estimate, EstimateOptions, Layout, Need
from smartproxy.model_file.types import ModelMetadata
from smartproxy.types import MIB

__all__ = [
    "clamped_context",
    "estimate",
    "make_need",
    "resolved_flash_attn",
    "with_flash_attn_resolved",
]

#: copies of a graph's inputs that several devices work on in turn (ggml-backend.cpp)
PIPELINE_COPIES = 4
#: what architectures and options that no rule follows are charged more for compute buffers
_UNKNOWN_FACTOR = 1.25


def estimate(metadata: ModelMetadata, options: EstimateOptions, layout: Layout) -> Estimate:
    """Return predicted bytes per share of `layout.tensor_split`, and on the host.

    No overhead per GPU is in it. A layout without shares is the CPU alone: all is on the host.
    Raises UnknownCacheType.
    """
    sized = in_context(metadata, options, layout.context_size)
    return _estimate(lay_out(metadata, options, layout, sized))


def _estimate(laid: LaidOut) -> Estimate:
    metadata, options = laid.metadata, laid.options
    devices, host = _with_companions(options, _devices(laid), host_bytes(laid))
    confident = metadata.unknown is None and not options.unmodelled
    if options.draft is not None:
        confident = confident and options.draft.confident
    return Estimate(layout=laid.layout, devices=devices, host=host, confident=confident)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Everything a server loads: a model, its settings, and perhaps a model that drafts for it."""

    metadata: ModelMetadata
    options: EstimateOptions
    draft: ModelMetadata | None = None
    draft_options: EstimateOptions = field(default_factory=EstimateOptions)


def predictor(loaded: Loaded) -> Callable[[Layout], Estimate]:
    """Return estimates by the rules alone; quicker than `estimate` where many splits are asked for.

    A draft model lies over the same devices, all of it or, on the CPU, nothing.
    """
    sized = _sized(loaded.metadata, loaded.options)
    if loaded.draft is None:
        return lambda layout: _estimate(
            lay_out(loaded.metadata, loaded.options, layout, sized(layout.context_size))
        )
    draft, draft_sized = loaded.draft, _sized(loaded.draft, loaded.draft_options)

    def predict(layout: Layout) -> Estimate:
        all_layers = draft.layer_count + 1 if layout.tensor_split else 0
        drafting = replace(layout, gpu_layers=all_layers, cpu_moe_layers=0)
        context = draft_sized(layout.context_size)
        drafts = _estimate(lay_out(draft, loaded.draft_options, drafting, context))
        options = replace(loaded.options, draft=drafts)
        return _estimate(lay_out(loaded.metadata, options, layout, sized(layout.context_size)))

    return predict


def _sized(metadata: ModelMetadata, options: EstimateOptions) -> Callable[[int], InContext]:
    # placing asks for many splits of one context
    return lru_cache(maxsize=64)(partial(in_context, metadata, options))


def make_need(
    loaded: Loaded,
    *,
    context_size: int | None,
    correct: Callable[[Estimate], Estimate] = lambda predicted: predicted,
) -> Need:
    """Return what placing must know; `correct` turns a prediction into what was measured.

    context_size: tokens, all slots together; None = as many as fit.
    """
    metadata, predict = loaded.metadata, predictor(loaded)
    # --n-cpu-moe counts from the first layer, also where the first ones have no experts
    moe_layers = max(
        (n for n, layer in enumerate(metadata.layers, 1) if layer.expert_bytes), default=0
    )
    return Need(
        layer_count=metadata.layer_count + 1,
        moe_layer_count=moe_layers,
        context_size=None if context_size is None else clamped_context(metadata, context_size),
        max_context_size=clamped_context(metadata, 0),
        estimate=lambda layout: correct(predict(layout)),
    )


def _devices(laid: LaidOut) -> tuple[DeviceBytes, ...]:
    count = len(laid.layout.tensor_split)
    weights, kv, recurrent = [0] * count, [0] * count, [0] * count
    tensors = (*laid.metadata.layers, laid.metadata.output)
    for layer, device in enumerate(laid.devices):
        if device == HOST:
            continue
        on_host = tensors[layer].expert_bytes if layer < laid.layout.cpu_moe_layers else 0
        weights[device] += tensors[layer].weights_bytes - on_host
    if laid.options.kv_offload:
        for cache, device in zip(laid.caches, laid.devices, strict=False):
            if device != HOST:
                kv[device] += cache.kv_bytes
                recurrent[device] += cache.recurrent_bytes
    return tuple(
        DeviceBytes(
            weights_bytes=weights[device],
            kv_cache_bytes=kv[device],
            recurrent_bytes=recurrent[device],
            compute_bytes=compute,
        )
        for device, compute in enumerate(_compute_bytes(laid))
    )


def _compute_bytes(laid: LaidOut) -> list[int]:
    """Return each device's compute buffer; they differ in being the first, and in having layers."""
    alone, used, first_device = _graph_bytes(laid), set(laid.devices), laid.first_device
    in_turn = {first: _pipeline_bytes(laid, first=first) for first in (True, False)}
    sizes = []
    for device in range(len(laid.layout.tensor_split)):
        own = alone if device in used else 0
        first = device == first_device
        own += in_turn[first]
        if device in used and not laid.options.kv_offload:
            own += 4 * laid.row_bytes
        sizes.append(streaming_bytes(laid, own, alone) if first else own)
    return sizes


def _graph_bytes(laid: LaidOut) -> int:
    """Return the compute buffer of one device that runs the whole graph by itself."""
    metadata = laid.metadata
    if metadata.unknown is not None:
        both = (device_bytes(metadata, replace(laid.graph, flash=f)) for f in (True, False))
        return int(max(both) * _UNKNOWN_FACTOR)
    alone = device_bytes(metadata, laid.graph)
    if not laid.options.unmodelled:
        return alone
    # weights moved to the host by hand are copied back for large batches, one tensor at a time
    largest = max(layer.largest_bytes for layer in (*metadata.layers, metadata.output))
    return int(alone * _UNKNOWN_FACTOR) + largest


def _pipeline_bytes(laid: LaidOut, *, first: bool) -> int:
    """Return what working in turn takes more: copies of inputs, handed from device to device."""
    if not laid.pipelined:
        return 0
    row = laid.row_bytes
    inputs = row + mask_bytes(laid.metadata, laid.graph) + MIB // 16
    copied = (PIPELINE_COPIES - 1) * inputs + 3 * row
    if first:
        copied += 9 * row
    if any(laid.metadata.recurrent_layers):
        copied += (11 if laid.metadata.recurrent_only else 8) * row
    return copied


def _with_companions(
    options: EstimateOptions, devices: tuple[DeviceBytes, ...], host: DeviceBytes
) -> tuple[tuple[DeviceBytes, ...], DeviceBytes]:
    """Add adapters, the projector and the draft model, which are loaded beside the model."""
    if options.adapter_bytes:
        adapters = DeviceBytes(weights_bytes=options.adapter_bytes)
        devices, host = tuple(_sum(device, adapters) for device in devices), _sum(host, adapters)
    projector = DeviceBytes(
        weights_bytes=options.projector_bytes, compute_bytes=options.projector_compute_bytes
    )
    if devices and options.projector_offload:
        devices = (_sum(devices[0], projector), *devices[1:])
    else:
        host = _sum(host, projector)
    if options.draft is None:
        return devices, host
    added = [_sum(*pair) for pair in zip(devices, options.draft.devices, strict=False)]
    return (*added, *devices[len(added) :]), _sum(host, options.draft.host)


def _sum(one: DeviceBytes, other: DeviceBytes) -> DeviceBytes:
    return DeviceBytes(
        weights_bytes=one.weights_bytes + other.weights_bytes,
        kv_cache_bytes=one.kv_cache_bytes + other.kv_cache_bytes,
        recurrent_bytes=one.recurrent_bytes + other.recurrent_bytes,
        compute_bytes=one.compute_bytes + other.compute_bytes,
        overhead_bytes=one.overhead_bytes + other.overhead_bytes,
    )
