"""What the row of one server says, and what is written into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, TypedDict

from smartproxy.state.store import Row
from smartproxy.types import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRow:
    """One llama-server. Times are Unix seconds; what is None is not known (yet)."""

    id: int
    model_id: str
    host: str
    port: int
    pid: int | None
    #: when the process started, since the boot: with the pid it names one process
    pid_start_ticks: int | None
    state: ServerState
    #: why it is in this state, in words
    reason: str | None
    api_key: str
    #: its command line, as a JSON list
    command: str
    log_path: str
    settings_key: str
    on_cpu_for_want_of_gpu: bool
    #: tokens, of all slots together
    context_size: int | None
    parallel: int | None
    gpu_layers: int | None
    layer_count: int | None
    #: shares of the layers, separated by commas
    tensor_split: str | None
    #: over all its GPUs
    estimated_bytes: int | None
    measured_bytes: int | None
    host_estimated_bytes: int | None
    host_measured_bytes: int | None
    created_at: float
    ready_at: float | None
    state_changed_at: float
    #: seconds from its start to ready
    load_s: float | None
    exit_code: int | None
    error_code: str | None
    error_message: str | None
    last_used_at: float
    #: when its own /metrics and /slots were read; the figures below are as of then
    watched_at: float | None
    slots_total: int | None
    slots_busy: int | None
    requests_processing: int | None
    requests_deferred: int | None
    prompt_tokens_total: float | None
    predicted_tokens_total: float | None
    tokens_per_second: float | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `servers` says."""
        values = {
            **row,
            "state": ServerState(row["state"]),
            "on_cpu_for_want_of_gpu": bool(row["on_cpu_for_want_of_gpu"]),
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveServer(ServerRow):
    """A server that lives, with what the leases on it say."""

    #: workers that have requests in flight on it
    leased: int
    #: the later of its own last use and that of its leases
    used_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewServer:
    """What is known of a server before its process exists; of an adopted one, its process too."""

    model_id: str
    port: int
    api_key: str
    command: str
    log_path: str
    settings_key: str
    on_cpu_for_want_of_gpu: bool = False
    context_size: int | None = None
    parallel: int | None = None
    gpu_layers: int | None = None
    layer_count: int | None = None
    tensor_split: str | None = None
    estimated_bytes: int | None = None
    host_estimated_bytes: int | None = None
    pid: int | None = None
    pid_start_ticks: int | None = None


class ServerColumns(TypedDict, total=False):
    """The columns that may be set while a server lives; its state moves in `transition` only."""

    port: int
    pid: int
    pid_start_ticks: int
    ready_at: float
    load_s: float
    exit_code: int | None
    error_code: str
    error_message: str
    last_used_at: float
    watched_at: float
    slots_total: int
    slots_busy: int
    requests_processing: int
    requests_deferred: int
    prompt_tokens_total: float
    predicted_tokens_total: float
    tokens_per_second: float
