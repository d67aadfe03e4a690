"""Plain values that more than one part speaks in. No behaviour beyond sums; no I/O.

Bytes are integers, times are Unix seconds unless a name says monotonic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MIB = 1 << 20
GIB = 1 << 30


# --- servers ---------------------------------------------------------------------------------


class ServerState(StrEnum):
    STARTING = "starting"  # process spawned (or about to be), health not yet 200
    READY = "ready"  # health answered 200; takes leases
    DRAINING = "draining"  # takes no new leases, finishes those it has
    STOPPING = "stopping"  # TERM sent
    STOPPED = "stopped"
    FAILED = "failed"  # would not start, or died by itself


NEXT_STATES: Mapping[ServerState, frozenset[ServerState]] = {
    ServerState.STARTING: frozenset({ServerState.READY, ServerState.STOPPING, ServerState.FAILED}),
    ServerState.READY: frozenset({ServerState.DRAINING, ServerState.FAILED}),
    ServerState.DRAINING: frozenset({ServerState.READY, ServerState.STOPPING, ServerState.FAILED}),
    ServerState.STOPPING: frozenset({ServerState.STOPPED, ServerState.FAILED}),
    ServerState.STOPPED: frozenset(),
    ServerState.FAILED: frozenset(),
}

#: states in which a process may be alive and memory may be held
LIVE_STATES = frozenset(
    {ServerState.STARTING, ServerState.READY, ServerState.DRAINING, ServerState.STOPPING}
)


# --- GPUs ------------------------------------------------------------------------------------


class GpuState(StrEnum):
    AVAILABLE = "available"  # healthy, nothing of ours on it
    ASSIGNED = "assigned"  # healthy, at least one of our servers on it
    ERROR = "error"  # NVML can't read it, or it fell off the bus


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    pid: int
    #: None where the driver does not say (containers, WDDM)
    used_bytes: int | None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVML device at one instant."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    total_bytes: int
    free_bytes: int
    used_bytes: int
    #: 0-100
    utilization: float = 0.0
    temperature_c: float | None = None
    power_w: float | None = None
    #: "8.9"
    compute_capability: str | None = None
    #: a MIG slice is listed as a GPU of its own, with the uuid "MIG-…"
    mig: bool = False
    processes: tuple[GpuProcess, ...] = ()
    #: why it can't be read now; None = healthy. The other fields are then the last known.
    error: str | None = None
    #: in error for good until it comes back: what runs on it is lost, not merely out of sight
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSnapshot:
    """All GPUs at one instant, in NVML index order; empty on a machine without any."""

    gpus: tuple[Gpu, ...]
    observed_at: float
    #: why there are none (no driver, no library, switched off), or why the last known ones are all
    #: in error; None where NVML answers
    reason: str | None = None
    driver_version: str | None = None


# --- what a model needs ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is laid over devices: what the launcher passes and the estimate speaks of."""

    #: one share per device in device order; (1.0,) for one GPU, () for the CPU alone
    tensor_split: tuple[float, ...]
    #: layers on the devices, the output layer counted: 0 .. layer_count
    gpu_layers: int
    #: tokens of the server, all slots together
    context_size: int
    #: the first N layers' expert weights stay on the host
    cpu_moe_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBytes:
    """What one device (or the host) is asked for."""

    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    recurrent_bytes: int = 0
    compute_bytes: int = 0
    #: context of the backend, libraries, pools: per GPU, learned; not part of llama.cpp's buffers
    overhead_bytes: int = 0

    @property
    def buffers_bytes(self) -> int:
        """Without overhead: what llama.cpp's own buffer lines add up to."""
        return self.weights_bytes + self.kv_cache_bytes + self.recurrent_bytes + self.compute_bytes

    @property
    def total_bytes(self) -> int:
        return self.buffers_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted bytes of one model in one layout."""

    layout: Layout
    #: one entry per share of layout.tensor_split
    devices: tuple[DeviceBytes, ...]
    host: DeviceBytes
    #: False where the architecture is unknown and the numbers are deliberately high
    confident: bool = True

    @property
    def total_bytes(self) -> int:
        """Over all devices, overhead included; host not included."""
        return sum(device.total_bytes for device in self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpan:
    """A stretch of one of a model's files, in bytes."""

    #: index into ModelMetadata.files
    file: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """The tensors of one layer, in bytes as a CUDA device holds them (rows and tensors padded)."""

    weights_bytes: int = 0
    #: the part of weights_bytes that --n-cpu-moe keeps on the host
    expert_bytes: int = 0
    largest_bytes: int = 0
    gate_up_bytes: int = 0
    attention_bytes: int = 0
    #: where they lie in the files, experts apart: a host buffer that maps the file spans them
    spans: tuple[FileSpan, ...] = ()
    expert_spans: tuple[FileSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """What a GGUF header says of a model, as far as memory and the catalogue want to know."""

    architecture: str
    name: str | None
    #: paths, in the order of the parts
    files: tuple[str, ...]
    #: size on disk, all parts
    file_bytes: int
    #: number of weights
    parameters: int
    #: from the tensors' types, not from the file's name: "Q4_K_M", "Q8_0", "F16"
    quantization: str
    #: tokens; 0 where the header does not say
    trained_context: int
    vocabulary_size: int
    has_chat_template: bool
    #: not made for generating text: an encoder, or one with a pooling type
    is_embedding: bool
    #: why the estimate must be deliberately high; None = architecture and types are known
    unknown: str | None = None

    #: repeating layers, those for multi-token prediction included (the output layer is not)
    layer_count: int
    #: the last ones, which a server that does not draft with them neither loads nor caches
    prediction_layer_count: int = 0
    embedding_length: int
    #: per layer
    head_counts: tuple[int, ...]
    kv_head_counts: tuple[int, ...]
    #: elements per head of K and V in the cache, in full and in sliding layers
    key_length: int
    value_length: int
    sliding_key_length: int
    sliding_value_length: int
    #: width of the widest query projection
    query_length: int
    feed_forward_length: int = 0
    expert_count: int = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0
    #: some layers have a dense feed-forward besides or instead of experts
    has_dense_layers: bool = True
    #: K holds a latent from which V is made (multi-head latent attention): no V in the cache
    latent_attention: bool = False
    #: the query projection carries a gate of its own size (qwen3next)
    gated_query: bool = False
    has_kv_cache: bool = True
    #: tokens attended to in the layers marked; 0 = none
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...]
    recurrent_layers: tuple[bool, ...]
    #: layers that keep both a state and a KV cache (falcon-h1)
    recurrent_and_cached: bool = False
    #: no layer attends: a state-space or RWKV model
    recurrent_only: bool = False
    #: layers from this one on use the cache of earlier ones; None = each has its own
    shared_kv_from: int | None = None
    #: f32 elements per sequence and recurrent layer
    conv_state_elements: int = 0
    ssm_state_elements: int = 0
    ssm_inner_size: int = 0
    ssm_state_size: int = 0
    ssm_group_count: int = 0
    ssm_rank: int = 0

    #: one entry per repeating layer
    layers: tuple[LayerTensors, ...]
    #: the output layer, a tied embedding's second copy included
    output: LayerTensors
    #: embeddings: always on the host
    input_bytes: int
    input_spans: tuple[FileSpan, ...] = ()


