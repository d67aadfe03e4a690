"""Shapes that are more than a plain transformer: latent attention, state space, encoders."""

from __future__ import annotations

from dataclasses import replace

from tests.support.gguf_files import Shape, Value
from tests.support.gguf_shapes import (
    Body,
    Rows,
    attention_rows,
    common_keys,
    expert_keys,
    expert_rows,
    feed_forward_rows,
    head_keys,
    norm_rows,
    shape,
    shared_expert_rows,
    ssm_keys,
    ssm_rows,
    top_rows,
)


def gpt_oss(name: str, body: Body) -> Shape:
    rows = top_rows(body)
    width, experts, inner = body.width, body.experts, body.expert_inner
    for layer in range(body.layers):
        blk = f"blk.{layer}."
        rows += [
            (f"{blk}attn_norm.weight", (width,)),
            (f"{blk}post_attention_norm.weight", (width,)),
        ]
        rows += attention_rows(layer, body)
        rows += [(f"{blk}attn_output.bias", (width,)), (f"{blk}attn_sinks.weight", (body.heads,))]
        rows += expert_rows(layer, body)
        rows += [
            (f"{blk}ffn_gate_inp.bias", (experts,)),
            (f"{blk}ffn_gate_exps.bias", (inner, experts)),
            (f"{blk}ffn_up_exps.bias", (inner, experts)),
            (f"{blk}ffn_down_exps.bias", (width, experts)),
        ]
    keys = {**common_keys(body), **head_keys(body), **expert_keys(body)}
    return shape(name, "gpt-oss", replace(body, keys=keys), rows)


def deepseek2(name: str, body: Body, *, latent: int = 512, rope: int = 64) -> Shape:
    """One leading dense layer, then experts with two shared ones; latent attention."""
    width, heads, value = body.width, body.heads, 128
    plain = body.head - rope
    rows = top_rows(body)
    for layer in range(body.layers):
        attn = f"blk.{layer}.attn_"
        rows += norm_rows(layer, body)
        rows += [
            (f"{attn}q.weight", (width, heads * body.head)),
            (f"{attn}kv_a_mqa.weight", (width, latent + rope)),
            (f"{attn}kv_a_norm.weight", (latent,)),
            (f"{attn}k_b.weight", (plain, latent, heads)),
            (f"{attn}v_b.weight", (latent, value, heads)),
            (f"{attn}output.weight", (heads * value, width)),
        ]
        if layer == 0:
            rows += feed_forward_rows(layer, body)
        else:
            rows += expert_rows(layer, body)
            rows += shared_expert_rows(layer, width, 2 * body.expert_inner)
    keys: dict[str, Value] = {
        **common_keys(body),
        **expert_keys(body),
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": body.head,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": latent,
        "rope.dimension_count": rope,
        "expert_shared_count": 2,
        "leading_dense_block_count": 1,
        "expert_weights_scale": 1.0,
    }
    return shape(name, "deepseek2", replace(body, keys=keys), rows)


def mamba2(name: str, body: Body, *, state: int = 128) -> Shape:
    inner = 2 * body.width
    rank = inner // 64
    rows = top_rows(body)
    for layer in range(body.layers):
        rows.append((f"blk.{layer}.attn_norm.weight", (body.width,)))
        rows += ssm_rows(layer, body, inner=inner, state=state, rank=rank)
    keys = {**common_keys(body), **ssm_keys(inner=inner, state=state, rank=rank, groups=1)}
    return shape(name, "mamba2", replace(body, keys=keys), rows)


def granite_hybrid(name: str, body: Body, *, attention_at: tuple[int, ...]) -> Shape:
    inner, state = 2 * body.width, 128
    rank = inner // 64
    rows = top_rows(body)
    for layer in range(body.layers):
        rows += norm_rows(layer, body)
        if layer in attention_at:
            rows += attention_rows(layer, body)
        else:
            rows += ssm_rows(layer, body, inner=inner, state=state, rank=rank)
        rows += expert_rows(layer, body) + shared_expert_rows(layer, body.width, 1024)
    keys = {
        **common_keys(body),
        **expert_keys(body),
        **ssm_keys(inner=inner, state=state, rank=rank, groups=1),
        "attention.head_count_kv": _where(attention_at, body),
        "expert_shared_feed_forward_length": 1024,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 6.0,
        "attention.scale": 0.0078125,
    }
    return shape(name, "granitehybrid", replace(body, keys=keys), rows)


