"""What the first device takes to work for layers that stay on the host. Pure.

Batches of 32 tokens and more run on the first device even for host layers: their weights and
their caches are copied there, one operation at a time. So `--gpu-layers 0` takes device memory
too. Source: llama.cpp b11434, ggml-backend.cpp (op_offload), ggml-cuda.cu (offload_op).
"""

from __future__ import annotations

from dataclasses import replace

from smartproxy.memory.compute_buffer import attention_bytes, device_bytes, mask_bytes
from smartproxy.memory.layer_split import HOST
from smartproxy.memory.layout import LaidOut
from smartproxy.model_file.types import LayerTensors

#: the largest expert tensor and what its copying takes beside it, measured: 0.84 to 1.03
_EXPERT_FACTOR = 1.15


def streaming_bytes(laid: LaidOut, own_bytes: int, graph_bytes: int) -> int:
    """Return the first device's compute buffer, `own_bytes` where nothing stays on the host.

    own_bytes: its buffer for its own layers, 0 where it has none; graph_bytes: for any layers.
    """
    layers = _host_layers(laid)
    if not layers:
        return own_bytes
    base = own_bytes or graph_bytes
    extra = max(base - graph_bytes, 0)
    return max(
        base, extra + _feed_forward_bytes(laid, layers), extra + _attention_bytes(laid, layers)
    )


def _host_layers(laid: LaidOut) -> list[int]:
    """Return the repeating layers of which weights stay on the host."""
    return [
        layer
        for layer in range(laid.metadata.layer_count)
        if laid.devices[layer] == HOST
        or (layer < laid.layout.cpu_moe_layers and laid.metadata.layers[layer].expert_bytes)
    ]


def _feed_forward_bytes(laid: LaidOut, layers: list[int]) -> int:
    """Return what the graph takes outside attention, with the largest weights copied beside it."""
    copied = max(_largest_copy(laid.metadata.layers[layer]) for layer in layers)
    if laid.options.embeddings and laid.devices[-1] == HOST:
        copied = max(copied, laid.metadata.output.largest_bytes)
    return device_bytes(laid.metadata, replace(laid.graph, attends=False)) + copied


def _attention_bytes(laid: LaidOut, layers: list[int]) -> int:
    """Return what attention takes with one layer's cache and projections copied beside it."""
    metadata, graph = laid.metadata, laid.graph
    copied = max(laid.caches[layer].kv_bytes for layer in layers)
    copied += max(metadata.layers[layer].attention_bytes for layer in layers)
    fused = graph.row_bytes * 2 * metadata.query_length + 7 * laid.row_bytes
    return copied + max(fused + mask_bytes(metadata, graph), attention_bytes(metadata, graph))


def _largest_copy(layer: LayerTensors) -> int:
    if layer.expert_bytes:
        return int(_EXPERT_FACTOR * layer.largest_bytes)
    return max(layer.largest_bytes, layer.gate_up_bytes)
