"""What the planner is asked and what it answers, as plain values. No I/O.

Bytes are integers, times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from smartproxy.gpus.types import Gpu
from smartproxy.memory.types import Estimate, Layout, Need
from smartproxy.types import ServerState


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
    requests: int
    need: Need
    policy: PlacePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
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
    holds: Mapping[str, Promise]
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
    #: gpus.cuda.default_overhead_bytes
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    uuid: str
    index: int
    #: estimate with overhead: what gets reserved
    bytes: int
    #: what there was of it, headroom and promises taken off; None where nobody counted
    free_bytes: int | None = None


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