def lfm2(name: str, body: Body, *, attention_at: tuple[int, ...]) -> Shape:
    width = body.width
    rows: Rows = [
        ("token_embd.weight", (width, body.vocabulary)),
        ("token_embd_norm.weight", (width,)),
    ]
    for layer in range(body.layers):
        rows += norm_rows(layer, body)
        if layer in attention_at:
            rows += attention_rows(layer, body)
        else:
            conv = f"blk.{layer}.shortconv."
            rows += [
                (f"{conv}conv.weight", (3, width)),
                (f"{conv}in_proj.weight", (width, 3 * width)),
                (f"{conv}out_proj.weight", (width, width)),
            ]
        rows += feed_forward_rows(layer, body)
    keys = {
        **common_keys(body),
        "attention.head_count_kv": _where(attention_at, body),
        "shortconv.l_cache": 3,
    }
    return shape(name, "lfm2", replace(body, keys=keys), rows)


def qwen3_next(name: str, body: Body) -> Shape:
    """Every fourth layer attends; the others carry a gated delta-net state."""
    key_heads, value_heads, state = 16, 32, 128
    rows = top_rows(body)
    for layer in range(body.layers):
        rows += _qwen3_next_mixer(layer, body, key_width=16 * 128, value_width=32 * 128)
        rows += expert_rows(layer, body)
        rows.append((f"blk.{layer}.ffn_gate_inp_shexp.weight", (body.width,)))
        rows += shared_expert_rows(layer, body.width, 512)
    keys = {
        **common_keys(body),
        **head_keys(body),
        **expert_keys(body),
        **ssm_keys(inner=value_heads * state, state=state, rank=value_heads, groups=key_heads),
        "rope.dimension_count": 64,
        "expert_shared_feed_forward_length": 512,
        "full_attention_interval": 4,
    }
    return shape(name, "qwen3next", replace(body, keys=keys), rows)


def _qwen3_next_mixer(layer: int, body: Body, *, key_width: int, value_width: int) -> Rows:
    blk, width = f"blk.{layer}.", body.width
    rows: Rows = [
        (f"{blk}attn_norm.weight", (width,)),
        (f"{blk}post_attention_norm.weight", (width,)),
    ]
    if (layer + 1) % 4 == 0:
        query = body.heads * body.head
        attention = dict(attention_rows(layer, body))
        attention[f"{blk}attn_q.weight"] = (width, 2 * query)
        return rows + list(attention.items())
    convolved = 2 * key_width + value_width
    return [
        *rows,
        (f"{blk}attn_qkv.weight", (width, convolved)),
        (f"{blk}attn_gate.weight", (width, value_width)),
        (f"{blk}ssm_conv1d.weight", (4, convolved)),
        (f"{blk}ssm_dt.bias", (32,)),
        (f"{blk}ssm_a", (32,)),
        (f"{blk}ssm_ba.weight", (width, 64)),
        (f"{blk}ssm_norm.weight", (128,)),
        (f"{blk}ssm_out.weight", (value_width, width)),
    ]


def bert(name: str, body: Body) -> Shape:
    width, inner = body.width, body.inner
    rows: Rows = [
        ("token_embd.weight", (width, body.vocabulary)),
        ("token_types.weight", (width, 2)),
        ("position_embd.weight", (width, body.trained)),
        ("token_embd_norm.weight", (width,)),
        ("token_embd_norm.bias", (width,)),
    ]
    for layer in range(body.layers):
        blk = f"blk.{layer}."
        rows += attention_rows(layer, body)
        rows += [
            (f"{blk}attn_output.bias", (width,)),
            (f"{blk}ffn_up.weight", (width, inner)),
            (f"{blk}ffn_up.bias", (inner,)),
            (f"{blk}ffn_down.weight", (inner, width)),
            (f"{blk}ffn_down.bias", (width,)),
        ]
        for norm in ("attn_output_norm", "layer_output_norm"):
            rows += [(f"{blk}{norm}.weight", (width,)), (f"{blk}{norm}.bias", (width,))]
    keys: dict[str, Value] = {
        "context_length": body.trained,
        "embedding_length": width,
        "block_count": body.layers,
        "feed_forward_length": inner,
        "attention.head_count": body.heads,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": 2,
    }
    return shape(name, "bert", replace(body, keys=keys), rows)


def _where(layers: tuple[int, ...], body: Body) -> list[int]:
    return [body.kv_heads if layer in layers else 0 for layer in range(body.layers)]
