"""What config.json may say: every key once, with its default, its bounds and one sentence.

Plain models, no file and no environment (that is load.py). README.md and docs/configuration.md
repeat each sentence, and tests hold them to it. The JSON Schema and the texts of configuration
errors are made from what stands here.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from smartproxy.config.keys import KeySettings, keys_problem
from smartproxy.config.known_holes import dangerous_args
from smartproxy.config.server_args import args_problem, env_problem
from smartproxy.config.values import (
    CacheBits,
    CacheType,
    ContextSize,
    FilePath,
    GpuLayers,
    GpuName,
    HostName,
    ModelName,
    Origin,
    Parallel,
    Port,
    Repo,
    Seconds,
    SecondsOrZero,
    Text,
    only_this_machine,
)
from smartproxy.planner.types import Strategy


def _unwrap(schema: dict[str, Any]) -> None:
    """Put each key's description on one line: editors show it as it stands in the schema."""
    for key in schema.get("properties", {}).values():
        if "description" in key:
            key["description"] = " ".join(key["description"].split())


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_unwrap,
    )


#: ports that servers may have beside one each, for those that other programs took
SPARE_PORTS = 16


class ServerPool(_Section):
    """How many models are loaded at once, and where their servers listen."""

    size: int = Field(4, ge=1, le=1024)
    """How many models may be loaded at the same time."""
    port_start: Port = 8080
    """First of the servers' loopback ports: `size` and 16 more, for some may be taken."""

    @property
    def ports(self) -> range:
        """All ports that servers may have: they never listen on another."""
        return range(self.port_start, self.port_start + self.size + SPARE_PORTS)

    @model_validator(mode="after")
    def _ports_exist(self) -> Self:
        if self.ports[-1] > 65_535:
            raise ValueError(
                f"ports {span(self.ports)} (size {self.size} and {SPARE_PORTS} more) go past port"
                " 65535"
            )
        return self


def span(ports: range) -> str:
    """Return a range of ports as users read it: first and last."""
    return f"{ports[0]}-{ports[-1]}"


