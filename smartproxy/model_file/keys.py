"""Read a header's keys as llama.cpp reads them: typed, per layer, with its defaults.

Input: a `Header`; output: keyword arguments of `ModelMetadata`, those that keys decide. Pure.
Source: llama.cpp b11434, src/llama-model.cpp (load_hparams) and src/llama-hparams.cpp.
"""

from __future__ import annotations

from typing import Any

from smartproxy.model_file import architectures
from smartproxy.model_file.header import BadHeader, Counted, Header

#: LLAMA_MAX_LAYERS
MAX_LAYERS = 512
#: beyond any model: larger numbers are damage, and would make sums meaningless
MAX_NUMBER = 1 << 31


def architecture_of(header: Header) -> str:
    value = header.keys.get("general.architecture")
    if not isinstance(value, str) or not value:
        raise BadHeader("general.architecture is missing")
    return value


def integer(header: Header, key: str, default: int = 0) -> int:
    """Return an architecture's number; of a per-layer array the largest."""
    value = header.keys.get(f"{architecture_of(header)}.{key}")
    if value is None:
        return default
    if isinstance(value, list):
        return max((_checked(key, item) for item in value), default=default)
    return _checked(key, value)


def per_layer(header: Header, key: str, default: int) -> tuple[int, ...]:
    """Return one number per layer, from an array or from one number for all."""
    layers = layer_count(header)
    value = header.keys.get(f"{architecture_of(header)}.{key}")
    if not isinstance(value, list):
        return (integer(header, key, default),) * layers
    if len(value) < layers:
        raise BadHeader(f"{key} has {len(value)} numbers for {layers} layers")
    return tuple(_checked(key, item) for item in value[:layers])


def layer_count(header: Header) -> int:
    layers = integer(header, "block_count")
    if layers > MAX_LAYERS:
        raise BadHeader(f"it claims {layers} layers (at most {MAX_LAYERS})")
    return layers


def prediction_layers(header: Header) -> int:
    """Return how many last layers only serve multi-token prediction."""
    skipped = integer(header, "nextn_predict_layers")
    return skipped if skipped < layer_count(header) else 0


def facts(header: Header) -> dict[str, Any]:
    """Return everything of ModelMetadata that the keys decide; raises BadHeader."""
    architecture = architecture_of(header)
    name = header.keys.get("general.name")
    return {
        "architecture": architecture,
        "name": name if isinstance(name, str) else None,
        "trained_context": integer(header, "context_length"),
        "vocabulary_size": _vocabulary_size(header),
        "layer_count": layer_count(header),
        "prediction_layer_count": prediction_layers(header),
        "embedding_length": integer(header, "embedding_length"),
        **_attention(header),
        **_feed_forward(header),
        **_sliding(header),
        **_recurrent(header),
    }


def _checked(key: str, value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
        raise BadHeader(f"{key} is {value!r:.40}, not a number that makes sense")
    return int(value)


def _vocabulary_size(header: Header) -> int:
    tokens = header.keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Counted):
        return tokens.count
    return integer(header, "vocab_size")


def _attention(header: Header) -> dict[str, Any]:
    heads = per_layer(header, "attention.head_count", 0)
    # KV heads default to the layer's own heads
    key = f"{architecture_of(header)}.attention.head_count_kv"
    kv_heads = per_layer(header, "attention.head_count_kv", 0) if key in header.keys else heads
    most = max(heads, default=0)
    head = integer(header, "embedding_length") // most if most else 0
    key_length = integer(header, "attention.key_length") or head
    value_length = integer(header, "attention.value_length") or head
    shared = integer(header, "attention.shared_kv_layers")
    architecture = architecture_of(header)
    return {
        "head_counts": heads,
        "kv_head_counts": kv_heads,
        "key_length": key_length,
        "value_length": value_length,
        "sliding_key_length": integer(header, "attention.key_length_swa") or key_length,
        "sliding_value_length": integer(header, "attention.value_length_swa") or value_length,
        "latent_attention": integer(header, "attention.key_length_mla") > 0,
        "gated_query": architecture in architectures.INTERVAL,
        "has_kv_cache": architecture not in architectures.UNCACHED,
        "shared_kv_from": max(layer_count(header) - shared, 0) if shared else None,
    }


