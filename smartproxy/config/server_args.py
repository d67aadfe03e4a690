"""What a model's extra `args` mean for its memory. Pure: words in, settings out.

Those that the estimate can follow are taken out of the list, so that the launcher states each
setting once; those that it can't follow are named, and make the estimate deliberately high. The
rest does not touch memory, or touches only the host's caches, and is passed on as it stands.
Names from `llama-server --help` of b10068 and b10434. What a configuration may not say at all
(context, slots, layers, devices) is refused earlier, in smartproxy/config/reserved_args.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from smartproxy.memory.kv_cache import CACHE_TYPES
from smartproxy.memory.types import FlashAttention

#: drafted tokens per step: the most that any build drafts by default (older ones 16, b10068 3)
DEFAULT_DRAFT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraArgs:
    """None = not said; what stands here is not in `rest`, unless the field says so."""

    batch: int | None = None
    ubatch: int | None = None
    flash_attn: FlashAttention | None = None
    swa_full: bool = False
    kv_offload: bool = True
    cache_type_k_draft: str | None = None
    cache_type_v_draft: str | None = None
    projector: bool = True
    projector_offload: bool = True
    #: stays in `rest`: it ranks, so every token of a batch has an output
    ranks: bool = False
    #: stay in `rest`: files of adapters that are loaded beside the weights
    adapters: tuple[str, ...] = ()
    #: stays in `rest`: tokens drafted per step
    draft_tokens: int = DEFAULT_DRAFT_TOKENS
    #: stays in `rest`: a kind of speculative decoding was chosen
    chooses_speculation: bool = False
    #: stay in `rest`: they move memory in ways that no rule follows
    unmodelled: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()


def _each(spellings: str, meaning: str) -> dict[str, str]:
    return dict.fromkeys(spellings.split(), meaning)


_SWITCHES: Mapping[str, tuple[str, bool]] = {
    "--swa-full": ("swa_full", True),
    **dict.fromkeys(("-nkvo", "--no-kv-offload"), ("kv_offload", False)),
    **dict.fromkeys(("-kvo", "--kv-offload"), ("kv_offload", True)),
    **dict.fromkeys(("--no-mmproj", "--no-mmproj-auto"), ("projector", False)),
    "--no-mmproj-offload": ("projector_offload", False),
    "--mmproj-offload": ("projector_offload", True),
}
_NUMBERS = {
    **_each("-b --batch-size", "batch"),
    **_each("-ub --ubatch-size", "ubatch"),
}
_CACHE_TYPES = {
    **_each("-ctkd --cache-type-k-draft --spec-draft-type-k", "cache_type_k_draft"),
    **_each("-ctvd --cache-type-v-draft --spec-draft-type-v", "cache_type_v_draft"),
}
_FLASH = frozenset({"-fa", "--flash-attn"})
_FLASH_VALUES = {
    **dict.fromkeys(("on", "enabled", "true", "1"), FlashAttention.ON),
    **dict.fromkeys(("off", "disabled", "false", "0"), FlashAttention.OFF),
    **dict.fromkeys(("auto", "-1"), FlashAttention.AUTO),
}
_RANKS = frozenset({"--rerank", "--reranking"})
_ADAPTERS = frozenset({"--lora", "--lora-scaled", "--control-vector"})
_DRAFT_TOKENS = frozenset({"--spec-draft-n-max", "--draft", "--draft-n", "--draft-max"})
#: kinds of speculative decoding that load nothing
_LIGHT_SPECULATION = ("none", "draft-simple", "ngram-")
_UNMODELLED = frozenset(
    {
        *("-ot", "--override-tensor", "--rpc", "--override-kv", "--no-host", "--spec-default"),
        *("-otd", "--override-tensor-draft", "--spec-draft-override-tensor"),
        *("-cmoed", "--cpu-moe-draft", "--spec-draft-cpu-moe"),
        *("-ncmoed", "--n-cpu-moe-draft", "--spec-draft-n-cpu-moe", "--spec-draft-ncmoe"),
        *("-mv", "--model-vocoder", "-hfv", "-hfrv", "--hf-repo-v"),
    }
)


def read_args(args: Iterable[str]) -> ExtraArgs:
    """Return what the arguments say; of a setting said twice the last one counts.

    A value that llama-server will refuse is left in `rest`, for it to say so.
    """
    words, read, rest = list(args), ExtraArgs(), []
    while words:
        word = words.pop(0)
        flag = _spelled_out(word)
        value = words[0] if words else ""
        consumed = _consumed(flag, value)
        if consumed is None:
            rest.append(word)
            read = _noticed(read, flag, value)
            continue
        changes, takes_value = consumed
        read = replace(read, **changes)
        del words[: int(takes_value)]
    return replace(read, rest=tuple(rest))


def _spelled_out(word: str) -> str:
    """Return an option as llama-server's parser reads it: it takes `_` for `-` in long ones."""
    return word.replace("_", "-") if word.startswith("--") else word


def _consumed(flag: str, value: str) -> tuple[dict[str, Any], bool] | None:
    """Return what to change and whether the value was used; None = it stays in the list."""
    if flag in _SWITCHES:
        name, on = _SWITCHES[flag]
        return {name: on}, False
    if flag in _NUMBERS and value.isdecimal() and int(value) > 0:
        return {_NUMBERS[flag]: int(value)}, True
    if flag in _CACHE_TYPES and value in CACHE_TYPES:
        return {_CACHE_TYPES[flag]: value}, True
    if flag in _FLASH and value in _FLASH_VALUES:
        return {"flash_attn": _FLASH_VALUES[value]}, True
    return None


def _noticed(read: ExtraArgs, flag: str, value: str) -> ExtraArgs:
    """Return the settings with what an argument that stays in the list means for them."""
    if flag in _RANKS:
        return replace(read, ranks=True)
    if flag in _ADAPTERS and value:
        files = value.split(",")
        if flag == "--lora-scaled":  # FILE:SCALE
            files = [name.rpartition(":")[0] or name for name in files]
        return replace(read, adapters=(*read.adapters, *files))
    if flag in _DRAFT_TOKENS and value.isdecimal():
        return replace(read, draft_tokens=int(value))
    if flag == "--spec-type":
        light = all(kind.startswith(_LIGHT_SPECULATION) for kind in value.split(","))
        heavy = () if light else (f"{flag} {value}",)
        return replace(read, chooses_speculation=True, unmodelled=read.unmodelled + heavy)
    if flag in _UNMODELLED:
        return replace(read, unmodelled=(*read.unmodelled, flag))
    return read
