"""llama-server options in a model's `args` and `env`: refused, understood or passed on. Pure.

Refused: what the proxy decides itself. A second value on the same command line would silently win
over the placement that the memory was reserved for. Understood: what changes memory. The launcher
then states each such setting once; one that no rule follows is named and makes the estimate
deliberately high. The rest does not touch memory, or touches only the host's caches, and is passed
on as it stands. Names from `llama-server --help` of b10068 and b10434; of newer builds -ncffn and
--log-jsonl (the long form of -ncffn is taken by analogy).
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
        flag = spelled_out(word)
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


def spelled_out(word: str) -> str:
    """Return an option as llama-server's parser reads it: it takes `_` for `-` in long ones."""
    flag = word.split("=", 1)[0].strip()
    return flag.replace("_", "-") if flag.startswith("--") else flag


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


_PROXY = "the proxy decides it"


#: what to write instead -> every spelling of the option
_RESERVED: Mapping[str, str] = {
    "use the key path (or repo)": (
        "-m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file "
        "--models-dir --models-preset --models-max --models-autoload --no-models-autoload"
    ),
    "use the key mmproj": "-mm --mmproj -mmu --mmproj-url --mmproj-auto",
    "use the key draft_model": (
        "-md --model-draft --spec-draft-model -hfd -hfrd --hf-repo-draft --spec-draft-hf"
    ),
    "use the key ctx_size": "-c --ctx-size -fitc --fit-ctx",
    "use the key parallel": "-np --parallel",
    "use the key kv_unified": "-kvu --kv-unified -no-kvu --no-kv-unified",
    "use the key cache_type_k": "-ctk --cache-type-k",
    "use the key cache_type_v": "-ctv --cache-type-v",
    "use the key gpu_layers": (
        "-ngl --gpu-layers --n-gpu-layers -ngld --gpu-layers-draft --n-gpu-layers-draft "
        "--spec-draft-ngl"
    ),
    "use the key gpus": "-dev --device -mg --main-gpu -devd --device-draft --spec-draft-device",
    "use the keys strategy and max_gpus": "-sm --split-mode -ts --tensor-split",
    "use the key gpu_headroom_mb": "-fit --fit -fitt --fit-target",
    "use the key partial_offload": "-cmoe --cpu-moe -ncmoe --n-cpu-moe -ncffn --n-cpu-ffn",
    "use the key aliases": "-a --alias",
    "use the key embeddings": "--embedding --embeddings",
    "use the key ttl": "--sleep-idle-seconds",
    "use the key request_timeout": "-to --timeout",
    "use the keys host and port for the proxy; its servers listen on loopback": (
        "--host --port --reuse-port --api-prefix"
    ),
    "use the key api_keys for the proxy; its servers have keys of their own": (
        "--api-key --api-key-file --ssl-key-file --ssl-cert-file"
    ),
    "the proxy keeps the server's log and reads it": "--log-disable --log-file --log-jsonl",
    "the proxy reads what it shows": "--metrics --slots --no-slots",
    "it makes llama-server print and exit": (
        "-h --help --usage --version -cl --cache-list --completion-bash --list-devices"
    ),
}


_INSTEAD = {flag: instead for instead, flags in _RESERVED.items() for flag in flags.split()}


_RESERVED_VARIABLES = frozenset(
    {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LLAMA_API_KEY", "LLAMA_SERVER_ROUTER_PORT"}
)


def args_problem(args: Iterable[str]) -> str | None:
    """Return why these extra arguments can't be passed on, or None. Pure."""
    for arg in args:
        if "\0" in arg:
            return "must be text without NUL characters"
        flag = spelled_out(arg)
        if flag in _INSTEAD:
            return f"{arg} is not allowed here: {_INSTEAD[flag]}"
        if flag.startswith("--") and flag.endswith("-default") and flag != "--spec-default":
            return f"{arg} is not allowed here: it names a model to download; use the key path"
    return None


def env_problem(env: Mapping[str, str]) -> str | None:
    """Return why these variables can't be set for a server, or None. Pure; names no value."""
    for name, value in env.items():
        if not name.isidentifier() or not name.isascii():
            return f"{name!r} is not a name of an environment variable"
        if "\0" in value:
            return f"{name}: must be text without NUL characters"
        if name in _RESERVED_VARIABLES or name.startswith("LLAMA_ARG_"):
            return f"{name} is not allowed here: {_PROXY}; use this model's keys and args"
    return None
