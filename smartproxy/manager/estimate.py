"""Predict, per device, the memory that llama-server takes for a model in a layout. Pure.

Input: metadata, options, layout; output: `Estimate`. Weights, caches and states are exact, they
follow llama.cpp's own arithmetic; compute buffers follow a measured rule that stays above
(docs/memory.md). Takes about 0.3 ms for 32 layers. Corrections by what was measured are the
caller's (`make_need`).
Source: llama.cpp b11434.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from smartproxy.manager.compute_buffer import device_bytes, mask_bytes
from smartproxy.manager.host_memory import host_bytes
from smartproxy.manager.laid_out import (
    LaidOut,
    clamped_context,
    lay_out,
    resolved_flash_attn,
)
from smartproxy.manager.streaming import streaming_bytes
from smartproxy.types import (
    MIB,
    DeviceBytes,
    Estimate,
    EstimateOptions,
    Layout,
    ModelMetadata,
    Need,
)

__all__ = [
    "DEFAULT_OVERHEAD_BYTES",
    "clamped_context",
    "estimate",
    "make_need",
    "resolved_flash_attn",
]

#: backend context, kernels, pools of one server on a GPU of which nothing is known yet:
#: 150 MiB + 2.5 MiB per multiprocessor, for 108 of them (facts from public reports: 107 MiB on a
#: card with 34, 555 MiB on one with 188). Learned per GPU after the first load.
DEFAULT_OVERHEAD_BYTES = 420 * MIB
#: copies of a graph's inputs that several devices work on in turn (ggml-backend.cpp)
PIPELINE_COPIES = 4
#: what an architecture that the tables lack is charged more for its compute buffers
_UNKNOWN_FACTOR = 1.25


def estimate(metadata: ModelMetadata, options: EstimateOptions, layout: Layout) -> Estimate:
    """Return predicted bytes per share of `layout.tensor_split`, and on the host.

    No overhead per GPU is in it. A layout without shares is the CPU alone: all is on the host.
    Raises UnknownCacheType.
    """
    laid = lay_out(metadata, options, layout)
    devices = tuple(_device(laid, index) for index in range(len(layout.tensor_split)))
    devices, host = _with_companions(options, devices, host_bytes(laid))
    return Estimate(layout=layout, devices=devices, host=host, confident=metadata.unknown is None)


def make_need(
    metadata: ModelMetadata,
    options: EstimateOptions,
    *,
    context_size: int | None,
    correct: Callable[[Estimate], Estimate] = lambda predicted: predicted,
) -> Need:
    """Return what placing must know; `correct` turns a prediction into what was measured.

    context_size: tokens, all slots together; None = as many as fit.
    """
    moe_layers = sum(1 for layer in metadata.layers if layer.expert_bytes)
    return Need(
        layer_count=metadata.layer_count + 1,
        moe_layer_count=moe_layers,
        context_size=None if context_size is None else clamped_context(metadata, context_size),
        max_context_size=clamped_context(metadata, 0),
        estimate=lambda layout: correct(estimate(metadata, options, layout)),
    )


def _device(laid: LaidOut, index: int) -> DeviceBytes:
    weights = kv = recurrent = 0
    for layer, device in enumerate(laid.devices):
        if device != index:
            continue
        weights += _layer_weights(laid, layer)
        if layer < laid.metadata.layer_count and laid.options.kv_offload:
            kv += laid.caches[layer].kv_bytes
            recurrent += laid.caches[layer].recurrent_bytes
    return DeviceBytes(
        weights_bytes=weights,
        kv_cache_bytes=kv,
        recurrent_bytes=recurrent,
        compute_bytes=_compute_bytes(laid, index),
    )


def _layer_weights(laid: LaidOut, layer: int) -> int:
    if layer == laid.metadata.layer_count:
        return laid.metadata.output.weights_bytes
    tensors = laid.metadata.layers[layer]
    on_host = tensors.expert_bytes if layer < laid.layout.cpu_moe_layers else 0
    return tensors.weights_bytes - on_host


def _compute_bytes(laid: LaidOut, index: int) -> int:
    used, first = index in laid.devices, index == laid.first_device
    alone = _graph_bytes(laid)
    own = alone if used else 0
    if laid.pipelined:
        own += _pipeline_bytes(laid, first=first)
    if used and not laid.options.kv_offload:
        own += 4 * laid.row_bytes
    return streaming_bytes(laid, own, alone) if first else own


def _graph_bytes(laid: LaidOut) -> int:
    """Return the compute buffer of one device that runs the whole graph by itself."""
    if laid.metadata.unknown is None:
        return device_bytes(laid.metadata, laid.graph)
    both = (device_bytes(laid.metadata, replace(laid.graph, flash=f)) for f in (True, False))
    return int(max(both) * _UNKNOWN_FACTOR)


def _pipeline_bytes(laid: LaidOut, *, first: bool) -> int:
    """Return what working in turn takes more: copies of inputs, handed from device to device."""
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
    """Add the projector and the draft model, which the server loads beside the model."""
    projector = DeviceBytes(weights_bytes=options.projector_bytes)
    if devices:
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
