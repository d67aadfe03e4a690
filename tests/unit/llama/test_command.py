"""The command line says everything that memory depends on, as the estimate has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smartproxy.catalog.catalog import ModelSpec, build_catalog
from smartproxy.config.settings import Settings
from smartproxy.llama.binary import Binary
from smartproxy.llama.command import command, environment
from smartproxy.manager.served import loaded_of, options_key, settings_key
from smartproxy.memory.types import Estimate, Layout
from smartproxy.planner.types import GpuShare, Placement
from smartproxy.state import migrate
from smartproxy.state.store import Store
from tests.support import gguf_files, gguf_shapes
from tests.support.running import REAL_MODEL

BINARY = Binary(
    path=Path("llama-server"),
    flags=frozenset({"--fit", "--slots", "--spec-type", "--cache-type-k-draft"}),
    build="b10068",
    library_dir=None,
    trace_verbosity=4,
    devices=(),
)


@pytest.fixture
def state(tmp_path: Path) -> Store:
    return migrate.create(tmp_path / "state.db")[0]


def spec_of(path: Path = REAL_MODEL, **keys: Any) -> ModelSpec:
    settings = Settings(models={"m": {"path": path, **keys}})  # type: ignore[dict-item]
    return build_catalog(settings).models["m"]


def placement_on(*uuids: str) -> Placement:
    layout = Layout(tensor_split=(1.0,) * len(uuids), gpu_layers=31, context_size=2048)
    estimate = Estimate(layout=layout, devices=(), host=None)  # type: ignore[arg-type]  # not read
    gpus = tuple(GpuShare(uuid=uuid, index=i, bytes=0) for i, uuid in enumerate(uuids))
    return Placement(gpus=gpus, layout=layout, estimate=estimate, reason="")


def argv(state: Store, spec: ModelSpec, placement: Placement, binary: Binary = BINARY) -> list[str]:
    return command(binary, spec, placement, port=1, loaded=loaded_of(state, spec))


def values(words: list[str], flag: str) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == flag]


def model_with_heads_of(length: int, folder: Path) -> Path:
    body = gguf_shapes.Body(
        width=384, layers=2, heads=384 // length, kv_heads=2, head=length, inner=512, vocabulary=64
    )
    return gguf_files.write(gguf_shapes.transformer(f"h{length}.F16", "llama", body), folder)


def test_every_default_that_costs_memory_is_said(state: Store) -> None:
    said = argv(state, spec_of(), placement_on("GPU-a"))
    for flag, value in {
        "--ctx-size": "2048",
        "--parallel": "4",
        "--batch-size": "2048",
        "--ubatch-size": "512",
        "--cache-type-k": "f16",
        "--cache-type-v": "f16",
        "--flash-attn": "on",
        "--fit": "off",
        "--n-gpu-layers": "31",
        "--log-verbosity": "4",
    }.items():
        assert values(said, flag) == [value], flag
    assert "--kv-unified" in said


def test_flash_attention_is_off_where_gpus_have_no_kernel_for_it(
    state: Store, tmp_path: Path
) -> None:
    small = spec_of(model_with_heads_of(32, tmp_path))
    assert values(argv(state, small, placement_on("GPU-a")), "--flash-attn") == ["off"]
    quantized = spec_of(model_with_heads_of(32, tmp_path), cache_type_v="q8_0")
    assert values(argv(state, quantized, placement_on("GPU-a")), "--flash-attn") == ["on"]


def test_flash_attention_is_the_servers_choice_only_for_unknown_architectures(
    state: Store, tmp_path: Path
) -> None:
    body = gguf_shapes.Body(
        width=64, layers=2, heads=1, kv_heads=1, head=64, inner=64, vocabulary=9
    )
    path = gguf_files.write(gguf_shapes.transformer("new.F16", "brandnew", body), tmp_path)
    assert values(argv(state, spec_of(path), placement_on("GPU-a")), "--flash-attn") == ["auto"]


def test_what_args_say_stands_once(state: Store) -> None:
    spec = spec_of(args=["-ub", "128", "-fa", "off", "-t", "3", "--swa-full", "-nkvo"])
    said = argv(state, spec, placement_on("GPU-a"))
    assert values(said, "--ubatch-size") == ["128"]
    assert values(said, "--flash-attn") == ["off"]
    assert {"--swa-full", "--no-kv-offload"} < set(said)
    assert not {"-ub", "-fa", "-nkvo"} & set(said)
    assert said[-2:] == ["-t", "3"]
    assert loaded_of(state, spec).options.ubatch == 128


def test_a_draft_model_is_used_and_goes_where_its_model_goes(state: Store) -> None:
    spec = spec_of(draft_model=REAL_MODEL)
    on_gpu = argv(state, spec, placement_on("GPU-a", "GPU-b"))
    assert values(on_gpu, "--gpu-layers-draft") == ["31"]
    assert values(on_gpu, "--spec-type") == ["draft-simple"]
    on_cpu = argv(state, spec, placement_on())
    assert values(on_cpu, "--gpu-layers-draft") == ["0"]
    assert values(on_cpu, "--device-draft") == ["none"]
    chosen = spec_of(draft_model=REAL_MODEL, args=["--spec-type", "ngram-mod"])
    assert values(argv(state, chosen, placement_on()), "--spec-type") == ["ngram-mod"]


def test_builds_that_always_print_their_buffers_are_not_told_to(state: Store) -> None:
    old = Binary(
        path=Path("llama-server"),
        flags=frozenset(),
        build="old",
        library_dir=None,
        trace_verbosity=None,
        devices=(),
    )
    assert "--log-verbosity" not in argv(state, spec_of(), placement_on(), old)


def test_measurements_are_kept_apart_by_all_that_memory_depends_on(state: Store) -> None:
    def key(build: str = "b1", gpus: int = 1, **keys: Any) -> str:
        spec, layout = spec_of(**keys), placement_on(*"abc"[:gpus]).layout
        return settings_key(options_key(spec, loaded_of(state, spec), build), layout)

    different = {
        key(),
        key(build="b2"),
        key(gpus=2),
        key(args=["-ub", "128"]),
        key(args=["--no-repack"]),
        key(cache_type_k="q8_0"),
        key(parallel=2),
        key(env={"GGML_CUDA_FORCE_MMQ": "1"}),
        key(draft_model=REAL_MODEL),
    }
    assert len(different) == 9
    assert key(args=["-b", "2048", "-fa", "on"]) == key()


def test_devices_are_named_where_the_environment_does_not_choose_them(state: Store) -> None:
    spec, placement = spec_of(draft_model=REAL_MODEL), placement_on("GPU-a", "GPU-b")
    names = ("Vulkan2", "Vulkan0")
    said = command(BINARY, spec, placement, port=1, loaded=loaded_of(state, spec), devices=names)
    assert values(said, "--device") == ["Vulkan2,Vulkan0"]
    assert values(said, "--device-draft") == ["Vulkan2,Vulkan0"]
    env = environment(
        BINARY, spec, placement, environ={}, api_key="k", state_dir=Path("s"), devices=names
    )
    assert env["MTMD_BACKEND_DEVICE"] == "Vulkan2"


def test_stray_variables_of_ours_do_not_reach_a_server() -> None:
    stray = {
        "LLAMA_ARG_CTX_SIZE": "1",
        "GGML_VK_VISIBLE_DEVICES": "3",
        "CUDA_VISIBLE_DEVICES": "7",
        "MTMD_BACKEND_DEVICE": "CUDA7",
        "PATH": "/bin",
    }
    spec = spec_of(env={"GGML_CUDA_FORCE_MMQ": "1"})
    env = environment(
        BINARY, spec, placement_on("GPU-b"), environ=stray, api_key="k", state_dir=Path("s")
    )
    assert env == {
        "PATH": "/bin",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-b",
        "GGML_CUDA_FORCE_MMQ": "1",
        "LLAMA_API_KEY": "k",
        "SMARTPROXY_OWNER": "s",
    }
