"""What the first device takes to work for layers that stay on the host. Pure.

Batches of 32 tokens and more run on the first device even for host layers: their weights and
their caches are copied there, one operation at a time. So `--gpu-layers 0` takes device memory
too. Source: llama.cpp b11434, ggml-backend.cpp (op_offload), ggml-cuda.cu (offload_op).
"""

from __future__ import annotations

from smartproxy.manager.compute_buffer import mask_bytes
from smartproxy.manager.laid_out import LaidOut
from smartproxy.manager.layer_split import HOST
from smartproxy.types import LayerTensors

#: largest expert tensor and what is alive beside it, measured
_EXPERT_FACTOR = 1.35


def streaming_bytes(laid: LaidOut, own_bytes: int, graph_bytes: int) -> int:
    """Return the first device's compute buffer, `own_bytes` where nothing stays on the host.

    own_bytes: its buffer for its own layers, 0 where it has none; graph_bytes: for any layers.
    """
    layers = _host_layers(laid)
    if not layers:
        return own_bytes
    metadata, row = laid.metadata, laid.row_bytes
    weights = max(_largest_copy(metadata.layers[layer]) for layer in layers)
    if laid.options.embeddings and laid.devices[-1] == HOST:
        weights = max(weights, metadata.output.largest_bytes)
    base = own_bytes or graph_bytes
    extra = max(base - graph_bytes, 0)
    attention = (
        4 * row
        + 2 * laid.graph.row_bytes * metadata.query_length
        + mask_bytes(metadata, laid.graph)
        + max(laid.caches[layer].kv_bytes for layer in layers)
        + max(metadata.layers[layer].attention_bytes for layer in layers)
    )
    return max(base + weights, attention + extra)


def _host_layers(laid: LaidOut) -> list[int]:
    """Return the repeating layers of which weights stay on the host."""
    return [
        layer
        for layer in range(laid.metadata.layer_count)
        if laid.devices[layer] == HOST
        or (layer < laid.layout.cpu_moe_layers and laid.metadata.layers[layer].expert_bytes)
    ]


def _largest_copy(layer: LayerTensors) -> int:
    if layer.expert_bytes:
        return int(_EXPERT_FACTOR * layer.largest_bytes)
    return max(layer.largest_bytes, layer.gate_up_bytes)
