"""A model laid over devices: what every part of an estimate is computed from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smartproxy.memory.compute_buffer import Graph, has_flash_kernel
from smartproxy.memory.kv_cache import (
    CacheShape,
    LayerCache,
    cache_shape,
    caches_kv,
    is_quantized,
    layer_caches,
)
from smartproxy.memory.layer_split import HOST, layer_devices
from smartproxy.memory.types import EstimateOptions, FlashAttention, Layout
from smartproxy.model_file.types import ModelMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class InContext:
    """What follows from a context size, over whatever devices."""

    shape: CacheShape
    graph: Graph
    #: per repeating layer
    caches: tuple[LayerCache, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut:
    metadata: ModelMetadata
    options: EstimateOptions
    layout: Layout
    shape: CacheShape
    graph: Graph
    #: per repeating layer
    caches: tuple[LayerCache, ...]
    #: device of each layer, the output layer last
    devices: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The hidden state of one micro-batch."""
        return self.graph.row_bytes * self.metadata.embedding_length

    @property
    def first_device(self) -> int:
        """The device that holds the first offloaded layer; it streams what stays on the host."""
        return min((device for device in self.devices if device != HOST), default=0)

    @property
    def pipelined(self) -> bool:
        """Several devices hold the whole model and work on micro-batches in turn.

        Source: llama-context.cpp, pipeline_parallel.
        """
        return (
            len(self.layout.tensor_split) > 1
            and HOST not in self.devices
            and self.options.kv_offload
            and not self.layout.cpu_moe_layers
        )


def in_context(metadata: ModelMetadata, options: EstimateOptions, context_size: int) -> InContext:
    """Return caches and graph for so many tokens; 0 = the model's own. Raises UnknownCacheType."""
    context = context_size if context_size > 0 else clamped_context(metadata, 0)
    shape = cache_shape(metadata, options, context)
    flash = resolved_flash_attn(metadata, options)
    caches = layer_caches(metadata, options, shape, flash=flash)
    return InContext(shape=shape, graph=_graph(metadata, options, (shape, caches)), caches=caches)


def lay_out(
    metadata: ModelMetadata, options: EstimateOptions, layout: Layout, sized: InContext
) -> LaidOut:
    """Return everything that follows from the arguments but bytes. sized: for layout's context."""
    return LaidOut(
        metadata=metadata,
        options=options,
        layout=layout,
        shape=sized.shape,
        graph=sized.graph,
        caches=sized.caches,
        devices=layer_devices(metadata.layer_count, layout.gpu_layers, layout.tensor_split),
    )


def clamped_context(metadata: ModelMetadata, context_size: int) -> int:
    """Return the tokens to serve: at most the trained context, which 0 stands for."""
    trained = metadata.trained_context or 4096
    return min(context_size, trained) if context_size > 0 else trained


def resolved_flash_attn(metadata: ModelMetadata, options: EstimateOptions) -> bool:
    """Tell whether the server runs flash attention on CUDA.

    "auto" means yes where there is a kernel for the head size, and always with a quantized V
    cache, which does not work without (llama-context.cpp).
    """
    if options.flash_attn is FlashAttention.AUTO:
        return has_flash_kernel(metadata) or is_quantized(options.cache_type_v)
    return options.flash_attn is FlashAttention.ON


def _outputs(options: EstimateOptions, shape: CacheShape) -> int:
    """Return rows of logits: one per slot, and one per token that was drafted for it.

    Source: server-context.cpp (n_outputs_max); b10068 prints 8 for 2 slots that draft 3 tokens.
    """
    return shape.slots * (1 + options.draft_tokens)


def with_flash_attn_resolved(metadata: ModelMetadata, options: EstimateOptions) -> EstimateOptions:
    """Return options that say on or off, so that the server need not decide for itself.

    "auto" stays for architectures that the tables don't know: they are charged for both.
    """
    if metadata.unknown is not None:
        return options
    on = resolved_flash_attn(metadata, options)
    return replace(options, flash_attn=FlashAttention.ON if on else FlashAttention.OFF)


def _graph(
    metadata: ModelMetadata,
    options: EstimateOptions,
    sizes: tuple[CacheShape, Sequence[LayerCache]],
) -> Graph:
    shape, caches = sizes
    cached = [layer for layer in range(metadata.layer_count) if caches_kv(metadata, layer)]
    slides = [metadata.sliding_layers[layer] for layer in cached]
    return Graph(
        shape=shape,
        # without a kernel attention runs op by op, whatever was asked for
        flash=resolved_flash_attn(metadata, options) and has_flash_kernel(metadata),
        # a sliding cache always has a full one beside it, with its mask, however few layers use it
        full_cells=shape.cells if cached else 0,
        sliding_cells=shape.sliding_cells if any(slides) else 0,
        scratch_bytes=max((cache.scratch_bytes for cache in caches), default=0),
        outputs=shape.tokens if options.embeddings else min(shape.tokens, _outputs(options, shape)),
        mixed_cache_types=options.cache_type_k != options.cache_type_v,
    )
