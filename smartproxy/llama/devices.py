"""Which of llama-server's devices is which GPU, for builds that don't go by CUDA_VISIBLE_DEVICES.

A Vulkan build sees every GPU whatever the environment says, in an order of its own: it is pinned by
`--device` names. What `--list-devices` says of each, its name and size, is matched to NVML's GPUs.
A build with CUDA and Vulkan in one would take each GPU twice: there CUDA's names are said. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from smartproxy.errors import LoadFailed
from smartproxy.gpus.types import Gpu
from smartproxy.llama.binary import Device
from smartproxy.planner.types import GpuShare

#: Vulkan's largest heap against NVML's total; drivers keep some back
SIZE_TOLERANCE = 0.1


def device_names(
    devices: Sequence[Device], gpus: Sequence[Gpu], shares: Sequence[GpuShare]
) -> tuple[str, ...]:
    """Return what `--device` says for these shares, in their order; () where it need not be said.

    devices: as the binary lists them without CUDA_VISIBLE_DEVICES. Raises LoadFailed for a GPU that
    the binary does not list.
    """
    kinds = {_kind(device.name) for device in devices}
    if "Vulkan" not in kinds or not shares:
        return ()
    if "CUDA" in kinds:
        # counted after CUDA_VISIBLE_DEVICES, which is in the order of the shares
        return tuple(f"CUDA{place}" for place in range(len(shares)))
    names = matched([device for device in devices if _kind(device.name) == "Vulkan"], gpus)
    missing = [share for share in shares if share.uuid not in names]
    if missing:
        raise LoadFailed(
            f"llama-server lists no Vulkan device for GPU {missing[0].index}: it has"
            f" {', '.join(f'{d.name} ({d.description})' for d in devices)}"
        )
    return tuple(names[share.uuid] for share in shares)


def matched(devices: Sequence[Device], gpus: Sequence[Gpu]) -> Mapping[str, str]:
    """Return the device of each GPU by uuid, as far as one matches by name and size.

    Cards that look alike are taken in the order of both lists. Slices (MIG) have no Vulkan device.
    """
    left, names = list(devices), {}
    for gpu in gpus:
        alike = [device for device in left if not gpu.mig and _is(device, gpu)]
        if alike:
            best = min(alike, key=lambda device: abs(device.total_bytes - gpu.total_bytes))
            names[gpu.uuid] = best.name
            left.remove(best)
    return names


def _is(device: Device, gpu: Gpu) -> bool:
    same_size = abs(device.total_bytes - gpu.total_bytes) <= SIZE_TOLERANCE * gpu.total_bytes
    return same_size and _plain(device.description) == _plain(gpu.name)


def _plain(name: str) -> str:
    return re.sub(r"\W|nvidia", "", name.casefold())


def _kind(name: str) -> str:
    return name.rstrip("0123456789")
