"""What config.json may say: every key once, with its default, its bounds and one sentence.

Plain models, no file and no environment (that is load.py). docs/configuration.md, the JSON
Schema and the texts of configuration errors are all held to what stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from smartproxy.config.server_args import args_problem, env_problem
from smartproxy.config.values import (
    ApiKey,
    CacheBits,
    CacheType,
    ContextSize,
    FilePath,
    GpuLayers,
    GpuName,
    ModelName,
    Parallel,
    Port,
    Repo,
    Seconds,
    SecondsOrZero,
    Text,
)
from smartproxy.planner.types import Strategy


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ServerPool(_Section):
    """How many models are loaded at once, and where their servers listen."""

    size: int = Field(4, ge=1, le=1024)
    """How many models may be loaded at the same time."""
    port_start: Port = 8080
    """First of the `size` loopback ports that the servers listen on."""

    @model_validator(mode="after")
    def _ports_exist(self) -> Self:
        if self.port_start + self.size - 1 > 65_535:
            raise ValueError(
                f"port_start {self.port_start} + size {self.size} goes past port 65535"
            )
        return self


class ModelSettings(_Section):
    """One model; what is left out follows the key of the same name at the top."""

    path: FilePath | None = None
    """GGUF file; of a model in several files, any of them."""
    repo: Repo | None = None
    """Where the model comes from, as user/name; also makes user/name:VARIANT a name of it."""
    variant: Text | None = None
    """Which of the repo's files: its quantization, or a file name; without it Q4_K_M."""
    aliases: tuple[ModelName, ...] = ()
    """Other names that requests may use for it."""
    max_gpus: int | None = Field(None, ge=1)
    """At most so many GPUs; without it all."""
    gpus: tuple[GpuName, ...] | None = Field(None, min_length=1)
    """Only these GPUs, by number or uuid."""
    strategy: Strategy | None = None
    """As gpu_allocation_strategy, for this model."""
    ctx_size: ContextSize | None = None
    """Tokens of its server, all slots together; "auto" is as many as fit."""
    parallel: Parallel | None = None
    """Slots: requests it works on at the same time."""
    kv_unified: bool = True
    """All slots share the whole context; false gives each its fixed part."""
    gpu_layers: GpuLayers | None = None
    """Layers on the GPUs; -1 is all, 0 none."""
    cache_type_bits: CacheBits | None = None
    """Bits of a KV cache entry: 16 is f16, 8 is q8_0, 4 is q4_0."""
    cache_type_k: CacheType | None = None
    """Type of the cached keys; wins over cache_type_bits."""
    cache_type_v: CacheType | None = None
    """Type of the cached values; wins over cache_type_bits."""
    mmproj: FilePath | None = None
    """Projector file, for models that see or hear."""
    draft_model: FilePath | None = None
    """Smaller GGUF file for speculative decoding."""
    args: tuple[str, ...] = ()
    """More llama-server arguments, passed as they stand."""
    env: dict[str, str] = Field({}, repr=False)
    """Environment variables of its server."""
    ttl: SecondsOrZero | None = None
    """Unload after so many seconds without a request; 0 is never."""
    pinned: bool = False
    """Never unload it to make room, nor for ttl."""
    preload: bool = False
    """Load it at start."""
    estimated_vram: float | None = Field(None, gt=0, le=2**20)
    """What it needs in GB (2^30 bytes), instead of our own estimate."""
    cpu: bool = False
    """Keep it off the GPUs."""
    embeddings: bool = False
    """It is an embedding model."""
    partial_offload: bool | None = None
    """As partial_offload at the top, for this model."""
    cpu_fallback: bool | None = None
    """As cpu_fallback at the top, for this model."""
    load_timeout: Seconds | None = None
    """As load_timeout at the top, for this model."""

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
        if self.cpu and (self.gpus is not None or self.max_gpus is not None):
            raise ValueError("cpu is true: gpus and max_gpus must not be set")
        return self