class ModelSettings(_Section):
    """One model; what is left out follows the key of the same name at the top."""

    path: FilePath | None = None
    """GGUF file. Of a model in several files (`-00001-of-00003.gguf`), any of them."""
    repo: Repo | None = None
    """Where the model comes from, as `user/name`. Nothing is downloaded yet: without `path`, the
    file must be in `models_dir/user/name/`. `user/name:VARIANT` becomes a name of the model."""
    variant: Text | None = None
    """Which file of the repo: its quantization (upper or lower case), or a file name. Without it:
    `Q4_K_M`, and `user/name` alone names the model too."""
    aliases: tuple[ModelName, ...] = ()
    """Other names for it in requests. A name must not stand for two models."""
    max_gpus: int | None = Field(None, ge=1)
    """The most GPUs that it may use. Without it: all."""
    gpus: tuple[GpuName, ...] | None = Field(None, min_length=1)
    """The GPUs that it may use, by number or uuid (`[0, "GPU-8f2a..."]`)."""
    strategy: Strategy | None = None
    """As `gpu_allocation_strategy`, for this model."""
    ctx_size: ContextSize | None = None
    """Context size of its server in tokens, for all slots together. `"auto"` is the largest that
    fits."""
    parallel: Parallel | None = None
    """Slots: how many requests it works on at the same time."""
    kv_unified: bool = True
    """All slots share the whole context. With `false`, each slot has a fixed part of it."""
    gpu_layers: GpuLayers | None = None
    """Number of layers on the GPUs. -1 is all, 0 is none."""
    cache_type_bits: CacheBits | None = None
    """Bits of a KV cache entry. Overrides the general `cache_type_k` and `cache_type_v`."""
    cache_type_k: CacheType | None = None
    """Type of the cached keys. Overrides `cache_type_bits`."""
    cache_type_v: CacheType | None = None
    """Type of the cached values. Overrides `cache_type_bits`."""
    mmproj: FilePath | None = None
    """Projector file, for a model that reads images or sound."""
    draft_model: FilePath | None = None
    """Smaller GGUF file, for speculative decoding."""
    args: tuple[str, ...] = ()
    """More arguments for llama-server (`["--no-mmap", "-t", "8"]`). An argument that the proxy
    decides is refused; the message names the key to use. Arguments that change memory (`-b`,
    `-ub`, `-fa`, `--swa-full`, `-nkvo`, ...) are part of the estimate (docs/memory.md)."""
    allow_dangerous_args: bool = False
    """Allow `args` that open its server to every client: `--tools`, `--agent`, `--ui-mcp-proxy`,
    `--mcp-servers-config`, `--media-path`, `--path`, `--slot-save-path`, `--rpc`,
    `--log-prompts-dir`, `--props` (docs/security.md)."""
    env: dict[str, str] = Field({}, repr=False)
    """Environment variables of its server. `LLAMA_ARG_*` and variables that choose GPUs are
    refused."""
    ttl: SecondsOrZero | None = None
    """It is unloaded after this many seconds without a request. 0 is never."""
    pinned: bool = False
    """It is never unloaded to make room, nor because of `ttl`."""
    preload: bool = False
    """Load it at start."""
    estimated_vram: float | None = Field(None, gt=0, le=2**20)
    """What it needs in GB (2^30 bytes), in place of the estimate: the whole model on one GPU,
    without the overhead of the backend. Measurements raise it, and never lower it."""
    cpu: bool = False
    """Keep it off the GPUs. `gpus` and `max_gpus` must not be set then."""
    embeddings: bool = False
    """It is an embedding model."""
    partial_offload: bool | None = None
    """Keep some of its layers in main memory if it does not fit on the GPUs."""
    cpu_fallback: bool | None = None
    """Run it on the CPU if it does not fit on the GPUs."""
    load_timeout: Seconds | None = None
    """A load of it that takes more seconds than this has failed."""

    @field_validator("args")
    @classmethod
    def _args_are_free(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        if problem := args_problem(args):
            raise ValueError(problem)
        return args

    @field_validator("env")
    @classmethod
    def _env_is_free(cls, env: dict[str, str]) -> dict[str, str]:
        if problem := env_problem(env):
            raise ValueError(problem)
        return env

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.path is None and self.repo is None:
            raise ValueError("must have a path (a GGUF file) or a repo")
        if self.variant is not None and self.repo is None:
            raise ValueError("variant says which file of a repo: repo must be set too")
        opened = dangerous_args(self.args)
        if opened and not self.allow_dangerous_args:
            raise ValueError(f'{opened[0]}; set "allow_dangerous_args": true if you want that')
        if self.cpu and (self.gpus is not None or self.max_gpus is not None):
            raise ValueError("cpu is true: gpus and max_gpus must not be set")
        return self


class Settings(_Section):
    """The whole configuration, checked; every path in it is absolute."""

    backend: Literal["llama.cpp"] = "llama.cpp"
    """The program that runs the models. There is no other yet."""
    host: Text = "127.0.0.1"
    """Address that the proxy listens on, or `unix:/path` behind nginx. `--host` overrides it."""
    port: Port = 8000
    """Port that the proxy listens on. It must not be a port of `server_pool`. `--port` overrides
    it."""
    models: dict[ModelName, ModelSettings] = {}
    """The models, by id."""
    models_dir: FilePath | None = None
    """Folder of models. Every `.gguf` file below it is a model, even if `models` lacks it."""
    default_model: Text | None = None
    """Id or alias of the model for requests that name none. Without it, such a request is answered
    with 400."""
    server_pool: ServerPool = ServerPool()
    """The pool of servers: its size, and its ports (8080-8099: size and 16 more)."""
    ctx_size: ContextSize = 8192
    """Context size of a server in tokens, for all its slots together. It is at most the model's
    own. `"auto"` is the largest that fits."""
    parallel: Parallel = 4
    """Slots of a server: how many requests a model works on at the same time. They share one KV
    cache."""
    gpu_layers: GpuLayers = -1
    """Number of layers on the GPUs. -1 is all, 0 is none."""
    cache_type_bits: CacheBits = 16
    """Bits of a KV cache entry: 16 is `f16`, 8 is `q8_0`, 4 is `q4_0`."""
    cache_type_k: CacheType | None = None
    """Type of the cached keys (`f32` `f16` `bf16` `q8_0` `q5_1` `q5_0` `q4_1` `q4_0` `iq4_nl`).
    Overrides `cache_type_bits`."""
    cache_type_v: CacheType | None = None
    """Type of the cached values. Overrides `cache_type_bits`."""
    enable_gpu_monitoring: bool = True
    """Look for GPUs. With `false`, everything runs on the CPU."""
    gpu_poll_interval: float = Field(2, ge=0.1, le=3600)
    """Seconds between two looks at the GPUs."""
    gpu_allocation_strategy: Strategy = Strategy.SINGLE_GPU_PREFERRED
    """`"single-gpu-preferred"`: one GPU where the model fits, the one with the most free memory.
    `"packed"`: one GPU where it fits, the one with the least free memory. `"distribute"`: all GPUs
    that it may use."""
    gpu_util_threshold: float = Field(50, ge=0, le=100)
    """A GPU whose utilization is above this many percent is the last choice."""
    gpu_mem_threshold: float = Field(0.5, ge=0, le=1)
    """A GPU that uses more than this share of its memory is the last choice for a split."""
    gpu_headroom_mb: int = Field(256, ge=0, le=2**20)
    """MB (2^20 bytes) that stay free on every GPU."""
    cpu_fallback: bool = False
    """Run a model on the CPU if it does not fit on the GPUs. Without a GPU, the CPU is always
    used."""
    partial_offload: bool = False
    """Keep some layers of a model in main memory if it does not fit on the GPUs."""
    min_residency: SecondsOrZero = 5
    """After its load, a model is not evicted for this many seconds."""
    ttl: SecondsOrZero | None = None
    """A model is unloaded after this many seconds without a request. 0, or no value, is never."""
    queue_timeout: Seconds = 300
    """Seconds that a request waits for room. Then it is answered with 503."""
    max_queue: int = Field(256, ge=1, le=1_000_000)
    """How many requests may wait for loads at the same time. One more is answered with 429."""
    load_stall_timeout: Seconds = 120
    """A load without progress for this many seconds has failed."""
    load_timeout: Seconds = 1800
    """A load that takes more seconds than this has failed, also if it makes progress."""
    request_timeout: Seconds = 600
    """Seconds that a server may be silent. Then a request to it is answered with 504."""
    manager_stall_timeout: Seconds = 60
    """If the manager makes no progress for this many seconds, `serve` replaces it. Loaded models
    go on answering."""
    sse_wait_comment_after: SecondsOrZero = 5
    """A streaming client that waits for a load longer than this many seconds gets SSE comments as
    signs of life."""
    max_body_mb: int = Field(64, ge=1, le=65_536)
    """Largest request body in MB (2^20 bytes). A larger one is answered with 413."""
    api_keys: tuple[KeySettings, ...] = Field((), repr=False)
    """Keys of clients (`Authorization: Bearer ...`), as text or with limits
    (`{"name", "key", "models", "max_in_flight"}`). Without them, no key is needed."""
    admin_keys: tuple[KeySettings, ...] = Field((), repr=False)
    """Keys for `/api/`. Without them, all who may use the models may use it."""
    open_to_network: bool = False
    """Listen on an address that others can reach also without `api_keys`: then everybody on the
    network may use, load and unload the models."""
    allowed_hosts: tuple[HostName, ...] = ()
    """Names that the proxy is called by (`"gpu.example"`, `"*.example"`). IP addresses, `localhost`
    and the machine's own name need not be listed. A request to any other name is answered with
    403."""
    allowed_origins: tuple[Origin, ...] = ()
    """Origins whose web pages may use the models (`"https://chat.example"`). Pages of this machine
    need not be listed. `"*"` is every page. `/api/` is never open to other origins."""
    llama_server: FilePath | None = None
    """The `llama-server` binary. Without it: the one on `PATH`, else the one of the installed
    package."""
    state_dir: FilePath = Path("state")
    """Folder of the state file and of the servers' logs. `--state-dir`, else
    `SMARTPROXY_STATE_DIR`, overrides it."""

    _config_path: Path = PrivateAttr(default=Path("config.json"))
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def config_path(self) -> Path:
        """The file these settings were read from, absolute."""
        return self._config_path

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line per older form found in the file, saying what to write instead."""
        return self._warnings

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        owner = {name: name for name in self.models}
        for model_id, model in self.models.items():
            for alias in model.aliases:
                if alias in owner:
                    raise ValueError(
                        f'models.{model_id}.aliases: "{alias}" already names "{owner[alias]}"'
                    )
                owner[alias] = model_id
        return self

    @model_validator(mode="after")
    def _ports_do_not_meet(self) -> Self:
        problem = self.port_problem(self.port)
        if problem:
            raise ValueError(f"port: {problem}")
        return self

    @model_validator(mode="after")
    def _keys_are_told_apart(self) -> Self:
        if problem := keys_problem((*self.api_keys, *self.admin_keys)):
            raise ValueError(f"api_keys, admin_keys: {problem}")
        return self

    @cached_property
    def named_keys(self) -> dict[str, KeySettings]:
        """The keys with a name by their text: a request's, once it is known to be one of ours."""
        keys = (*self.api_keys, *self.admin_keys)
        return {key.key: key for key in keys if key.name is not None}

    def dangers(self) -> tuple[str, ...]:
        """Return one line for each thing that the start must say: who may do more than expected."""
        opened = tuple(
            f"models.{model_id}.args: {danger}"
            for model_id, model in self.models.items()
            for danger in dangerous_args(model.args)
        )
        if self.api_keys and not self.admin_keys:
            return (
                *opened,
                "admin_keys: none, so that every key of api_keys may load and unload models and"
                " read logs under /api/",
            )
        return opened

    def longest_wait_s(self, model_id: str) -> float:
        """Return how long a request may wait for a model: for room, then for its load."""
        model = self.models.get(model_id)
        own_s = model.load_timeout if model else None
        return self.queue_timeout + (self.load_timeout if own_s is None else own_s)

    def host_problem(self, host: str) -> str | None:
        """Return why the proxy must not listen on an address; None: it may."""
        if self.api_keys or self.open_to_network or only_this_machine(host):
            return None
        return (
            f"{host} can be reached by others, and nobody needs a key: set api_keys, or write"
            ' "open_to_network": true if everybody on the network may use the models'
        )

    def port_problem(self, port: int) -> str | None:
        """Return why the proxy can't listen on a port beside the servers; None: it can."""
        ports = self.server_pool.ports
        if port not in ports:
            return None
        return f"{port} is one of the servers' ports {span(ports)} (server_pool): choose another"
