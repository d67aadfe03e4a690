"""What the host is asked for: embeddings, layers not offloaded, its side of the graph. Pure.

Source: llama.cpp b11434, src/llama-model.cpp (buffers over the mapped file),
src/llama-context.cpp (output buffer).
"""

from __future__ import annotations

from collections.abc import Iterator

from smartproxy.memory.compute_buffer import device_bytes, mask_bytes, state_space_bytes
from smartproxy.memory.layer_split import HOST
from smartproxy.memory.layout import LaidOut
from smartproxy.memory.types import DeviceBytes
from smartproxy.model_file.types import FileSpan, LayerTensors

_F32 = 4
_PIPELINE_COPIES = 4


def host_bytes(laid: LaidOut) -> DeviceBytes:
    """Return the host's buffers, as llama-server prints them.

    Weights are mapped files: a buffer spans all from the first to the last tensor of a file that
    stays on the host, device tensors in between included (such pages can be dropped again).
    """
    on_host = [layer for layer, device in enumerate(laid.devices[:-1]) if device == HOST]
    if not laid.options.kv_offload:
        on_host = list(range(laid.metadata.layer_count))
    caches = [laid.caches[layer] for layer in on_host]
    return DeviceBytes(
        weights_bytes=_weights_bytes(laid),
        kv_cache_bytes=sum(cache.kv_bytes for cache in caches),
        recurrent_bytes=sum(cache.recurrent_bytes for cache in caches),
        compute_bytes=_compute_bytes(laid) + _output_bytes(laid),
    )


def _weights_bytes(laid: LaidOut) -> int:
    bounds: dict[int, tuple[int, int]] = {}
    for span in _host_spans(laid):
        start, end = bounds.get(span.file, (span.start, span.end))
        bounds[span.file] = (min(start, span.start), max(end, span.end))
    spanned = sum(end - start for start, end in bounds.values())
    # alignment can make the tensors' sum a little more than the stretch of file
    return max(spanned, laid.metadata.input_bytes)


def _host_spans(laid: LaidOut) -> Iterator[FileSpan]:
    metadata = laid.metadata
    yield from metadata.input_spans
    layers: tuple[LayerTensors, ...] = (*metadata.layers, metadata.output)
    for layer, (tensors, device) in enumerate(zip(layers, laid.devices, strict=True)):
        if device == HOST:
            yield from tensors.spans
        if device == HOST or layer < laid.layout.cpu_moe_layers:
            yield from tensors.expert_spans


def _compute_bytes(laid: LaidOut) -> int:
    """Return the host's side of the graph: the embedded tokens, in four copies, and masks."""
    metadata, row = laid.metadata, laid.row_bytes
    masks = mask_bytes(metadata, laid.graph) + _small_bytes(laid)
    if not laid.layout.tensor_split:
        return device_bytes(metadata, laid.graph) + row
    if not metadata.has_kv_cache:
        tokens = laid.shape.tokens
        return 5 * row + tokens * tokens * (2 if laid.graph.flash else 4) + masks
    if laid.pipelined:
        return 10 * row + _PIPELINE_COPIES * masks
    return 4 * row + masks + _host_state_bytes(laid)


def _host_state_bytes(laid: LaidOut) -> int:
    """Return what recurrent layers take on the host whose state stays there."""
    for layer, device in enumerate(laid.devices[:-1]):
        stays = device == HOST or not laid.options.kv_offload
        if stays and laid.metadata.recurrent_layers[layer]:
            return state_space_bytes(laid.metadata, laid.graph)
    return 0


def _small_bytes(laid: LaidOut) -> int:
    """Positions, row numbers and the like per token; the rotation of quantized caches."""
    small = 64 * laid.shape.tokens + 16 * 1024
    if laid.graph.scratch_bytes:
        head = max(laid.metadata.key_length, laid.metadata.value_length, 64)
        small += 2 * _F32 * head * head
    return small


def _output_bytes(laid: LaidOut) -> int:
    """Return the buffer of logits (and embeddings) that the server reads results from."""
    metadata = laid.metadata
    if not laid.options.embeddings:
        outputs = laid.shape.slots * (1 + laid.options.draft_tokens)
        return _F32 * outputs * metadata.vocabulary_size
    return _F32 * laid.options.batch * (metadata.vocabulary_size + metadata.embedding_length)
