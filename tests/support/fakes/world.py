"""The GPUs that the stand-in NVML library and the stand-in llama-server both believe in.

Tests write a world to a file and name it in the environment variable SMARTPROXY_FAKE_NVML; the
library (nvml/nvml.c) reads it again on every call. Beside the file there are `FILE.held/`, where
every stand-in llama-server says what it takes of which GPU, and `FILE.lock`, held while one takes.
What a server took counts while its process lives (a zombie does not), and `lag_s` longer.

The file: one line a thing, fields divided by tabs, `key=value`; unknown keys are ignored:

    driver  version=580.95.05  init=0  backend=CUDA
    fault   function=nvmlDeviceGetMemoryInfo_v2  code=0  seconds=5  uuid=GPU-a (or empty: all)
    gpu     uuid=GPU-a  name=NVIDIA X  total=...  used=...  ...
    process uuid=GPU-a  pid=12  bytes=34  kind=compute|graphics
    mig     uuid=MIG-a  parent=GPU-a  name=...  total=...  used=...

Standard library only: the stand-in llama-server imports this.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

ENVIRONMENT_VARIABLE = "SMARTPROXY_FAKE_NVML"
GIB = 1 << 30
#: nvmlReturn_t, as in nvml.h
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, TIMEOUT = 3, 4, 9, 10
LIBRARY_NOT_FOUND, GPU_IS_LOST, LIB_RM_VERSION_MISMATCH, UNKNOWN = 12, 15, 18, 999


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeProcess:
    pid: int
    #: None = NVML_VALUE_NOT_AVAILABLE
    used_bytes: int | None
    kind: str = "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeMig:
    uuid: str
    total_bytes: int
    used_bytes: int = 0
    name: str = "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    processes: tuple[FakeProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeGpu:
    uuid: str
    total_bytes: int = 24 * GIB
    #: taken by what NVML shows no process for; processes and servers come on top
    used_bytes: int = 0
    #: the driver's own, in neither used nor free (memory info version 2)
    reserved_bytes: int = 0
    name: str = "NVIDIA GeForce RTX 4090"
    pci_bus_id: str = "00000000:01:00.0"
    utilization: int = 0
    temperature_c: int = 40
    power_w: float = 50.0
    compute_capability: str = "8.9"
    #: every call on it gives GPU_IS_LOST, until NVML is initialised again without this
    lost: bool = False
    processes: tuple[FakeProcess, ...] = ()
    #: None = no MIG mode; () = on, without instances
    migs: tuple[FakeMig, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A function that fails with a code, or takes its time, on one GPU or on all."""

    function: str
    code: int = 0
    hang_s: float = 0.0
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All GPUs in NVML index order (PCI order)."""

    gpus: tuple[FakeGpu, ...] = ()
    driver_version: str = "580.95.05"
    #: what nvmlInit returns
    init_code: int = 0
    faults: tuple[Fault, ...] = ()
    #: what a stand-in llama-server calls its devices: CUDA or Vulkan
    backend: str = "CUDA"


class WorldFile:
    """A world on disk that a test changes while programs look at it."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.held = Path(f"{path}.held")
        self.held.mkdir(exist_ok=True)
        self.write(world)

    @property
    def environment(self) -> dict[str, str]:
        return {ENVIRONMENT_VARIABLE: str(self.path)}

    def write(self, world: World) -> None:
        """Replace the whole world at once: a reader sees the old or the new one."""
        self.world = world
        handle, temporary = tempfile.mkstemp(dir=self.path.parent)
        with os.fdopen(handle, "w") as file:
            file.write("".join(f"{line}\n" for line in _lines(world)))
        os.replace(temporary, self.path)

    def change(self, **changes: object) -> None:
        """Change fields of the world: driver_version, init_code, faults, gpus, backend."""
        self.write(replace(self.world, **changes))  # type: ignore[arg-type]  # names are checked

    def change_gpu(self, uuid: str, **changes: object) -> None:
        """Change fields of one GPU: change_gpu("GPU-a", used_bytes=..., lost=True)."""
        assert any(gpu.uuid == uuid for gpu in self.world.gpus), uuid
        self.change(
            gpus=tuple(
                replace(gpu, **changes) if gpu.uuid == uuid else gpu  # type: ignore[arg-type]
                for gpu in self.world.gpus
            )
        )

    def sessions(self) -> str:
        """Return "+" for every nvmlInit that worked and "-" for every nvmlShutdown, in order."""
        return Path(f"{self.path}.sessions").read_text()

    def free_bytes(self) -> dict[str, int]:
        """Return what is free by GPU uuid, as NVML would show it now."""
        return {gpu.uuid: free_of(self.path, gpu) for gpu in self.world.gpus}


def unequal_pair() -> World:
    """Return the usual small world: a 24 GiB card and an 8 GiB one."""
    return World(
        gpus=(
            FakeGpu(uuid="GPU-11111111-aaaa", total_bytes=24 * GIB),
            FakeGpu(
                uuid="GPU-22222222-bbbb",
                total_bytes=8 * GIB,
                name="NVIDIA GeForce RTX 3070",
                pci_bus_id="00000000:41:00.0",
                compute_capability="8.6",
            ),
        )
    )


