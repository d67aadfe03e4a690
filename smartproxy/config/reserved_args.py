"""Which llama-server options and variables a configuration may not set by hand, and why.

The launcher decides these; a second value on the same command line would silently win over the
placement the memory was reserved for. Names from `llama-server --help` of b10434; of newer builds
-ncffn and --log-jsonl (the long form of -ncffn is taken by analogy).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    "the proxy reads what it says": "--metrics --slots --no-slots",
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
            return "wants text without NUL characters"
        flag = _spelled_out(arg)
        if flag in _INSTEAD:
            return f"{arg} can't stand here: {_INSTEAD[flag]}"
        if flag.startswith("--") and flag.endswith("-default") and flag != "--spec-default":
            return f"{arg} can't stand here: it names a model to download; use the key path"
    return None


def env_problem(env: Mapping[str, str]) -> str | None:
    """Return why these variables can't be set for a server, or None. Pure; names no value."""
    for name, value in env.items():
        if not name.isidentifier() or not name.isascii():
            return f"{name!r} can't name an environment variable"
        if "\0" in value:
            return f"{name}: wants text without NUL characters"
        if name in _RESERVED_VARIABLES or name.startswith("LLAMA_ARG_"):
            return f"{name} can't be set here: {_PROXY}; use this model's keys and args"
    return None


def _spelled_out(arg: str) -> str:
    """Return the option as llama-server's parser reads it: it takes `_` for `-` in long ones."""
    flag = arg.split("=", 1)[0].strip()
    return flag.replace("_", "-") if flag.startswith("--") else flag