def _feed_forward(header: Header) -> dict[str, Any]:
    experts = integer(header, "expert_count")
    expert_length = integer(header, "expert_feed_forward_length")
    leading = integer(header, "leading_dense_block_count")
    return {
        "feed_forward_length": integer(header, "feed_forward_length"),
        "expert_count": experts,
        "expert_used_count": integer(header, "expert_used_count"),
        "expert_feed_forward_length": expert_length,
        "has_dense_layers": not experts or leading > 0 or not expert_length,
    }


def _sliding(header: Header) -> dict[str, Any]:
    """Which layers slide (src/models/*.cpp, load_swa_pattern)."""
    architecture, layers = architecture_of(header), layer_count(header)
    none = {"sliding_window": 0, "sliding_layers": (False,) * layers}
    known = architectures.SLIDING.get(architecture)
    window_key = f"{architecture}.attention.sliding_window"
    if architecture.startswith("lfm2") and integer(header, "attention.sliding_window"):
        window = integer(header, "attention.sliding_window")
        kv_heads = per_layer(header, "attention.head_count_kv", 0)
        return {"sliding_window": window, "sliding_layers": tuple(n > 0 for n in kv_heads)}
    if known is None:
        return none
    window = integer(header, "attention.sliding_window") or known.default_window
    if architecture == "llama4" and header.keys.get(window_key) == 0:
        return none  # it says "no chunks" by a window of zero
    if not window:
        return none
    pattern = header.keys.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        marks = tuple(bool(mark) for mark in pattern[:layers])
        slides = marks + (False,) * (layers - len(marks))
    else:
        period = integer(header, "attention.sliding_window_pattern", known.period)
        slides = architectures.sliding_layers(layers, known, period)
    return {"sliding_window": window, "sliding_layers": slides}


def _recurrent(header: Header) -> dict[str, Any]:
    """Which layers carry a state and how large it is (llama-hparams.cpp, n_embd_r and n_embd_s)."""
    architecture = architecture_of(header)
    inner, state = integer(header, "ssm.inner_size"), integer(header, "ssm.state_size")
    groups = integer(header, "ssm.group_count")
    conv_elements, state_elements = _state_elements(header)
    return {
        "recurrent_layers": _recurrent_layers(header),
        "recurrent_and_cached": architecture in architectures.BOTH,
        "recurrent_only": architecture in architectures.RECURRENT,
        "conv_state_elements": conv_elements,
        "ssm_state_elements": state_elements,
        "ssm_inner_size": inner,
        "ssm_state_size": state,
        "ssm_group_count": groups,
        "ssm_rank": integer(header, "ssm.time_step_rank"),
    }


def _recurrent_layers(header: Header) -> tuple[bool, ...]:
    architecture, layers = architecture_of(header), layer_count(header)
    trunk = layers - prediction_layers(header)
    if architecture in architectures.RECURRENT | architectures.BOTH:
        return (True,) * layers
    if architecture in architectures.INTERVAL:
        interval = integer(header, "full_attention_interval", 4) or 4
        return tuple((layer + 1) % interval != 0 and layer < trunk for layer in range(layers))
    if architecture in architectures.HYBRID:
        return tuple(n == 0 for n in per_layer(header, "attention.head_count_kv", 0))
    if architecture not in architectures.KNOWN and integer(header, "ssm.state_size"):
        return (True,) * layers  # unknown: a state everywhere, besides the cache
    return (False,) * layers


def _state_elements(header: Header) -> tuple[int, int]:
    width = integer(header, "embedding_length")
    conv = integer(header, "ssm.conv_kernel")
    if head := integer(header, "wkv.head_size"):
        return integer(header, "token_shift_count", 2) * width, width * head
    if cached := integer(header, "shortconv.l_cache"):
        return width * (cached - 1), 0
    if head := integer(header, "kda.head_dim"):
        heads = max(per_layer(header, "attention.head_count", 0), default=0)
        return 3 * (conv - 1 if conv else 3) * heads * head, head * head * heads
    inner, state = integer(header, "ssm.inner_size"), integer(header, "ssm.state_size")
    groups = integer(header, "ssm.group_count")
    return max(conv - 1, 0) * (inner + 2 * groups * state), state * inner
