"""What a GGUF file says of a model, as plain values. No I/O."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpan:
    """A stretch of one of a model's files, in bytes."""

    #: index into ModelMetadata.files
    file: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """The tensors of one layer, in bytes as a CUDA device holds them (rows and tensors padded)."""

    weights_bytes: int = 0
    #: the part of weights_bytes that --n-cpu-moe keeps on the host
    expert_bytes: int = 0
    largest_bytes: int = 0
    gate_up_bytes: int = 0
    attention_bytes: int = 0
    #: where they lie in the files, experts apart: a host buffer that maps the file spans them
    spans: tuple[FileSpan, ...] = ()
    expert_spans: tuple[FileSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """What a GGUF header says of a model, as far as memory and the catalogue want to know."""

    architecture: str
    name: str | None
    #: paths, in the order of the parts
    files: tuple[str, ...]
    #: size on disk, all parts
    file_bytes: int
    #: number of weights
    parameters: int
    #: from the tensors' types, not from the file's name: "Q4_K_M", "Q8_0", "F16"
    quantization: str
    #: tokens; 0 where the header does not say
    trained_context: int
    vocabulary_size: int
    #: why the estimate must be deliberately high; None = architecture and types are known
    unknown: str | None = None

    #: repeating layers, those for multi-token prediction included (the output layer is not)
    layer_count: int
    #: the last ones, which a server that does not draft with them neither loads nor caches
    prediction_layer_count: int = 0
    embedding_length: int
    #: per layer
    head_counts: tuple[int, ...]
    kv_head_counts: tuple[int, ...]
    #: elements per head of K and V in the cache, in full and in sliding layers
    key_length: int
    value_length: int
    sliding_key_length: int
    sliding_value_length: int
    #: width of the widest query projection
    query_length: int
    feed_forward_length: int = 0
    expert_count: int = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0
    #: some layers have a dense feed-forward besides or instead of experts
    has_dense_layers: bool = True
    #: K holds a latent from which V is made (multi-head latent attention): no V in the cache
    latent_attention: bool = False
    #: the query projection carries a gate of its own size (qwen3next)
    gated_query: bool = False
    has_kv_cache: bool = True
    #: tokens attended to in the layers marked; 0 = none
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...]
    recurrent_layers: tuple[bool, ...]
    #: layers that keep both a state and a KV cache (falcon-h1)
    recurrent_and_cached: bool = False
    #: no layer attends: a state-space or RWKV model
    recurrent_only: bool = False
    #: layers from this one on use the cache of earlier ones; None = each has its own
    shared_kv_from: int | None = None
    #: f32 elements per sequence and recurrent layer
    conv_state_elements: int = 0
    ssm_state_elements: int = 0
    ssm_inner_size: int = 0
    ssm_state_size: int = 0
    ssm_group_count: int = 0
    ssm_rank: int = 0

    #: one entry per repeating layer
    layers: tuple[LayerTensors, ...]
    #: the output layer, a tied embedding's second copy included
    output: LayerTensors
    #: embeddings: always on the host
    input_bytes: int
    input_spans: tuple[FileSpan, ...] = ()
