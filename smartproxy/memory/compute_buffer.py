"""Scratch memory of the graph on a device: a rule found by measuring, not an allocation. Pure.

llama.cpp reserves the largest graph it may run and reuses memory within it, so the buffer is as
large as the widest moment: feed-forward, experts, attention, state space or logits, whichever is
most, plus the attention masks that live throughout. The widths of those moments were fitted to
792 loads of 14 architectures (docs/memory.md). Elements are f32: 4 bytes.
Source: llama.cpp b11434, src/llama-graph.cpp, ggml/src/ggml-alloc.c; flash attention's copies
from ggml-cuda/fattn-common.cuh and fattn.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smartproxy.gpus.cuda import FLASH_HEAD_LENGTHS
from smartproxy.memory.kv_cache import CacheShape
from smartproxy.model_file.types import ModelMetadata
from smartproxy.types import MIB

_F32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What one micro-batch runs through."""

    shape: CacheShape
    flash: bool
    #: cells per stream of the full and of the sliding caches; 0 = no layer has such a cache
    full_cells: int
    sliding_cells: int
    #: f16 copies that flash attention makes (see LayerCache)
    scratch_bytes: int
    #: rows of logits
    outputs: int
    mixed_cache_types: bool
    #: False leaves attention's own moment out
    attends: bool = True

    @property
    def row_bytes(self) -> int:
        """One element for every token of the micro-batch."""
        return _F32 * self.shape.tokens


def has_flash_kernel(metadata: ModelMetadata) -> bool:
    """Tell whether a CUDA device can run this model's attention as flash attention."""
    if metadata.latent_attention or metadata.recurrent_only:
        return True
    return metadata.key_length in FLASH_HEAD_LENGTHS and (
        metadata.key_length == metadata.value_length or metadata.key_length == 576
    )


def device_bytes(metadata: ModelMetadata, graph: Graph) -> int:
    """Return the compute buffer of a device that runs the whole graph by itself, in bytes."""
    if not metadata.has_kv_cache:
        return _encoder_bytes(metadata, graph)
    widest = max(_moments(metadata, graph))
    rotation = 0
    if graph.scratch_bytes:
        # quantized caches are rotated by a square matrix for K and one for V
        rotation = 2 * _F32 * max(metadata.key_length, metadata.value_length, 64) ** 2
    mixed = graph.row_bytes * metadata.embedding_length if graph.mixed_cache_types else 0
    return widest + mask_bytes(metadata, graph) + rotation + mixed + _small_bytes(graph)


def attention_bytes(metadata: ModelMetadata, graph: Graph) -> int:
    """Return what attention takes by itself, masks included, in bytes."""
    return _attention_moment(metadata, graph) + mask_bytes(metadata, graph)


def mask_bytes(metadata: ModelMetadata, graph: Graph) -> int:
    """Return the attention masks' bytes: f16 with flash attention, f32 without."""
    cells = graph.full_cells + graph.sliding_cells
    if graph.flash:
        return 2 * graph.shape.tokens * cells
    masks = _F32 * graph.shape.tokens * cells
    if metadata.latent_attention:
        return masks
    # V is stored transposed then: an i64 row number per element written
    caches = (graph.full_cells > 0) + (graph.sliding_cells > 0)
    value = max(metadata.kv_head_counts, default=0) * metadata.value_length
    return masks + 8 * graph.shape.tokens * value * caches


def _small_bytes(graph: Graph) -> int:
    """Positions, row numbers and other small tensors that no rule names."""
    return 64 * 1024 + 32 * graph.shape.tokens


def _encoder_bytes(metadata: ModelMetadata, graph: Graph) -> int:
    """No cache: tokens attend to each other, within the micro-batch."""
    tokens, row, width = graph.shape.tokens, graph.row_bytes, metadata.embedding_length
    feed_forward = row * (metadata.feed_forward_length + 2 * width)
    if graph.flash:
        attention = row * 6 * width
    else:
        heads = max(metadata.head_counts, default=0)
        attention = row * 5 * width + _F32 * heads * tokens * tokens
    mask = tokens * tokens * (2 if graph.flash else 4)
    return max(feed_forward, attention, row * 4 * width) + mask + MIB // 2


def _moments(metadata: ModelMetadata, graph: Graph) -> Iterator[int]:
    """Yield the bytes alive in each moment of the graph that could be the widest."""
    row, width = graph.row_bytes, metadata.embedding_length
    yield row * 4 * width + _F32 * graph.outputs * metadata.vocabulary_size
    if metadata.has_dense_layers:
        # queries a little wider than the hidden state leave a hole that nothing fills
        wider = 0 if metadata.latent_attention else max(metadata.query_length - width, 0)
        hole = min(wider, width // 4)
        yield row * (3 * metadata.feed_forward_length + 4 * width + hole)
    if metadata.expert_count:
        used = metadata.expert_used_count
        inside = 3 * used * metadata.expert_feed_forward_length + 4 * width
        yield row * max(inside, 2 * used * width + 5 * width)
    if graph.attends:
        yield _attention_moment(metadata, graph)
    if any(metadata.recurrent_layers):
        yield row * 4 * width + state_space_bytes(metadata, graph)


def state_space_bytes(metadata: ModelMetadata, graph: Graph) -> int:
    """Return what a recurrent layer takes besides the hidden state, in bytes."""
    inner = metadata.ssm_inner_size
    convolved = inner + 2 * metadata.ssm_group_count * metadata.ssm_state_size
    projected = inner + convolved + metadata.ssm_rank
    states = 2 * _F32 * metadata.ssm_state_elements * graph.shape.slots
    return graph.row_bytes * (projected + 2 * convolved + inner) + states


def _attention_moment(metadata: ModelMetadata, graph: Graph) -> int:
    if metadata.recurrent_only or not any(metadata.kv_head_counts):
        return 0
    row, width, query = graph.row_bytes, metadata.embedding_length, metadata.query_length
    heads = max(metadata.head_counts, default=0)
    if metadata.latent_attention:
        alive = 4 * width + query + heads * (metadata.key_length + metadata.value_length)
    else:
        alive = 4 * width + 2 * query + (query // 2 if metadata.gated_query else 0)
    if graph.flash:
        if metadata.latent_attention:
            alive += heads * metadata.value_length
        else:
            alive += max(metadata.kv_head_counts) * metadata.key_length
        return row * alive + graph.scratch_bytes
    scores = row * heads * max(graph.full_cells, graph.sliding_cells)
    if metadata.latent_attention:
        scores += 2 * graph.full_cells * graph.shape.streams * metadata.value_length
    return row * alive + scores
