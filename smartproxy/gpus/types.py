"""GPUs as plain values that more than one part speaks in. Bytes, and Unix seconds. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
