"""Shapes of well-known models: what their GGUF headers hold, tensor by tensor.

Used with `gguf_files.write`. Dimensions are the published ones; tensor types follow what
llama-quantize chooses for a mix, as in the files of the measured cases.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from tests.support.gguf_files import Shape, Tensor, Value

#: names and dimensions; types come with the mix
Rows = list[tuple[str, tuple[int, ...]]]

#: parts of a tensor's name that keep it in f32
_PLAIN = [
    ".bias",
    "norm",
    "ssm_conv1d",
    "ssm_a",
    "ssm_d",
    "ffn_gate_inp",
    "token_types",
    "position_embd",
    "sinks",
]
#: a row that the block does not divide takes the next smaller block
_NARROWER = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Dimensions of a model whose layers look alike."""

    width: int
    layers: int
    heads: int = 0
    kv_heads: int = 0
    head: int = 0
    inner: int = 0
    vocabulary: int
    #: no output.weight: the embedding serves as output too
    tied: bool = False
    trained: int = 131072
    bias: bool = False
    #: norms of queries and keys; norms after attention and feed-forward; one tensor for QKV
    qk_norm: bool = False
    post_norm: bool = False
    fused: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_inner: int = 0
    parts: int = 1
    keys: dict[str, Value] = field(default_factory=dict)


def shape(name: str, architecture: str, body: Body, rows: Rows) -> Shape:
    """Return the shape of `name`, whose last dotted part is the mix ("llama31-8b.Q4_K_M")."""
    mix = name.rpartition(".")[2]
    tensors = tuple(
        Tensor(name=row, dims=dims, type=tensor_type(mix, row, dims, body)) for row, dims in rows
    )
    return Shape(
        name=name,
        architecture=architecture,
        keys=body.keys,
        tensors=tensors,
        vocabulary=body.vocabulary,
        parts=body.parts,
    )


def transformer(name: str, architecture: str, body: Body) -> Shape:
    """Return a dense or mixture-of-experts transformer."""
    rows = top_rows(body)
    for layer in range(body.layers):
        rows += norm_rows(layer, body) + attention_rows(layer, body)
        rows += expert_rows(layer, body) if body.experts else feed_forward_rows(layer, body)
    keys = {**common_keys(body), **head_keys(body), **expert_keys(body)}
    return shape(name, architecture, _with_keys(body, keys), rows)


def tensor_type(mix: str, name: str, dims: tuple[int, ...], body: Body) -> T:
    if "shortconv.conv" in name:
        return T.F16
    if len(dims) == 1 or any(part in name for part in _PLAIN):
        return T.F32
    kind = _mixed_type(mix, name, body)
    if dims[0] % GGML_QUANT_SIZES[kind][0]:
        kind = _NARROWER.get(kind, T.F16)
    return kind if dims[0] % GGML_QUANT_SIZES[kind][0] == 0 else T.F16


def _mixed_type(mix: str, name: str, body: Body) -> T:
    is_output = name.startswith("output.") or (name.startswith("token_embd") and body.tied)
    if mix in ("Q4_0", "IQ4_XS"):
        return T.Q6_K if is_output else T[mix]
    if mix == "MXFP4":
        return T.MXFP4 if "_exps" in name else T.Q8_0
    if mix not in ("Q4_K_M", "Q5_K_M"):
        return T[mix]
    if is_output:
        return T.Q6_K
    if _gets_more_bits(name, body.layers):
        return T.Q5_K if "attn_qkv" in name else T.Q6_K
    return T.Q4_K if mix == "Q4_K_M" else T.Q5_K


