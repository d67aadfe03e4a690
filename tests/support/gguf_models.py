"""The models of the measured cases, and others that those leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.support.gguf_files import Shape
from tests.support.gguf_shapes import Body, transformer
from tests.support.gguf_special import (
    bert,
    deepseek2,
    gpt_oss,
    granite_hybrid,
    lfm2,
    mamba2,
    qwen3_next,
)

LLAMA_8B = Body(
    width=4096, layers=32, heads=32, kv_heads=8, head=128, inner=14336, vocabulary=128256
)
LLAMA_1B = Body(
    width=2048, layers=16, heads=32, kv_heads=8, head=64, inner=8192, vocabulary=128256, tied=True
)
LLAMA_70B = replace(LLAMA_8B, width=8192, layers=80, heads=64, inner=28672, parts=3)
MIXTRAL = replace(
    LLAMA_8B, vocabulary=32000, trained=32768, experts=8, experts_used=2, expert_inner=14336
)
QWEN2_7B = Body(
    width=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head=128,
    inner=18944,
    vocabulary=152064,
    bias=True,
)
QWEN2_05B = replace(
    QWEN2_7B,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head=64,
    inner=4864,
    vocabulary=151936,
    tied=True,
)
QWEN3_4B = Body(
    width=2560,
    layers=36,
    heads=32,
    kv_heads=8,
    head=128,
    inner=9728,
    vocabulary=151936,
    tied=True,
    qk_norm=True,
)
QWEN3_14B = replace(QWEN3_4B, width=5120, layers=40, heads=40, inner=17408, tied=False, parts=2)
QWEN3_30B = replace(
    QWEN3_4B,
    width=2048,
    layers=48,
    kv_heads=4,
    inner=6144,
    tied=False,
    experts=128,
    experts_used=8,
    expert_inner=768,
)
GEMMA3_4B = Body(
    width=2560,
    layers=34,
    heads=8,
    kv_heads=4,
    head=256,
    inner=10240,
    vocabulary=262144,
    tied=True,
    qk_norm=True,
    post_norm=True,
    keys={"attention.sliding_window": 1024},
)
GEMMA3_12B = replace(GEMMA3_4B, width=3840, layers=48, heads=16, kv_heads=8, inner=15360)
GEMMA2_9B = replace(
    GEMMA3_4B,
    width=3584,
    layers=42,
    heads=16,
    kv_heads=8,
    inner=14336,
    vocabulary=256000,
    qk_norm=False,
    trained=8192,
    keys={"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0},
)
PHI4 = Body(
    width=5120,
    layers=40,
    heads=40,
    kv_heads=10,
    head=128,
    inner=17920,
    vocabulary=100352,
    trained=16384,
    fused=True,
)
GPT_OSS_20B = Body(
    width=2880,
    layers=24,
    heads=64,
    kv_heads=8,
    head=64,
    inner=2880,
    vocabulary=201088,
    bias=True,
    experts=32,
    experts_used=4,
    expert_inner=2880,
    keys={"attention.sliding_window": 128},
)
DEEPSEEK2_LITE = Body(
    width=2048,
    layers=27,
    heads=16,
    kv_heads=1,
    head=192,
    inner=10944,
    vocabulary=102400,
    trained=163840,
    experts=64,
    experts_used=6,
    expert_inner=1408,
)
MAMBA2_27B = Body(width=2560, layers=64, vocabulary=50288, trained=1048576, tied=True)
GRANITE_HYBRID = Body(
    width=1536,
    layers=40,
    heads=12,
    kv_heads=4,
    head=128,
    inner=512,
    vocabulary=100352,
    tied=True,
    experts=64,
    experts_used=6,
    expert_inner=512,
)
LFM2_12B = Body(
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head=64,
    inner=8192,
    vocabulary=65536,
    tied=True,
    trained=128000,
    qk_norm=True,
)
QWEN3_NEXT = Body(
    width=2048,
    layers=48,
    heads=16,
    kv_heads=2,
    head=256,
    inner=5120,
    vocabulary=151936,
    trained=262144,
    qk_norm=True,
    experts=512,
    experts_used=10,
    expert_inner=512,
)
BGE_LARGE = Body(
    width=1024,
    layers=24,
    heads=16,
    kv_heads=16,
    head=64,
    inner=4096,
    vocabulary=30522,
    trained=512,
    bias=True,
)


#: file name as in the measured cases (of several parts: without the part) -> shape
MODELS: dict[str, Callable[[], Shape]] = {
    "llama31-8b.Q4_K_M": lambda: transformer("llama31-8b.Q4_K_M", "llama", LLAMA_8B),
    "llama32-1b.Q8_0": lambda: transformer("llama32-1b.Q8_0", "llama", LLAMA_1B),
    "llama33-70b.Q4_K_M": lambda: transformer("llama33-70b.Q4_K_M", "llama", LLAMA_70B),
    "mixtral-8x7b.Q4_K_M": lambda: transformer("mixtral-8x7b.Q4_K_M", "llama", MIXTRAL),
    "qwen25-7b.Q4_K_M": lambda: transformer("qwen25-7b.Q4_K_M", "qwen2", QWEN2_7B),
    "qwen25-05b.Q8_0": lambda: transformer("qwen25-05b.Q8_0", "qwen2", QWEN2_05B),
    "qwen3-4b.Q4_K_M": lambda: transformer("qwen3-4b.Q4_K_M", "qwen3", QWEN3_4B),
    "qwen3-14b.Q5_K_M": lambda: transformer("qwen3-14b.Q5_K_M", "qwen3", QWEN3_14B),
    "qwen3moe-30b-a3b.Q4_K_M": lambda: transformer(
        "qwen3moe-30b-a3b.Q4_K_M", "qwen3moe", QWEN3_30B
    ),
    "gemma2-9b.Q4_K_M": lambda: transformer("gemma2-9b.Q4_K_M", "gemma2", GEMMA2_9B),
    "gemma3-4b.Q4_K_M": lambda: transformer("gemma3-4b.Q4_K_M", "gemma3", GEMMA3_4B),
    "gemma3-12b.Q4_0": lambda: transformer("gemma3-12b.Q4_0", "gemma3", GEMMA3_12B),
    "phi4-14b.Q4_K_M": lambda: transformer("phi4-14b.Q4_K_M", "phi3", PHI4),
    "deepseek2-lite.Q4_K_M": lambda: deepseek2("deepseek2-lite.Q4_K_M", DEEPSEEK2_LITE),
    "mamba2-2.7b.Q8_0": lambda: mamba2("mamba2-2.7b.Q8_0", MAMBA2_27B),
    "granite4h-tiny.Q4_K_M": lambda: granite_hybrid(
        "granite4h-tiny.Q4_K_M", GRANITE_HYBRID, attention_at=(5, 15, 25, 35)
    ),
    "lfm2-1.2b.Q8_0": lambda: lfm2("lfm2-1.2b.Q8_0", LFM2_12B, attention_at=(2, 5, 8, 10, 12, 14)),
    "qwen3next-80b.Q4_K_M": lambda: qwen3_next("qwen3next-80b.Q4_K_M", QWEN3_NEXT),
    "gptoss-20b.MXFP4": lambda: gpt_oss("gptoss-20b.MXFP4", GPT_OSS_20B),
    "bge-large.F16": lambda: bert("bge-large.F16", BGE_LARGE),
}
