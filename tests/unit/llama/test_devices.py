"""llama-server's devices matched to NVML's GPUs, where CUDA_VISIBLE_DEVICES pins nothing."""

from __future__ import annotations

import pytest

from smartproxy.errors import LoadFailed
from smartproxy.gpus.types import Gpu
from smartproxy.llama.binary import Device
from smartproxy.llama.devices import device_names
from smartproxy.planner.types import GpuShare
from smartproxy.types import GIB
from tests.support.worlds import gpu

BIG = gpu(0, 24, name="NVIDIA GeForce RTX 4090")
SMALL = gpu(1, 8, name="NVIDIA GeForce RTX 3070")


def device(name: str, description: str, gib: float) -> Device:
    return Device(name=name, description=description, total_bytes=int(gib * GIB))


def shares(*gpus: Gpu) -> tuple[GpuShare, ...]:
    return tuple(GpuShare(uuid=one.uuid, index=one.index, bytes=GIB) for one in gpus)


def test_vulkan_devices_are_found_by_name_and_size_whatever_their_order() -> None:
    devices = [
        device("Vulkan0", "AMD Radeon Graphics (RADV RAPHAEL_MENDOCINO)", 15.5),
        device("Vulkan1", "NVIDIA GeForce RTX 3070", 8.1),
        device("Vulkan2", "NVIDIA GeForce RTX 4090", 23.99),
    ]
    assert device_names(devices, (BIG, SMALL), shares(BIG)) == ("Vulkan2",)
    assert device_names(devices, (BIG, SMALL), shares(SMALL, BIG)) == ("Vulkan1", "Vulkan2")
    assert device_names(devices, (BIG, SMALL), ()) == ()


def test_cards_that_look_alike_keep_their_order() -> None:
    twin = gpu(2, 24, name=BIG.name)
    devices = [device(f"Vulkan{n}", "NVIDIA GeForce RTX 4090", 24) for n in range(2)]
    assert device_names(devices, (BIG, twin), shares(twin)) == ("Vulkan1",)


def test_of_one_name_the_nearest_size_is_taken() -> None:
    large = gpu(2, 25.5, name=BIG.name)
    devices = [
        device("Vulkan0", "NVIDIA GeForce RTX 4090", 25.5),
        device("Vulkan1", "NVIDIA GeForce RTX 4090", 24),
    ]
    assert device_names(devices, (BIG, large), shares(BIG, large)) == ("Vulkan1", "Vulkan0")


def test_a_gpu_that_the_build_does_not_list_is_an_error_that_names_it() -> None:
    devices = [device("Vulkan0", "NVIDIA GeForce RTX 4090", 24)]
    with pytest.raises(LoadFailed, match=r"no Vulkan device for GPU 1: it has Vulkan0 \(NVIDIA"):
        device_names(devices, (BIG, SMALL), shares(SMALL))


def test_cuda_builds_go_by_the_environment_unless_vulkan_is_in_them_too() -> None:
    cuda = [device("CUDA0", BIG.name, 24), device("CUDA1", SMALL.name, 8)]
    assert device_names(cuda, (BIG, SMALL), shares(SMALL)) == ()
    both = [*cuda, device("Vulkan0", BIG.name, 24), device("Vulkan1", SMALL.name, 8)]
    assert device_names(both, (BIG, SMALL), shares(SMALL)) == ("CUDA0",)
    assert device_names([], (BIG, SMALL), shares(BIG)) == ()