def _gets_more_bits(name: str, layers: int) -> bool:
    if not any(part in name for part in ("attn_v.", "ffn_down", "attn_qkv")):
        return False
    layer, eighth = int(name.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


# --- keys ------------------------------------------------------------------------------------


def common_keys(body: Body) -> dict[str, Value]:
    return {
        "context_length": body.trained,
        "embedding_length": body.width,
        "block_count": body.layers,
        "feed_forward_length": body.inner,
        "attention.head_count": body.heads,
        "attention.head_count_kv": body.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": body.head,
        "vocab_size": body.vocabulary,
        **body.keys,
    }


def head_keys(body: Body) -> dict[str, Value]:
    return {"attention.key_length": body.head, "attention.value_length": body.head}


def expert_keys(body: Body) -> dict[str, Value]:
    if not body.experts:
        return {}
    return {
        "expert_count": body.experts,
        "expert_used_count": body.experts_used,
        "expert_feed_forward_length": body.expert_inner,
    }


def ssm_keys(*, inner: int, state: int, rank: int, groups: int) -> dict[str, Value]:
    return {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
        "ssm.group_count": groups,
    }


def _with_keys(body: Body, keys: dict[str, Value]) -> Body:
    return replace(body, keys={**keys, **body.keys})


# --- tensors ---------------------------------------------------------------------------------


def top_rows(body: Body) -> Rows:
    embedding = (body.width, body.vocabulary)
    output: Rows = [] if body.tied else [("output.weight", embedding)]
    return [("token_embd.weight", embedding), ("output_norm.weight", (body.width,)), *output]


def norm_rows(layer: int, body: Body) -> Rows:
    names = ["attn_norm", "ffn_norm"]
    if body.post_norm:
        names += ["post_attention_norm", "post_ffw_norm"]
    return [(f"blk.{layer}.{name}.weight", (body.width,)) for name in names]


def attention_rows(layer: int, body: Body) -> Rows:
    prefix, width = f"blk.{layer}.attn_", body.width
    query, cache = body.heads * body.head, body.kv_heads * body.head
    if body.fused:
        rows: Rows = [(f"{prefix}qkv.weight", (width, query + 2 * cache))]
    else:
        sizes = {"q": query, "k": cache, "v": cache}
        rows = [(f"{prefix}{part}.weight", (width, size)) for part, size in sizes.items()]
        if body.bias:
            rows += [(f"{prefix}{part}.bias", (size,)) for part, size in sizes.items()]
    rows.append((f"{prefix}output.weight", (query, width)))
    if body.qk_norm:
        rows += [(f"{prefix}{part}_norm.weight", (body.head,)) for part in "qk"]
    return rows


def feed_forward_rows(layer: int, body: Body) -> Rows:
    prefix, width, inner = f"blk.{layer}.ffn_", body.width, body.inner
    if body.fused:
        rows: Rows = [(f"{prefix}up.weight", (width, 2 * inner))]
    else:
        rows = [(f"{prefix}{part}.weight", (width, inner)) for part in ("gate", "up")]
    return [*rows, (f"{prefix}down.weight", (inner, width))]


def expert_rows(layer: int, body: Body) -> Rows:
    prefix, width, inner = f"blk.{layer}.ffn_", body.width, body.expert_inner
    return [
        (f"{prefix}gate_inp.weight", (width, body.experts)),
        (f"{prefix}gate_exps.weight", (width, inner, body.experts)),
        (f"{prefix}up_exps.weight", (width, inner, body.experts)),
        (f"{prefix}down_exps.weight", (inner, width, body.experts)),
    ]


def shared_expert_rows(layer: int, width: int, inner: int) -> Rows:
    prefix = f"blk.{layer}.ffn_"
    return [
        (f"{prefix}gate_shexp.weight", (width, inner)),
        (f"{prefix}up_shexp.weight", (width, inner)),
        (f"{prefix}down_shexp.weight", (inner, width)),
    ]


def ssm_rows(layer: int, body: Body, *, inner: int, state: int, rank: int) -> Rows:
    prefix, convolved = f"blk.{layer}.ssm_", inner + 2 * state
    return [
        (f"{prefix}in.weight", (body.width, 2 * inner + 2 * state + rank)),
        (f"{prefix}conv1d.weight", (4, convolved)),
        (f"{prefix}conv1d.bias", (convolved,)),
        (f"{prefix}dt.bias", (rank,)),
        (f"{prefix}a", (1, rank)),
        (f"{prefix}d", (1, rank)),
        (f"{prefix}norm.weight", (inner, 1)),
        (f"{prefix}out.weight", (inner, body.width)),
    ]