# --- the file ------------------------------------------------------------------------------------


def _lines(world: World) -> Iterator[str]:
    yield _line("driver", version=world.driver_version, init=world.init_code, backend=world.backend)
    for fault in world.faults:
        yield _line(
            "fault",
            function=fault.function,
            code=fault.code,
            seconds=fault.hang_s,
            uuid=fault.uuid,
        )
    for gpu in world.gpus:
        yield _line(
            "gpu",
            uuid=gpu.uuid,
            name=gpu.name,
            pci=gpu.pci_bus_id,
            total=gpu.total_bytes,
            used=gpu.used_bytes,
            reserved=gpu.reserved_bytes,
            utilization=gpu.utilization,
            temperature=gpu.temperature_c,
            power_mw=round(gpu.power_w * 1000),
            capability=gpu.compute_capability,
            lost=int(gpu.lost),
            mig=int(gpu.migs is not None),
        )
        yield from _process_lines(gpu.uuid, gpu.processes)
        for mig in gpu.migs or ():
            yield _line(
                "mig",
                uuid=mig.uuid,
                parent=gpu.uuid,
                name=mig.name,
                total=mig.total_bytes,
                used=mig.used_bytes,
            )
            yield from _process_lines(mig.uuid, mig.processes)


def _process_lines(uuid: str, processes: tuple[FakeProcess, ...]) -> Iterator[str]:
    for process in processes:
        used = -1 if process.used_bytes is None else process.used_bytes
        yield _line("process", uuid=uuid, pid=process.pid, bytes=used, kind=process.kind)


def _line(what: str, /, **fields: object) -> str:
    return "\t".join([what, *(f"{key}={value}" for key, value in fields.items())])


def read_world(path: Path) -> World:
    """Return what a stand-in llama-server must know of the world: its GPUs and the backend."""
    gpus: dict[str, FakeGpu] = {}
    backend = "CUDA"
    for line in path.read_text().splitlines():
        kind, *pairs = line.split("\t")
        fields = dict(pair.split("=", 1) for pair in pairs)
        if kind == "driver":
            backend = fields["backend"]
        elif kind == "gpu":
            gpus[fields["uuid"]] = FakeGpu(
                uuid=fields["uuid"],
                name=fields["name"],
                total_bytes=int(fields["total"]),
                used_bytes=int(fields["used"]),
                reserved_bytes=int(fields["reserved"]),
                lost=fields["lost"] == "1",
            )
        elif kind == "process" and fields["uuid"] in gpus:
            gpu = gpus[fields["uuid"]]
            used = gpu.used_bytes + max(0, int(fields["bytes"]))
            gpus[gpu.uuid] = replace(gpu, used_bytes=used)
    return World(gpus=tuple(gpus.values()), backend=backend)


# --- what servers take of it ---------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other stand-in servers from taking memory meanwhile."""
    with open(f"{path}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hold(path: Path, bytes_by_uuid: dict[str, int], lag_s: float) -> None:
    """Say what this process takes, in place of what it said before."""
    folder = Path(f"{path}.held")
    lines = [f"lag\t{lag_s}", *(f"{uuid}\t{used}" for uuid, used in bytes_by_uuid.items())]
    temporary = folder / f".{os.getpid()}"
    temporary.write_text("".join(f"{line}\n" for line in lines))
    temporary.rename(folder / f"{os.getpid()}-{_start_ticks(os.getpid())}")


def free_of(path: Path, gpu: FakeGpu) -> int:
    """Return the bytes of a GPU that nobody has, as NVML would show them now."""
    processes = sum(process.used_bytes or 0 for process in gpu.processes)
    taken = gpu.used_bytes + gpu.reserved_bytes + processes + held_bytes(path, gpu.uuid)
    return max(0, gpu.total_bytes - taken)


def held_bytes(path: Path, uuid: str) -> int:
    """Return what stand-in servers take of a GPU, or have not given back yet."""
    total = 0
    for entry in Path(f"{path}.held").glob("[0-9]*-*[0-9]"):
        lag, *lines = (line.split("\t") for line in entry.read_text().splitlines())
        if _alive(entry.name) or _lags(entry, float(lag[1])):
            total += sum(int(used) for name, used in lines if name == uuid)
    return total


def _lags(entry: Path, lag_s: float) -> bool:
    """A dead process's memory stays for lag_s from when somebody first saw it dead."""
    if lag_s <= 0:
        return False
    mark = Path(f"{entry}.dead")
    if not mark.exists():
        mark.touch()
    return time.time() < mark.stat().st_mtime + lag_s


def _alive(entry_name: str) -> bool:
    pid, _, start = entry_name.partition("-")
    return _start_ticks(int(pid)) == start


def _start_ticks(pid: int) -> str:
    """Return the start time of a live process from /proc; "" of a dead one or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
