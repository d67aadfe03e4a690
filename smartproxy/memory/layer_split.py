"""Which device each layer goes to, as llama.cpp splits them. Pure.

Source: llama.cpp b11434, src/llama-model.cpp, load_tensors (get_layer_buft_list).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

HOST = -1


@lru_cache(maxsize=1024)
def layer_devices(
    layer_count: int, gpu_layers: int, tensor_split: tuple[float, ...]
) -> tuple[int, ...]:
    """Return the device of each layer, the output layer last; HOST where it is not offloaded.

    gpu_layers: the last so many go to the devices, the output layer counts as one; negative =
    all. Arithmetic is in single precision, or layers on a boundary would fall elsewhere.
    """
    total = layer_count + 1
    offloaded = total if gpu_layers < 0 else min(gpu_layers, total)
    if not tensor_split:
        offloaded = 0
    first = total - offloaded
    bounds = _bounds(tensor_split) if offloaded else []
    devices = [HOST] * first
    for index in range(offloaded):
        position = _single(index / offloaded)
        devices.append(min(bisect_right(bounds, position), len(bounds) - 1))
    return tuple(devices)


def _bounds(tensor_split: Sequence[float]) -> list[float]:
    """Return the running sums of the shares, the last one being 1."""
    sums, total = [], 0.0
    for share in tensor_split:
        total = _single(total + _single(share))
        sums.append(total)
    # all zero means "by free memory" to llama.cpp, which nobody here knows: equal shares
    if total <= 0:
        return _bounds([1.0] * len(tensor_split))
    return [_single(part / total) for part in sums]


def _single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
