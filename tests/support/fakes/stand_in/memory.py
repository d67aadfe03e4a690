"""The GPU memory a stand-in takes, in the world that the stand-in NVML shows."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.fakes.stand_in.flags import BadFlag, Options
from tests.support.fakes.stand_in.knobs import Knobs
from tests.support.fakes.world import (
    ENVIRONMENT_VARIABLE,
    FakeGpu,
    free_of,
    hold,
    locked,
    read_world,
)

MIB = 1 << 20


class OutOfMemory(Exception):
    """A GPU has not what is asked: its device number, name, bytes asked and bytes free."""

    def __init__(self, index: int, name: str, asked_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{name}: {asked_bytes} asked, {free_bytes} free")
        self.index, self.name, self.asked_bytes = index, name, asked_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    #: as --device and the log lines call it: CUDA0, counted after CUDA_VISIBLE_DEVICES
    name: str
    gpu: FakeGpu


def visible_devices() -> list[Device]:
    """Return the devices a process with this environment sees; [] without a fake world."""
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        return []
    world = read_world(Path(path))
    gpus = list(world.gpus)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and world.backend == "CUDA":
        gpus = _selected(gpus, wanted.split(","))
    alive = [gpu for gpu in gpus if not gpu.lost]
    return [Device(name=f"{world.backend}{index}", gpu=gpu) for index, gpu in enumerate(alive)]


def _selected(gpus: list[FakeGpu], wanted: list[str]) -> list[FakeGpu]:
    """As CUDA does: in the order asked, and nothing from the first unknown one on."""
    chosen = []
    for name in wanted:
        found = [
            gpu
            for index, gpu in enumerate(gpus)
            if name == str(index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))
        ]
        if len(found) != 1:
            break
        chosen.append(found[0])
    return chosen


def used_devices(options: Options) -> list[Device]:
    """Return the devices the model goes on; raises BadFlag for an unknown --device."""
    devices = visible_devices()
    named = options.text("--device")
    if named:
        by_name = {device.name: device for device in devices}
        names = [] if named == "none" else named.split(",")
        for name in names:
            if name not in by_name:
                text = f'error while handling argument "--device": invalid device: {name}'
                raise BadFlag(f"{text}\n\nusage:")
        devices = [by_name[name] for name in names]
    return [] if options.text("--gpu-layers") == "0" else devices


def list_devices() -> str:
    """Return what --list-devices prints."""
    lines = [
        f"  {device.name}: {device.gpu.name} "
        f"({device.gpu.total_bytes // MIB} MiB, {_free(device.gpu) // MIB} MiB free)"
        for device in visible_devices()
    ]
    return "\n".join(["Available devices:", *(lines or ["  (none)"])])


def _free(gpu: FakeGpu) -> int:
    return free_of(Path(os.environ[ENVIRONMENT_VARIABLE]), gpu)


@dataclass(slots=True, kw_only=True)
class GpuMemory:
    """What this process has of each device, and the taking of more."""

    devices: list[Device]
    tensor_split: str
    knobs: Knobs
    _held: dict[str, int] = field(default_factory=dict)
    _requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def shares(self) -> list[int]:
        """Return the model's bytes on each device."""
        wanted = [int(part) for part in self.knobs.gpu_bytes.split("/")]
        if len(wanted) > 1:
            return (wanted + [0] * len(self.devices))[: len(self.devices)]
        parts = [float(part) for part in re.split(r"[,/]+", self.tensor_split) if part]
        parts = (parts + [0.0] * len(self.devices))[: len(self.devices)]
        if not any(parts):  # llama.cpp: in proportion to what is free
            parts = [float(_free(device.gpu)) for device in self.devices]
        return [int(wanted[0] * part / (sum(parts) or 1)) for part in parts]

    def take_step(self, step: int) -> None:
        """Have what the load has after step 1, 2 ... gpu_steps; raises OutOfMemory."""
        shares = [share * step // self.knobs.gpu_steps for share in self.shares()]
        self._take(shares)

    def request(self, difference: int) -> None:
        """Count a request in or out, with its gpu_request_bytes; raises OutOfMemory."""
        if not self.knobs.gpu_request_bytes and not self.knobs.gpu_pool_bytes:
            return
        with self._lock:
            self._requests += difference
            extra = self._requests * self.knobs.gpu_request_bytes + self.knobs.gpu_pool_bytes
            self._take([share + extra for share in self.shares()])

    def _take(self, wanted: list[int]) -> None:
        """Take all or nothing, while no other stand-in can take."""
        if not self.devices:
            return
        path = Path(os.environ[ENVIRONMENT_VARIABLE])
        with locked(path):
            current = {gpu.uuid: gpu for gpu in read_world(path).gpus}
            for index, device in enumerate(self.devices):
                free = free_of(path, current[device.gpu.uuid])
                more = wanted[index] - self._held.get(device.gpu.uuid, 0)
                if more > free or free < self.knobs.oom_if_less_than_free:
                    raise OutOfMemory(index, device.name, max(more, 0), free)
            names = [device.gpu.uuid for device in self.devices]
            self._held = dict(zip(names, wanted, strict=True))
            hold(path, self._held, self.knobs.free_lag_s)
