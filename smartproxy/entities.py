"""SPEC 1's entities: the JSON that users see. Memory in GB = 2^30 bytes, °C, W, per cent.

Field names may not change. What breaks a rule raises pydantic's ValidationError, which names the
field. Built by whoever answers a request; nothing inside the project computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, computed_field, field_validator

from smartproxy.gpus.types import GpuState
from smartproxy.planner.types import Strategy
from smartproxy.types import ServerState

GpuId = Annotated[int, Field(ge=0)]
Pid = Annotated[int, Field(gt=0)]
Gb = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
#: as on the hub, where real names contain dots
Repo = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]


class ServerStatus(StrEnum):
    STOPPED = "stopped"
    RUNNING = "running"  # its process lives
    ERROR = "error"  # it failed


def status_of(state: ServerState) -> ServerStatus:
    """Return the coarse status that a state shows as."""
    if state is ServerState.FAILED:
        return ServerStatus.ERROR
    return ServerStatus.STOPPED if state is ServerState.STOPPED else ServerStatus.RUNNING


class _Entity(BaseModel):
    # defaults are checked too: some rules hold between a given field and one left out
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, validate_default=True)


class GPUAssignment(_Entity):
    """Which GPUs a server was given, and what of them. No GPUs: the CPU.

    The lists have one entry per GPU, in the order of gpu_ids, or none where it isn't known.
    """

    gpu_ids: list[GpuId]
    #: over all its GPUs
    estimated_vram_required: Gb
    #: over all its GPUs, as NVML shows it; None until measured
    actual_vram_used: Gb | None = None
    gpu_uuids: list[Name] = []
    tensor_split: list[Annotated[float, Field(ge=0)]] = []
    #: layers on the GPUs, the output layer counted
    gpu_layers: int | None = Field(None, ge=0)
    #: free on each GPU when it was assigned
    gpu_free_bytes: list[Bytes] = []
    #: asked of each GPU
    gpu_estimated_bytes: list[Bytes] = []
    #: taken of each GPU, as NVML shows it
    gpu_measured_bytes: list[Bytes] = []

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def tensor_splits(self) -> list[float]:
        """The previous generation's name."""
        return self.tensor_split

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def n_gpu_layers(self) -> int | None:
        """The previous generation's name."""
        return self.gpu_layers

    @field_validator("gpu_ids")
    @classmethod
    def _each_once(cls, ids: list[int]) -> list[int]:
        if len(set(ids)) < len(ids):
            raise ValueError(f"names a GPU twice: {ids}")
        return ids

    @field_validator(
        "gpu_uuids", "tensor_split", "gpu_free_bytes", "gpu_estimated_bytes", "gpu_measured_bytes"
    )
    @classmethod
    def _one_per_gpu(cls, values: list[Any], info: ValidationInfo) -> list[Any]:
        gpu_ids = info.data.get("gpu_ids", [])
        if values and len(values) != len(gpu_ids):
            raise ValueError(f"has {len(values)} entries for {len(gpu_ids)} GPUs")
        return values

    @field_validator("gpu_estimated_bytes")
    @classmethod
    def _asks_for_what_is_free(cls, asked: list[int], info: ValidationInfo) -> list[int]:
        ids, free = info.data.get("gpu_ids", []), info.data.get("gpu_free_bytes", [])
        for gpu_id, wanted_bytes, free_bytes in zip(ids, asked, free, strict=False):
            if wanted_bytes > free_bytes:
                raise ValueError(f"asks GPU {gpu_id} for {wanted_bytes}, free are {free_bytes}")
        return asked


class Server(_Entity):
    """One llama-server process."""

    id: Name
    host: Name
    port: int = Field(ge=1, le=65_535)
    model_id: Name
    status: ServerStatus
    #: pid
    process: Pid | None = None
    gpu_assignment: GPUAssignment | None = None
    #: the finer state behind status
    state: ServerState | None = None
    #: why it is in this state, where there is something to say
    reason: str | None = None

    @field_validator("state")
    @classmethod
    def _fits_status(cls, state: ServerState | None, info: ValidationInfo) -> ServerState | None:
        status = info.data.get("status")
        if state is not None and status is not None and status_of(state) is not status:
            raise ValueError(f"{state} shows as {status_of(state)}, not as {status}")
        return state


