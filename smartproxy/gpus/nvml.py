"""What NVML says of the GPUs, as one GpuSnapshot; the only importer of pynvml.

A GPU that fails leaves the others alone: it stays in the list with `error` set and its last known
numbers, also when it has fallen off the bus or the whole driver has gone away. Where NVML can't be
initialised and never was, there are no GPUs and a reason; it is tried again every RETRY_S.

Calls block, for seconds when a driver is in trouble. So one thread of the caller does nothing but
`observe`, and everybody else works with the last snapshot and the age in its `observed_at`: ctypes
lets other threads run during a call. A call that never returns costs that one thread; don't wait
for `close` then, the end of the process ends it.

MIG: a GPU in MIG mode is replaced by its slices (`mig`, uuid "MIG-…", index from MIG_INDEX_BASE
on). CUDA gives a process one slice at most: never split over them.
Unified memory (Jetson, GB10): NVML knows no size; the host's MemTotal and MemAvailable stand in, as
in llama.cpp (ggml-cuda.cu, ggml_backend_cuda_device_get_memory, integrated devices).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from smartproxy.errors import ObserveError
from smartproxy.gpus.types import Gpu, GpuProcess, GpuSnapshot

#: how long to wait before initialising NVML again, after it failed or while a GPU is failing
RETRY_S = 10.0
#: indices of MIG slices: this + 8 * index of their GPU + slice (a GPU has at most 7)
MIG_INDEX_BASE = 1000
#: answers that mean that what runs on the GPU is lost
_LOST = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})
#: answers that mean that GPU or driver are in trouble, whatever was asked
_TROUBLE = _LOST | {pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    total_bytes: int
    free_bytes: int
    used_bytes: int


class GpuObserver:
    """One NVML session: opened by the first look, again when needed. For one thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open = False
        #: by uuid, as last read
        self._known: dict[str, Gpu] = {}
        #: by uuid, the index a GPU had when first seen: when one is gone NVML counts the rest
        #: anew, and a user's `gpus: [1]` must not mean another one then
        self._indices: dict[str, int] = {}
        #: uuid by NVML's index in this session, to name a GPU that no longer tells its own
        self._uuids: dict[int, str] = {}
        self._retry_at = clock()
        self._reason: str | None = None
        self._driver_version: str | None = None

    def observe(self) -> GpuSnapshot:
        """Look at all GPUs now. Blocks as long as the driver takes; raises nothing."""
        due = self._clock() >= self._retry_at
        if due and (not self._open or self._reason or self._failing()):
            self._reopen()
        gpus = self._read_all() if self._open else {}
        self._known = gpus | self._missing(gpus)
        return GpuSnapshot(
            gpus=tuple(sorted(self._known.values(), key=lambda gpu: gpu.index)),
            observed_at=time.time(),
            reason=self._reason,
            driver_version=self._driver_version,
        )

    def close(self) -> None:
        """Shut NVML down; the next `observe` opens it again."""
        if self._open:
            self._open = False
            # a driver that has gone away says no to this too, and that is as good
            with suppress(ObserveError):
                _ask(pynvml.nvmlShutdown)
        self._retry_at = self._clock()

    def _reopen(self) -> None:
        """Initialise NVML anew: a lost GPU that has come back shows itself only then."""
        self.close()
        self._retry_at = self._clock() + RETRY_S
        try:
            _ask(pynvml.nvmlInit)
        except ObserveError as error:
            self._reason = f"NVML can't be used: {error}"
            return
        self._open = True
        self._uuids = {}
        self._driver_version = _optional(pynvml.nvmlSystemGetDriverVersion)

    def _read_all(self) -> dict[str, Gpu]:
        """Return what can be read, by uuid; what can't is told in self._reason, or by its error."""
        try:
            count = _ask(pynvml.nvmlDeviceGetCount)
        except ObserveError as error:
            self._reason = f"NVML can't count the GPUs: {error}"
            return {}
        gpus: dict[str, Gpu] = {}
        unread = []
        for index in range(count):
            try:
                handle = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
                for gpu in self._read(index, handle):
                    gpus[gpu.uuid] = gpu
            except ObserveError as error:
                known = self._known.get(self._uuids.get(index, ""))
                if known is None:
                    unread.append(f"GPU {index} can't be read: {error}")
                else:
                    lost = _code(error) in _LOST
                    gpus[known.uuid] = replace(known, error=str(error), lost=lost, processes=())
        self._reason = "; ".join(unread) or None
        return gpus

    def _read(self, index: int, handle: Any) -> list[Gpu]:
        """Return the GPU's entry, or those of its slices; raises ObserveError."""
        uuid = _ask(pynvml.nvmlDeviceGetUUID, handle)
        self._uuids[index] = uuid
        slices = _slices(handle)
        whole = _read_gpu(handle, uuid, self._index_of(uuid, index))
        if slices is None:
            return [whole]
        if not slices:
            return [replace(whole, error="in MIG mode without any instance: nothing can run")]
        return _read_slices(whole, slices)

    def _missing(self, readings: dict[str, Gpu]) -> dict[str, Gpu]:
        """Return the known GPUs that this look did not show, each saying why."""
        missing = {}
        whole = {gpu.pci_bus_id for gpu in readings.values()}
        for uuid, gpu in self._known.items():
            # MIG mode may be switched, and slices cut anew, while we run: that is no failure
            if uuid in readings or (
                gpu.pci_bus_id in whole and (gpu.mig or _sliced(gpu, readings))
            ):
                continue
            why = self._reason or gpu.error or "NVML no longer lists it: fallen off the bus"
            # while NVML as a whole fails, what runs on the GPU may well go on
            lost = gpu.lost or self._reason is None
            missing[uuid] = replace(gpu, error=why, lost=lost, processes=())
        return missing

    def _index_of(self, uuid: str, nvml_index: int) -> int:
        """Return the index this GPU had when first seen; a new one gets NVML's, or a free one."""
        if uuid not in self._indices:
            taken = set(self._indices.values())
            self._indices[uuid] = nvml_index if nvml_index not in taken else max(taken) + 1
        return self._indices[uuid]

    def _failing(self) -> bool:
        return any(gpu.error for gpu in self._known.values())


