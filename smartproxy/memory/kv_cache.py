"""KV cache and recurrent state of each layer: exact, as llama.cpp allocates them. Pure.

Input: metadata, options, context size; output: a `CacheShape`, and bytes per layer. All cells
are allocated when the server starts, used or not.
Source: llama.cpp b11434, src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp,
llama-memory-recurrent.cpp, src/llama-context.cpp (padding), tools/server/server.cpp (slots).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smartproxy.errors import UnknownCacheType
from smartproxy.gpus.cuda import DEVICE_ALIGNMENT, ROW_PADDING
from smartproxy.memory.types import EstimateOptions
from smartproxy.model_file.types import ModelMetadata

#: cache type -> (elements per block, bytes per block)
CACHE_TYPES: Mapping[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
#: slots that a server has when nobody says how many; they share one cache
DEFAULT_SLOTS = 4
CELL_PADDING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """How many cells a cache has, and how many tokens go through the graph at once."""

    slots: int
    #: caches side by side: 1 where slots share one
    streams: int
    #: tokens per stream, in full and in sliding layers
    cells: int
    sliding_cells: int
    #: tokens of a micro-batch, a multiple of the streams
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """One layer's share of the caches, in bytes."""

    kv_bytes: int = 0
    recurrent_bytes: int = 0
    #: f16 copies of K and V that flash attention makes of other types, one layer at a time
    scratch_bytes: int = 0


def cache_type(name: str) -> tuple[int, int]:
    """Return (elements, bytes) of a block; raises UnknownCacheType."""
    try:
        return CACHE_TYPES[name]
    except KeyError:
        known = ", ".join(CACHE_TYPES)
        raise UnknownCacheType(f"cache type {name!r} is not one of {known}") from None


def is_quantized(name: str) -> bool:
    return cache_type(name)[0] > 1


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def slots_and_unified(options: EstimateOptions) -> tuple[int, bool]:
    """Return what the server makes of --parallel and --kv-unified: left out, 4 share one cache."""
    if options.parallel is None:
        return DEFAULT_SLOTS, options.kv_unified is not False
    return max(options.parallel, 1), bool(options.kv_unified)


def cache_shape(metadata: ModelMetadata, options: EstimateOptions, context_size: int) -> CacheShape:
    """Return the cache's shape for `context_size` tokens, all slots together."""
    slots, unified = slots_and_unified(options)
    streams = 1 if unified else slots
    # a context smaller than the slots is an error in llama.cpp: the smallest that works
    cells = padded(max(context_size // streams, 1), CELL_PADDING)
    ubatch = min(options.batch, options.ubatch)
    window = metadata.sliding_window * (slots if unified else 1) + ubatch
    sliding = cells if options.swa_full else padded(min(cells, window), CELL_PADDING)
    tokens = min(cells * streams, ubatch)
    if metadata.has_kv_cache:
        tokens = padded(tokens, streams)
    return CacheShape(
        slots=slots, streams=streams, cells=cells, sliding_cells=sliding, tokens=tokens
    )


def layer_caches(
    metadata: ModelMetadata, options: EstimateOptions, shape: CacheShape, *, flash: bool
) -> tuple[LayerCache, ...]:
    """Return each repeating layer's caches, in layer order."""
    if not metadata.has_kv_cache:
        return (LayerCache(),) * metadata.layer_count
    widest = 0 if flash else widest_value(metadata)
    # most layers are alike, and this is the dearest part of an estimate
    kinds = [_kind(metadata, layer) for layer in range(metadata.layer_count)]
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    caches = {
        kind: _layer_cache(metadata, options, shape, (layer, widest))
        for kind, layer in first.items()
    }
    return tuple(caches[kind] for kind in kinds)


def _kind(metadata: ModelMetadata, layer: int) -> tuple[int, bool, bool, bool]:
    """Return what a layer's caches depend on, apart from what all layers share."""
    recurrent = metadata.recurrent_layers[layer] and layer < _trunk(metadata)
    return (
        metadata.kv_head_counts[layer],
        metadata.sliding_layers[layer],
        recurrent,
        caches_kv(metadata, layer),
    )


def widest_value(metadata: ModelMetadata) -> int:
    """Return V elements per cell of the widest layer: without flash attention all get as many."""
    return max((_widths(metadata, layer)[1] for layer in range(metadata.layer_count)), default=0)


def caches_kv(metadata: ModelMetadata, layer: int) -> bool:
    """Tell whether a layer has a KV cache of its own."""
    if layer >= _trunk(metadata) or not metadata.has_kv_cache:
        return False
    if metadata.recurrent_layers[layer] and not _keeps_both(metadata):
        return False
    if metadata.shared_kv_from is not None and layer >= metadata.shared_kv_from:
        return metadata.unknown is not None
    return metadata.kv_head_counts[layer] > 0


def _trunk(metadata: ModelMetadata) -> int:
    """Return how many layers there are apart from those that only predict ahead."""
    return metadata.layer_count - metadata.prediction_layer_count


def _keeps_both(metadata: ModelMetadata) -> bool:
    return metadata.recurrent_and_cached or metadata.unknown is not None


def _layer_cache(
    metadata: ModelMetadata,
    options: EstimateOptions,
    shape: CacheShape,
    layer_and_widest: tuple[int, int],
) -> LayerCache:
    layer, widest = layer_and_widest
    recurrent = _recurrent_bytes(metadata, layer, shape.slots)
    if not caches_kv(metadata, layer):
        return LayerCache(recurrent_bytes=recurrent)
    key, value = _widths(metadata, layer)
    value = widest or value
    cells = shape.sliding_cells if metadata.sliding_layers[layer] else shape.cells
    cells *= shape.streams
    # an unknown architecture is charged for V even where its keys hint at latent attention
    has_value = not metadata.latent_attention or metadata.unknown is not None
    kv = _tensor_bytes(options.cache_type_k, key, cells)
    scratch = 2 * key * cells if options.cache_type_k != "f16" else 0
    if has_value:
        kv += _tensor_bytes(options.cache_type_v, value, cells)
        scratch += 2 * value * cells if options.cache_type_v != "f16" else 0
    return LayerCache(kv_bytes=kv, recurrent_bytes=recurrent, scratch_bytes=scratch)


def _widths(metadata: ModelMetadata, layer: int) -> tuple[int, int]:
    heads = metadata.kv_head_counts[layer]
    if metadata.sliding_layers[layer]:
        return heads * metadata.sliding_key_length, heads * metadata.sliding_value_length
    return heads * metadata.key_length, heads * metadata.value_length


def _tensor_bytes(type_name: str, width: int, cells: int) -> int:
    block, block_bytes = cache_type(type_name)
    row = -(-width // block) * block_bytes
    # CUDA reads quantized rows in chunks of 512 elements: the last one is padded
    over = width % ROW_PADDING if block > 1 else 0
    row_padding = (ROW_PADDING - over) // block * block_bytes if over else 0
    return padded(row * cells + row_padding, DEVICE_ALIGNMENT)


def _recurrent_bytes(metadata: ModelMetadata, layer: int, slots: int) -> int:
    if layer >= _trunk(metadata) or not metadata.recurrent_layers[layer]:
        return 0
    # f32 whatever the cache types, one state per slot, independent of the context size
    return sum(
        padded(4 * elements * slots, DEVICE_ALIGNMENT)
        for elements in (metadata.conv_state_elements, metadata.ssm_state_elements)
    )
