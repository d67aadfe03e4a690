"""What llama.cpp knows of an architecture that the header does not say. Pure tables.

Source: llama.cpp b11434, src/llama-arch.cpp (names, recurrent, hybrid), src/llama-model.cpp
(create_memory), src/models/*.cpp (load_arch_hparams). Check when the build moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Sliding(NamedTuple):
    """Default layout of sliding-window layers."""

    #: one layer in so many attends to everything; 0 = only the header's array says which
    period: int
    #: the full layer is the first of each period, not the last
    dense_first: bool = False
    #: tokens, where the header may leave it out; 0 = then there is no window
    default_window: int = 0


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SLIDING: Mapping[str, Sliding] = {
    "afmoe": Sliding(4),
    "cohere2": Sliding(4),
    "cohere2moe": Sliding(4, dense_first=True),
    "exaone-moe": Sliding(4, default_window=128),
    "exaone4": Sliding(4, default_window=4096),
    "gemma2": Sliding(2, default_window=4096),
    "gemma3": Sliding(6),
    "gemma3n": Sliding(5),
    "gemma4": Sliding(0),
    "gemma4-assistant": Sliding(0),
    "gpt-oss": Sliding(2),
    "granite_swa": Sliding(0),
    "laguna": Sliding(4, dense_first=True),
    "llama4": Sliding(4, default_window=8192),
    "maple": Sliding(0),
    "mellum": Sliding(4),
    "mimo2": Sliding(0),
    "muse-glimmer": Sliding(4),
    "olmo2": Sliding(4),
    "plamo3": Sliding(8),
    "smallthinker": Sliding(4, dense_first=True, default_window=4096),
    "spark2_5": Sliding(0),
    "step35": Sliding(0),
}

#: encode only: no KV cache, and no output layer
ENCODERS = _words(
    """
    bert eurobert jina-bert-v2 jina-bert-v3 modern-bert neo-bert nomic-bert nomic-bert-moe
    t5encoder
    """
)
#: no KV cache, but an output layer
UNCACHED = ENCODERS | frozenset(["dream", "gemma-embedding", "llada", "llada-moe", "rnd1"])

#: every layer carries a state, none attends
RECURRENT = frozenset(["arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"])
#: the layers without KV heads carry a state
HYBRID = _words(
    """
    bailingmoe3 granitehybrid jamba kimi-linear lfm2 lfm2moe minimax-01 nemotron_h
    nemotron_h_moe plamo2
    """
)
#: every so-manieth layer attends (full_attention_interval), the others carry a state
INTERVAL = frozenset(["qwen35", "qwen35moe", "qwen3next"])
#: each layer does both
BOTH = frozenset(["falcon-h1"])

#: full attention in every layer, or what the header itself says
PLAIN = _words(
    """
    apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chameleon chatglm
    codeshell cogvlm command-r dbrx deci deepseek deepseek2 deepseek2-ocr dots1 ernie4_5
    ernie4_5-moe exaone falcon gemma glm4 glm4moe gpt2 gptj gptneox granite granitemoe grok
    grovemoe hunyuan-dense hunyuan-moe hunyuan_vl internlm2 jais jais2 llama llama-embed
    maincoder minicpm minimax-m2 mistral3 mistral4 mpt nanbeige nemotron olmo olmoe openelm
    orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plm qwen qwen2 qwen2moe qwen2vl
    qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm starcoder starcoder2
    xverse
    """
)

KNOWN = PLAIN | SLIDING.keys() | UNCACHED | RECURRENT | HYBRID | INTERVAL | BOTH

#: loaded from the row-lookup side of the model: they stay on the host whatever is offloaded
INPUT_TENSORS = _words(
    """
    token_embd.weight position_embd.weight token_types.weight per_layer_token_embd.weight
    token_embd_norm.weight token_embd_norm.bias
    """
)


def is_input_tensor(architecture: str, name: str) -> bool:
    """Tell whether a tensor belongs to the input layer (llama-arch.cpp, LLM_TENSOR_INFOS).

    lfm2 keeps its output norm under the embedding norm's name.
    """
    if architecture.startswith("lfm2") and name.startswith("token_embd_norm"):
        return False
    return name in INPUT_TENSORS


def sliding_layers(layers: int, sliding: Sliding, period: int) -> tuple[bool, ...]:
    """Return which layers slide (llama-hparams.cpp, set_swa_pattern); `period` 0 = none."""
    if period == 0:
        return (False,) * layers
    if sliding.dense_first:
        return tuple(layer % period != 0 for layer in range(layers))
    return tuple(layer % period < period - 1 for layer in range(layers))