def _read_gpu(handle: Any, uuid: str, index: int) -> Gpu:
    memory, processes = _memory_and_processes(handle)
    pci = _optional(pynvml.nvmlDeviceGetPciInfo, handle)
    rates = _optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _optional(pynvml.nvmlDeviceGetPowerUsage, handle)
    temperature = _optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    capability = _optional(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        index=index,
        uuid=uuid,
        name=_optional(pynvml.nvmlDeviceGetName, handle) or "NVIDIA GPU",
        pci_bus_id=_text(pci.busId) if pci else "",
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        used_bytes=memory.used_bytes,
        utilization=float(rates.gpu) if rates else 0.0,
        temperature_c=None if temperature is None else float(temperature),
        power_w=None if power_mw is None else power_mw / 1000,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        processes=processes,
    )


def _read_slices(whole: Gpu, slices: list[tuple[int, Any]]) -> list[Gpu]:
    """Return one entry a slice, with what only the whole GPU knows."""
    gpus = []
    for number, handle in slices:
        memory, processes = _memory_and_processes(handle)
        gpus.append(
            replace(
                whole,
                uuid=_ask(pynvml.nvmlDeviceGetUUID, handle),
                index=MIG_INDEX_BASE + 8 * whole.index + number,
                name=_optional(pynvml.nvmlDeviceGetName, handle) or whole.name,
                mig=True,
                utilization=0.0,  # NVML has none for a slice
                total_bytes=memory.total_bytes,
                free_bytes=memory.free_bytes,
                used_bytes=memory.used_bytes,
                processes=processes,
            )
        )
    return gpus


def _sliced(gpu: Gpu, readings: dict[str, Gpu]) -> bool:
    return any(other.mig and other.pci_bus_id == gpu.pci_bus_id for other in readings.values())


def _memory_and_processes(handle: Any) -> tuple[_Memory, tuple[GpuProcess, ...]]:
    """Return sizes and processes that go together: no process has what is not in "used".

    Memory is asked for before and after, and the worse is taken. Else what a load takes between the
    two questions would look like memory that others gave back.
    """
    before, processes, after = _memory(handle), _processes(handle), _memory(handle)
    return max(before, after, key=lambda memory: memory.used_bytes), processes


def _memory(handle: Any) -> _Memory:
    """Return sizes in bytes; the driver's own reserve is neither used nor free (NVML >= 510)."""
    try:
        info = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    except ObserveError as error:
        if _code(error) == pynvml.NVML_ERROR_NOT_SUPPORTED:
            return _host_memory()
        if _code(error) != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        info = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return _Memory(total_bytes=info.total, free_bytes=info.free, used_bytes=info.used)


def _host_memory() -> _Memory:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ObserveError(f"no memory size from NVML nor from /proc/meminfo: {error}") from error
    return _Memory(total_bytes=total, free_bytes=free, used_bytes=total - free)


def _slices(handle: Any) -> list[tuple[int, Any]] | None:
    """Return number and handle of each MIG slice; None where the GPU is not in MIG mode."""
    mode = _optional(pynvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return None
    numbers = range(_optional(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    found = [
        (number, _optional(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number))
        for number in numbers
    ]
    return [pair for pair in found if pair[1] is not None]


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Return compute and graphics processes, one that does both once, by pid."""
    used: dict[int, int | None] = {}
    for ask in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for process in _optional(ask, handle) or ():
            before, now = used.get(process.pid), process.usedGpuMemory
            # both lists tell the process's whole memory: the larger one, not the sum
            used[process.pid] = now if before is None else max(before, now or 0)
    return tuple(
        GpuProcess(pid=pid, used_bytes=used[pid], name=_process_name(pid)) for pid in sorted(used)
    )


def _process_name(pid: int) -> str | None:
    """Return the program's file name; None where it has ended or is not ours to see."""
    name = _optional(pynvml.nvmlSystemGetProcessName, pid)
    return Path(name).name or None if name else None


def _ask(function: Callable[..., T], *arguments: Any) -> T:
    """Call NVML; every way it can fail is an ObserveError, NVML's own with its code as cause."""
    try:
        return function(*arguments)
    except (pynvml.NVMLError, UnicodeDecodeError, OSError) as error:
        raise ObserveError(str(error)) from error


def _optional(function: Callable[..., T], *arguments: Any) -> T | None:
    """Return None for what this GPU or driver does not tell; raises ObserveError in trouble."""
    try:
        return _ask(function, *arguments)
    except ObserveError as error:
        if _code(error) in _TROUBLE:
            raise
        return None


def _code(error: ObserveError) -> int | None:
    return getattr(error.__cause__, "value", None)


def _text(value: bytes | str) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value