class Settings(_Section):
    """The whole configuration, checked; every path in it is absolute."""

    backend: Literal["llama.cpp"] = "llama.cpp"
    """What runs the models."""
    host: Text = "127.0.0.1"
    """Address that the proxy listens on, or `unix:/path` for an nginx in front; --host wins."""
    port: Port = 8000
    """Port that the proxy listens on; --port wins."""
    models: dict[ModelName, ModelSettings] = {}
    """The models, by id."""
    models_dir: FilePath | None = None
    """Folder; every .gguf file under it is a model without being listed."""
    default_model: Text | None = None
    """Model of requests that name none."""
    server_pool: ServerPool = ServerPool()
    """The pool of servers: its size and its ports."""
    ctx_size: ContextSize = 8192
    """Tokens of a server, all slots together, at most the model's own; "auto" is what fits."""
    parallel: Parallel = 4
    """Slots of a server, sharing one KV cache."""
    gpu_layers: GpuLayers = -1
    """Layers on the GPUs; -1 is all, 0 none."""
    cache_type_bits: CacheBits = 16
    """Bits of a KV cache entry: 16 is f16, 8 is q8_0, 4 is q4_0."""
    cache_type_k: CacheType | None = None
    """Type of the cached keys; wins over cache_type_bits."""
    cache_type_v: CacheType | None = None
    """Type of the cached values; wins over cache_type_bits."""
    enable_gpu_monitoring: bool = True
    """Look for GPUs; false runs everything on the CPU."""
    gpu_poll_interval: float = Field(2, ge=0.1, le=3600)
    """Seconds between two looks at the GPUs."""
    gpu_allocation_strategy: Strategy = Strategy.SINGLE_GPU_PREFERRED
    """One GPU where it fits, the one with most room; packed: the tightest; distribute: over all."""
    gpu_util_threshold: float = Field(50, ge=0, le=100)
    """A GPU busier than so many percent is taken last."""
    gpu_mem_threshold: float = Field(0.5, ge=0, le=1)
    """A GPU fuller than this share of its memory is split over last."""
    gpu_headroom_mb: int = Field(256, ge=0, le=2**20)
    """MB (2^20 bytes) left free on every GPU."""
    cpu_fallback: bool = False
    """Run a model that does not fit the GPUs there are on the CPU."""
    partial_offload: bool = False
    """Keep some layers of a model that does not fit the GPUs there are in main memory."""
    min_residency: SecondsOrZero = 5
    """Seconds that a model is safe from eviction once it is loaded."""
    ttl: SecondsOrZero | None = None
    """Unload a model after so many seconds without a request; 0 is never."""
    queue_timeout: Seconds = 300
    """Seconds that a request waits for room."""
    max_queue: int = Field(256, ge=1, le=1_000_000)
    """Requests that may wait for loads at the same time."""
    load_stall_timeout: Seconds = 120
    """Seconds without progress after which a load has failed."""
    load_timeout: Seconds = 1800
    """Seconds after which a load has failed in any case."""
    request_timeout: Seconds = 600
    """Seconds that a server may be silent before a request to it fails."""
    sse_wait_comment_after: SecondsOrZero = 5
    """Seconds after which a streaming client that waits for a load gets signs of life."""
    max_body_mb: int = Field(64, ge=1, le=65_536)
    """Largest request body in MB (2^20 bytes)."""
    api_keys: tuple[ApiKey, ...] = Field((), repr=False)
    """Keys of clients; without any, no key is asked for."""
    admin_keys: tuple[ApiKey, ...] = Field((), repr=False)
    """Keys for /api/; without any, it is open to whoever may use the models."""
    llama_server: FilePath | None = None
    """The llama-server binary; without it the one on PATH, then that of the installed package."""
    state_dir: FilePath = Path("state")
    """Folder of the state file and the servers' logs; --state-dir wins."""

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

    def longest_wait_s(self, model_id: str) -> float:
        """Return how long a request may wait for a model: for room, then for its load."""
        model = self.models.get(model_id)
        own_s = model.load_timeout if model else None
        return self.queue_timeout + (self.load_timeout if own_s is None else own_s)

    def port_problem(self, port: int) -> str | None:
        """Return why the proxy can't listen on a port beside the servers; None: it can."""
        first, size = self.server_pool.port_start, self.server_pool.size
        if not first <= port < first + size:
            return None
        return (
            f"{port} is one of the servers' ports {first}-{first + size - 1} (server_pool):"
            " choose another"
        )
