"""Logs of servers that died while loading: was it for want of memory, and whose?"""

# ruff: noqa: E501 - log lines as they are

from __future__ import annotations

import pytest

from smartproxy.llama.log import last_useful_line
from smartproxy.llama.out_of_memory import Lacking, asked_bytes, lacking
from smartproxy.types import MIB

#: as ggml-cuda.cu and llama.cpp of b11434 write it
CUDA_WEIGHTS = """\
0.00.812.345 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5120.00 MiB on device 0: cudaMalloc failed: out of memory
0.00.812.400 E llama_model_load: error loading model: unable to allocate CUDA0 buffer
0.00.812.500 E srv  llama_server: exiting due to model loading error
"""
CUDA_CACHE = """\
0.02.100.000 I load_tensors:        CUDA0 model buffer size =  1000.00 MiB
0.02.100.000 I load_tensors:        CUDA1 model buffer size =  2000.00 MiB
0.02.100.000 I llama_kv_cache:      CUDA0 KV buffer size =   100.00 MiB
0.02.110.000 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 300.00 MiB on device 1: cudaMalloc failed: out of memory
0.02.120.000 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
"""
#: as b10068 wrote it here, on the software GPU under a limit of address space
VULKAN = """\
ggml_vulkan: Device memory allocation of size 999358464 failed.
ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory
0.00.290.001 E alloc_tensor_range: failed to allocate Vulkan0 buffer of size 999358464
0.00.290.619 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
"""
#: the same on the CPU
HOST_MMAP = """\
0.00.178.911 E llama_model_load: error loading model: mmap failed: Cannot allocate memory
0.00.179.001 E llama_model_load_from_file_impl: failed to load model
"""
HOST_CACHE = """\
0.00.287.846 E ggml_aligned_malloc: insufficient memory (attempted to allocate 43948.12 MB)
0.00.287.942 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 46082949120
0.00.287.969 E alloc_tensor_range: failed to allocate CPU buffer of size 46082949120
0.00.293.363 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
"""
HOST_GRAPH = """\
0.00.356.619 E ggml_aligned_malloc: insufficient memory (attempted to allocate  41.96 MB)
"""
#: warnings of a server that goes on
PINNED_VULKAN = (
    "0.00.379.878 W ggml_vulkan: Failed to allocate pinned memory (No suitable memory type found:"
    " ErrorOutOfDeviceMemory)\n"
)
PINNED_CUDA = (
    "0.00.1 W ggml_cuda_host_malloc: failed to allocate 12.00 MiB of pinned memory: out of memory\n"
)
CORRUPT = (
    "0.00.1 E llama_model_load: error loading model: tensor 'blk.1.ffn_up.weight' data is not"
    " within the file bounds, model is corrupted or incomplete\n"
)


@pytest.mark.parametrize(
    ("log", "whose", "line"),
    [
        (CUDA_WEIGHTS, Lacking.GPU, "cudaMalloc failed"),
        (CUDA_CACHE, Lacking.GPU, "cudaMalloc failed"),
        ("CUDA error: out of memory\n", Lacking.GPU, "CUDA error: out of memory"),
        (VULKAN, Lacking.GPU, "Device memory allocation of size 999358464 failed"),
        (HOST_MMAP, Lacking.HOST, "mmap failed: Cannot allocate memory"),
        (HOST_CACHE, Lacking.HOST, "insufficient memory"),
        (HOST_GRAPH, Lacking.HOST, "insufficient memory"),
        (PINNED_CUDA + CORRUPT, None, "data is not within the file bounds"),
        (PINNED_VULKAN + CORRUPT, None, "data is not within the file bounds"),
        (PINNED_CUDA + HOST_MMAP, Lacking.HOST, "mmap failed"),
        ("", None, "its log is empty"),
    ],
)
def test_whose_memory_was_short_is_read_off_the_log(
    log: str, whose: Lacking | None, line: str
) -> None:
    assert lacking(log) is whose
    assert line in last_useful_line(log)


def test_what_a_device_had_and_was_asked_for_bounds_its_need_from_below() -> None:
    assert asked_bytes(CUDA_CACHE, 2) == [0, 2300 * MIB]
    assert asked_bytes(CUDA_WEIGHTS, 1) == [5120 * MIB]
    assert asked_bytes(VULKAN, 1) == [0]
