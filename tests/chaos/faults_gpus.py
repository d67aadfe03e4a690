"""GPUs and their driver: lost, failing, hanging, gone and back, used by strangers."""

from __future__ import annotations

from dataclasses import replace

from tests.chaos.fault import SERVER_DIED, Faulty, Scene, fault
from tests.chaos.machine import GIB
from tests.support.fakes.world import (
    DRIVER_NOT_LOADED,
    LIB_RM_VERSION_MISMATCH,
    UNKNOWN,
    FakeProcess,
    Fault,
)

#: while GPUs are away, what needs them waits or is told why
AWAY = SERVER_DIED | {"insufficient_gpu_memory", "gpu_memory_busy", "model_load_failed"}


def _uuid(scene: Scene) -> str:
    return scene.chooser.choice(scene.machine.world.world.gpus).uuid


@fault("a GPU is lost and comes back", AWAY, hold_s=(0.5, 2.5), weight=2)
def lost(scene: Scene) -> Faulty:
    uuid = _uuid(scene)
    scene.machine.world.change_gpu(uuid, lost=True)
    yield
    scene.machine.world.change_gpu(uuid, lost=False)


@fault("all GPUs are lost and come back", AWAY, hold_s=(0.5, 2.5))
def all_lost(scene: Scene) -> Faulty:
    world = scene.machine.world
    before = world.world.gpus
    world.change(gpus=tuple(replace(gpu, lost=True) for gpu in before))
    yield
    world.change(gpus=before)


@fault("a GPU leaves the list and comes back", AWAY, hold_s=(0.5, 2.5))
def vanishes(scene: Scene) -> Faulty:
    world = scene.machine.world
    before = world.world.gpus
    gone = scene.chooser.choice(before)
    world.change(gpus=tuple(gpu for gpu in before if gpu != gone))
    yield
    world.change(gpus=before)


@fault("GPUs change their numbers", AWAY, hold_s=(0.5, 2.0))
def renumbered(scene: Scene) -> Faulty:
    world = scene.machine.world
    before = world.world.gpus
    world.change(gpus=tuple(reversed(before)))
    yield
    world.change(gpus=before)


def _failing(scene: Scene, *faults: Fault) -> Faulty:
    scene.machine.world.change(faults=faults)
    yield
    scene.machine.world.change(faults=())


@fault("one GPU's memory can't be read", AWAY, hold_s=(0.5, 2.5))
def one_fails(scene: Scene) -> Faulty:
    names = ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo")
    uuid = _uuid(scene)
    faults = [Fault(function=name, code=UNKNOWN, uuid=uuid) for name in names]
    yield from _failing(scene, *faults)


@fault("small things of a GPU can't be read", hold_s=(0.5, 2.0))
def small_things_fail(scene: Scene) -> Faulty:
    names = ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature")
    more = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses_v3")
    faults = [Fault(function=name, code=UNKNOWN) for name in (*names, *more)]
    yield from _failing(scene, *faults)


@fault("a call to NVML hangs", AWAY, hold_s=(1.0, 3.0), weight=2)
def hangs(scene: Scene) -> Faulty:
    fault_ = Fault(function="nvmlDeviceGetMemoryInfo_v2", hang_s=4.0, uuid=_uuid(scene))
    yield from _failing(scene, fault_)


@fault("the driver goes and comes back", AWAY, hold_s=(1.0, 3.0))
def driver_reloads(scene: Scene) -> Faulty:
    world = scene.machine.world
    before = world.world.gpus
    world.change(init_code=DRIVER_NOT_LOADED, gpus=tuple(replace(gpu, lost=True) for gpu in before))
    yield
    world.change(init_code=0, gpus=before)


@fault("library and driver do not match for a while", AWAY, hold_s=(1.0, 3.0))
def mismatch(scene: Scene) -> Faulty:
    names = ("nvmlDeviceGetCount_v2", "nvmlDeviceGetMemoryInfo_v2", "nvmlSystemGetDriverVersion")
    faults = [Fault(function=name, code=LIB_RM_VERSION_MISMATCH) for name in names]
    yield from _failing(scene, *faults)


@fault("a stranger takes most of a GPU", AWAY, hold_s=(0.5, 2.5), weight=2)
def stranger(scene: Scene) -> Faulty:
    world = scene.machine.world
    gpu = scene.chooser.choice(world.world.gpus)
    free = world.free_bytes()[gpu.uuid]
    taken = FakeProcess(pid=1, used_bytes=max(0, free - GIB // 2))
    world.change_gpu(gpu.uuid, processes=(taken,))
    yield
    world.change_gpu(gpu.uuid, processes=())


@fault("a GPU is used to the full by others", hold_s=(0.5, 2.0))
def busy(scene: Scene) -> Faulty:
    world = scene.machine.world
    for gpu in world.world.gpus:
        world.change_gpu(gpu.uuid, utilization=100)
    yield
    for gpu in world.world.gpus:
        world.change_gpu(gpu.uuid, utilization=0)