class GPUProcess(_Entity):
    """A process that holds memory of a GPU, ours or not."""

    pid: Pid
    name: str | None = None
    #: None where the driver does not say
    used_memory: Gb | None = None
    #: one of our servers, and its model
    ours: bool = False
    model_id: Name | None = None


class GPU(_Entity):
    """One GPU as last seen."""

    id: GpuId
    name: Name
    total_memory: float = Field(gt=0)
    free_memory: Gb
    used_memory: Gb
    utilization: float = Field(ge=0, le=100)
    temperature: float | None = None
    power_usage: Gb | None = None
    assigned_models: list[Name] = []
    #: "8.9"
    compute_capability: str | None = None
    uuid: Name | None = None
    pci_bus_id: str | None = None
    #: a slice of a GPU in MIG mode, listed in its place
    mig: bool = False
    state: GpuState = GpuState.AVAILABLE
    #: why it is in state error
    error: str | None = None
    processes: list[GPUProcess] = []

    @field_validator("free_memory", "used_memory")
    @classmethod
    def _within_total(cls, memory: float, info: ValidationInfo) -> float:
        total = info.data.get("total_memory")
        if total is not None and memory > total:
            raise ValueError(f"{memory} GB of {total} GB")
        return memory


class Model(_Entity):
    """One model of the catalogue. It has a path, or a repo."""

    id: Name
    repo: Repo | None = None
    variant: Name | None = None
    backend: Literal["llama.cpp", "ollama"] = "llama.cpp"
    estimated_vram: float | None = Field(None, gt=0)
    #: how many weights it has: a number, or as the file says it ("7B")
    parameters: Annotated[int, Field(gt=0)] | Name | None = None
    quantization: str | None = None
    path: Name | None = None
    aliases: list[Name] = []

    @field_validator("path")
    @classmethod
    def _path_or_repo(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None and info.data.get("repo", "") is None:
            raise ValueError("must have a path or a repo")
        return path


class GPUPoolStatus(_Entity):
    """All GPUs together. The computed fields are the previous generation's names."""

    total_gpus: int = Field(ge=0)
    #: GPUs in state available
    available_gpus: int = Field(ge=0)
    total_vram: Gb
    #: free on all healthy GPUs
    available_vram: Gb
    gpu_list: list[GPU]
    allocation_strategy: Strategy
    #: Unix seconds of the last look; None before the first
    observed_at: float | None = None
    gpu_monitoring_enabled: bool = True
    driver_version: str | None = None

    @field_validator("available_gpus")
    @classmethod
    def _not_more_than_all(cls, available: int, info: ValidationInfo) -> int:
        total = info.data.get("total_gpus")
        if total is not None and available > total:
            raise ValueError(f"{available} of {total}")
        return available

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def total_memory(self) -> float:
        return self.total_vram

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def used_memory(self) -> float:
        return sum(gpu.used_memory for gpu in self.gpu_list)

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def free_memory(self) -> float:
        return self.available_vram

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def gpus(self) -> list[GPU]:
        return self.gpu_list

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def utilization_average(self) -> float:
        return sum(gpu.utilization for gpu in self.gpu_list) / max(1, len(self.gpu_list))

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def gpu_available(self) -> bool:
        return self.total_gpus > 0


def pool_status(
    gpus: Sequence[GPU],
    strategy: Strategy,
    *,
    observed_at: float | None = None,
    gpu_monitoring_enabled: bool = True,
    driver_version: str | None = None,
) -> GPUPoolStatus:
    """Return the sums over all GPUs; zeros and an empty list without any."""
    healthy = [gpu for gpu in gpus if gpu.state is not GpuState.ERROR]
    return GPUPoolStatus(
        total_gpus=len(gpus),
        available_gpus=sum(gpu.state is GpuState.AVAILABLE for gpu in gpus),
        total_vram=sum(gpu.total_memory for gpu in gpus),
        available_vram=sum(gpu.free_memory for gpu in healthy),
        gpu_list=list(gpus),
        allocation_strategy=strategy,
        observed_at=observed_at,
        gpu_monitoring_enabled=gpu_monitoring_enabled,
        driver_version=driver_version,
    )
