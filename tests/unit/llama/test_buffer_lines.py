from __future__ import annotations

from smartproxy.llama.buffer_lines import HOST, measured_buffers
from smartproxy.types import MIB

#: llama-server b10068, SmolLM2-135M, software Vulkan device, -ngl 99 -c 2048 -np 1 -lv 4
VULKAN = """\
0.00.323.476 I load_tensors:   CPU_Mapped model buffer size =    28.69 MiB
0.00.323.477 I load_tensors:      Vulkan0 model buffer size =    92.10 MiB
0.00.390.584 I llama_context: Vulkan_Host  output buffer size =     0.19 MiB
0.00.390.751 I llama_kv_cache:    Vulkan0 KV buffer size =    45.00 MiB
0.00.440.891 I sched_reserve:    Vulkan0 compute buffer size =    13.26 MiB
0.00.440.909 I sched_reserve: Vulkan_Host compute buffer size =     4.26 MiB
0.14.785.656 I common_memory_breakdown_print: |   - Vulkan0 (llvmpipe) |  2048 = 2048 + ( 150 =
"""
#: the same build and model over two ggml-rpc-servers, -ts 2,1
RPC = """\
0.00.310.823 I load_tensors:   CPU_Mapped model buffer size =    28.69 MiB
0.00.310.825 I load_tensors: RPC0[127.0.0.1:28962] model buffer size =    44.39 MiB
0.00.310.826 I load_tensors: RPC0[127.0.0.1:28963] model buffer size =    47.71 MiB
0.00.492.626 I llama_context:        CPU  output buffer size =     0.19 MiB
0.00.496.216 I llama_kv_cache: RPC0[127.0.0.1:28962] KV buffer size =    31.50 MiB
0.00.519.883 I llama_kv_cache: RPC0[127.0.0.1:28963] KV buffer size =    13.50 MiB
0.00.569.815 I sched_reserve: RPC0[127.0.0.1:28962] compute buffer size =    14.38 MiB
0.00.569.836 I sched_reserve: RPC0[127.0.0.1:28963] compute buffer size =    14.38 MiB
0.00.569.837 I sched_reserve:        CPU compute buffer size =     4.26 MiB
"""
#: the same build, CPU alone, -np 2 --kv-unified
CPU = """\
0.00.159.762 I load_tensors:   CPU_Mapped model buffer size =    92.10 MiB
0.00.161.430 I llama_context:        CPU  output buffer size =     0.38 MiB
0.00.161.557 I llama_kv_cache:        CPU KV buffer size =    45.00 MiB
0.00.193.181 I sched_reserve:        CPU compute buffer size =    15.51 MiB
"""


def mib(size_bytes: int) -> float:
    return round(size_bytes / MIB, 2)


def test_device_and_host_are_told_apart() -> None:
    measured = measured_buffers(VULKAN.splitlines())
    assert set(measured) == {"Vulkan0", HOST}
    gpu, host = measured["Vulkan0"], measured[HOST]
    assert [mib(n) for n in (gpu.weights_bytes, gpu.kv_cache_bytes, gpu.compute_bytes)] == [
        92.10,
        45.00,
        13.26,
    ]
    assert mib(host.weights_bytes) == 28.69
    assert mib(host.compute_bytes) == 4.45  # graph and output


def test_remote_devices_are_told_apart_by_their_endpoint() -> None:
    measured = measured_buffers(RPC.splitlines())
    assert {name: mib(device.kv_cache_bytes) for name, device in measured.items()} == {
        "RPC0[127.0.0.1:28962]": 31.50,
        "RPC0[127.0.0.1:28963]": 13.50,
        HOST: 0,
    }


def test_cpu_alone_is_all_host() -> None:
    measured = measured_buffers(CPU.splitlines())
    assert list(measured) == [HOST]
    assert mib(measured[HOST].total_bytes) == 152.99


def test_a_buffer_reserved_anew_counts_once() -> None:
    again = [*CPU.splitlines(), CPU.splitlines()[-1].replace("15.51", "46.38")]
    assert mib(measured_buffers(again)[HOST].compute_bytes) == 46.76


def test_a_draft_models_context_is_summed_with_the_models_own() -> None:
    # b10068, SmolLM2 drafting for itself, -np 2 --kv-unified --spec-type draft-simple
    context = ["0.00.273.135 I llama_context: constructing llama_context", *CPU.splitlines()]
    drafting = measured_buffers([*context, *context])
    assert mib(drafting[HOST].compute_bytes) == round(2 * (15.51 + 0.38), 2)
    assert mib(drafting[HOST].weights_bytes) == 2 * 92.10


def test_a_projector_is_summed_with_the_models_own() -> None:
    # b10068, a vision tower of 2 layers; on a GPU the same lines name it
    lines = """\
0.01.216.363 I clip_ctx: CLIP using CPU backend
0.01.216.538 I load_hparams: model size:         52.16 MiB
0.01.351.354 I reserve_compute_meta:        CPU compute buffer size =    19.32 MiB
"""
    host = measured_buffers([*CPU.splitlines(), *lines.splitlines()])[HOST]
    assert mib(host.compute_bytes) == round(15.51 + 0.38 + 19.32, 2)
    assert mib(host.weights_bytes) == round(92.10 + 52.16, 2)
    gpu = measured_buffers([*VULKAN.splitlines(), *lines.replace("CPU", "Vulkan0").splitlines()])
    assert mib(gpu["Vulkan0"].weights_bytes) == round(92.10 + 52.16, 2)
    assert mib(gpu["Vulkan0"].compute_bytes) == round(13.26 + 19.32, 2)


def test_a_log_without_buffer_lines_gives_nothing() -> None:
    assert measured_buffers(["srv  llama_server: listening on http://127.0.0.1:28911"]) == {}
