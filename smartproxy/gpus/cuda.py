"""All that is assumed of a CUDA device, once. Values and their arithmetic: pure, asks no device."""

from __future__ import annotations

from smartproxy.types import MIB

#: what a buffer aligns tensors to, and a quantized row is padded to
#: (ggml-cuda.cu, ggml_backend_cuda_buffer_type_get_alloc_size; common.cuh, MATRIX_ROW_PADDING)
DEVICE_ALIGNMENT = 128
ROW_PADDING = 512
#: head sizes for which there is a flash attention kernel (fattn.cu, get_best_kernel)
FLASH_HEAD_LENGTHS = frozenset({40, 64, 72, 80, 96, 112, 128, 256, 512, 576})

#: (bytes of a GPU up to, multiprocessors assumed): no card of that size has more, by NVIDIA's data
#: sheets (RTX 4060 Ti 34, RTX 4080 76, V100 80, RTX 4090 128, RTX PRO 6000 188)
_MULTIPROCESSORS = ((9 << 30, 48), (17 << 30, 84), (25 << 30, 128), (1 << 62, 188))


def default_overhead_bytes(total_bytes: int | None) -> int:
    """Return what a server takes of a GPU beside llama.cpp's buffers, until that was measured.

    total_bytes: the GPU's memory; None = unknown, which gets what the largest would.
    150 MiB and 2.5 MiB per multiprocessor: above the public reports (llama.cpp PR 23604: 107 MiB on
    an RTX 4060 Ti, 555 MiB on an RTX PRO 6000). NVML doesn't tell multiprocessors: size stands in.
    """
    most = _MULTIPROCESSORS[-1][1]
    if total_bytes is not None:
        most = next(count for size, count in _MULTIPROCESSORS if total_bytes <= size)
    return int((150 + 2.5 * most) * MIB)