class FlashAttention(StrEnum):
    ON = "on"
    OFF = "off"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateOptions:
    """What of a server's command line decides memory; the defaults are llama-server's own."""

    #: slots; None = its default, 4 slots that share one cache
    parallel: int | None = None
    #: one cache for all slots; None = only where `parallel` is left to the server
    kv_unified: bool | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    batch: int = 2048
    ubatch: int = 512
    flash_attn: FlashAttention = FlashAttention.AUTO
    swa_full: bool = False
    embeddings: bool = False
    kv_offload: bool = True
    #: beside the model's own: a projector's file and graph, on the first device or on the host
    projector_bytes: int = 0
    projector_compute_bytes: int = 0
    projector_offload: bool = True
    #: files of adapters (LoRA): how they divide over devices nobody says, so each is charged all
    adapter_bytes: int = 0
    #: tokens drafted per step: each slot then has so many outputs more
    draft_tokens: int = 0
    #: a draft model in the same layout
    draft: Estimate | None = None
    #: options given that no rule follows (--override-tensor): the estimate is deliberately high
    unmodelled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What placing must know of a model; `estimate` is pure and takes well under a millisecond."""

    #: layers that can be offloaded, the output layer counted
    layer_count: int
    #: the first layers up to the last one with expert weights, which could stay on the host; 0 for
    #: dense models
    moe_layer_count: int
    #: tokens; None = as many as fit, up to max_context_size
    context_size: int | None
    #: the model's own (trained) context
    max_context_size: int
    #: bytes per device in a layout, corrected by what was measured, without overhead per GPU
    estimate: Callable[[Layout], Estimate]


# --- placing ---------------------------------------------------------------------------------


class Strategy(StrEnum):
    SINGLE_GPU_PREFERRED = "single-gpu-preferred"
    DISTRIBUTE = "distribute"
    PACKED = "packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacePolicy:
    """What the configuration says about where one model may go."""

    strategy: Strategy = Strategy.SINGLE_GPU_PREFERRED
    #: None = all
    max_gpus: int | None = None
    #: uuids it may use; None = any
    allowed_uuids: frozenset[str] | None = None
    #: layers on the GPUs; None = all of them (0 = none)
    gpu_layers: int | None = None
    partial_offload: bool = False
    cpu_fallback: bool = False
    #: never on a GPU
    force_cpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingLoad:
    """A model that requests wait for (any number of requests, one load)."""

    model_id: str
    #: when the oldest waiting request asked
    asked_at: float
    #: when the oldest waiting request gives up
    expires_at: float
    requests: int
    need: Need
    policy: PlacePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What a server has of one GPU."""

    #: promised: the estimate, or max(measured, estimate) once measured, overhead included
    reserved_bytes: int
    #: what NVML shows for its pid now (0 where it shows nothing yet, or says nothing at all)
    visible_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A live server as the planner sees it."""

    server_id: int
    model_id: str
    state: ServerState
    #: by GPU uuid; empty on the CPU
    holds: Mapping[str, Hold]
    #: requests on it: leases, or its own count of busy slots, whichever is more
    busy: int
    pinned: bool
    created_at: float
    ready_at: float | None
    last_used_at: float
    #: start to ready
    load_s: float
    #: exponentially decaying counts of late use (half-life: evict.HALF_LIFE_S); they belong to the
    #: model and outlive its server, else a model that was swapped out comes back as a stranger
    recent_requests: float = 0.0
    recent_tokens: float = 0.0
    #: CPU server that is there only for want of a GPU
    on_cpu_for_want_of_gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    pool_size: int
    headroom_bytes: int
    gpu_util_threshold: float
    #: 0-1: share of a GPU's memory above which it does not count as free for splitting
    gpu_mem_threshold: float
    min_residency_s: float
    queue_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything `plan` may look at. The same snapshot always gives the same decision."""

    now: float
    #: None until the GPUs were looked at once: loads wait for it, they do not fall to the CPU
    gpus: tuple[Gpu, ...] | None
    #: live servers, and stopped ones whose memory NVML does not show as free yet (state stopping)
    servers: tuple[RunningServer, ...]
    #: oldest first
    loads: tuple[WaitingLoad, ...]
    settings: PlanSettings
    #: learned bytes per GPU uuid that a server takes beside its buffers; an absent GPU gets
    #: place.default_overhead_bytes(gpu)
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    uuid: str
    index: int
    #: estimate with overhead: what gets reserved
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a model goes and how: what the launcher carries out. No GPUs = the CPU."""

    gpus: tuple[GpuShare, ...]
    layout: Layout
    estimate: Estimate
    #: in words and numbers
    reason: str
    on_cpu_for_want_of_gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    model_id: str
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """Drain this server, then stop it."""

    server_id: int
    model_id: str
    #: the waiting model that needs its place; its own, where it is to come back on a GPU
    for_model_id: str
    reason: str
    #: it has requests: they finish on it, new ones wait behind the model that needs its place.
    #: False: drain it only if it is still idle.
    drains_busy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to do for this load now; the reason is what a user reads in the queue."""

    model_id: str
    reason: str
    #: the error code the load is answered with if it still waits at queue_timeout
    code_at_timeout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """It can never be, as configured."""

    model_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One entry per waiting load (start, wait or refuse), and the evictions that make room."""

    starts: tuple[Start, ...] = ()
    evictions: tuple[Evict, ...] = ()
    waits: tuple[Wait, ...] = ()
    refusals: tuple[Refuse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateGpu:
    """A GPU as a place for one model, with the numbers that decide."""

    uuid: str
    index: int
    name: str
    #: now, headroom and everything promised taken off; may be below 0
    free_bytes: int
    #: the same once all that drains or stops is gone and older loads have what waits for them
    free_later_bytes: int
    #: what the whole model would take here, overhead included; None where it isn't allowed
    needed_bytes: int | None
    fits_now: bool
    #: "no room", "not allowed", "in error: ...", "busy (92 % used by others' kernels)", ...
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What would happen to a model if it were asked for now, and why."""

    model_id: str
    #: "loaded", "start", "evict", "wait" or "refuse"
    action: str
    reason: str
    #: where it would go: now, or once the evictions are done
    placement: Placement | None
    candidates: tuple[CandidateGpu, ...]
    evictions: tuple[Evict, ...] = ()
    #: the error code of a wait at queue_timeout, or of a refusal
    code: str | None = None
