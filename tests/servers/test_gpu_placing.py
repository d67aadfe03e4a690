"""Models on GPUs, end to end: the stand-in NVML, stand-in servers, command lines from /proc."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support import gguf_files, gguf_shapes
from tests.support.fakes.world import FakeGpu, FakeMig, World
from tests.support.gpu_running import (
    GIB,
    MIB,
    Card,
    Started,
    gpu_machine,
    model,
    plan,
    started,
    uuid,
    world_of,
)


def test_a_model_goes_where_the_plan_said_on_one_of_two_unequal_cards(tmp_path: Path) -> None:
    models = {"big": model(tmp_path, "big", 12), "small": model(tmp_path, "small", 5)}
    stray = {
        "CUDA_VISIBLE_DEVICES": "0",
        "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1",
        "LLAMA_ARG_CTX_SIZE": "16",
    }
    world = world_of(Card(gib=8), Card(gib=24))
    with gpu_machine(tmp_path, world, models, env=stray) as (proxy, _):
        told = plan(proxy, "big")
        assert [gpu["id"] for gpu in told["placement"]["gpus"]] == [1]
        assert [gpu["fits"] for gpu in told["candidates"]] == [False, True]
        assert "too small for the whole model" in told["candidates"][0]["note"]
        assert proxy.llama_servers() == []

        assert proxy.chat("big").status_code == 200
        server = started(proxy, "big")
        assert server.cards() == [uuid(1)]
        assert server.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert not {"GGML_CUDA_ENABLE_UNIFIED_MEMORY", "LLAMA_ARG_CTX_SIZE"} & server.env.keys()
        assert server.flag("--split-mode") == "none"
        assert plan(proxy, "big")["action"] == "loaded"

        # 12 of 24 GB are left there, 8 here: the roomier one again
        assert proxy.chat("small").status_code == 200
        assert started(proxy, "small").cards() == [uuid(1)]


def test_a_model_too_big_for_either_card_goes_over_both_as_estimated(tmp_path: Path) -> None:
    models = {"wide": model(tmp_path, "wide", 20)}
    with gpu_machine(tmp_path, world_of(Card(gib=8), Card(gib=16)), models) as (proxy, world):
        assert proxy.chat("wide").status_code == 200
        server = started(proxy, "wide")
        # the one that can give most comes first; as many shares, divided by commas
        assert server.cards() == [uuid(1), uuid(0)]
        shares = [float(share) for share in (server.flag("--tensor-split") or "").split(",")]
        assert len(shares) == 2
        assert shares[0] > 1.5 * shares[1] > 0
        assert server.flag("--split-mode") == "layer"
        assert server.flag("--fit") == "off"
        (row,) = proxy.rows("SELECT layer_count, gpu_layers FROM servers")
        assert row["gpu_layers"] == row["layer_count"] == sum(shares)
        promised = proxy.rows("SELECT gpu_index, reserved_bytes FROM assignments")
        free = world.free_bytes()
        (shown,) = proxy.health()["servers"]
        assigned = shown["gpu_assignment"]
        assert assigned["gpu_ids"] == [1, 0]
        for asked, there in zip(
            assigned["gpu_estimated_bytes"], assigned["gpu_free_bytes"], strict=True
        ):
            assert 0 < asked <= there <= 16 * GIB
        for part in promised:
            card = world.world.gpus[part["gpu_index"]]
            assert card.total_bytes - free[card.uuid] <= part["reserved_bytes"]
            assert part["reserved_bytes"] <= card.total_bytes - 256 * MIB


def test_an_idle_model_makes_room_and_no_other(tmp_path: Path) -> None:
    models = {
        "old": model(tmp_path, "old", 5),
        "other": model(tmp_path, "other", 5),
        "new": model(tmp_path, "new", 5),
    }
    with gpu_machine(tmp_path, world_of(Card(gib=8), Card(gib=8)), models) as (proxy, _):
        for name in ("old", "other", "new"):
            assert proxy.chat(name).status_code == 200
        assert proxy.states() == {"old": "stopped", "other": "ready", "new": "ready"}
        assert started(proxy, "new").cards() != started(proxy, "other").cards()
        (reason,) = proxy.rows("SELECT message FROM events WHERE message LIKE '%makes room for%'")
        assert "frees 5." in reason["message"]


def test_a_model_too_big_for_all_cards_is_refused_with_the_numbers(tmp_path: Path) -> None:
    models = {"huge": model(tmp_path, "huge", 30), "one": model(tmp_path, "one", 5)}
    models["huge-on-one"] = {**models["huge"], "max_gpus": 1}
    with gpu_machine(tmp_path, world_of(Card(gib=8), Card(gib=16)), models) as (proxy, _):
        assert proxy.chat("one").status_code == 200
        answer = proxy.chat("huge")
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "insufficient_gpu_memory"
        assert "needs 30.8 GB" in error["message"]
        assert "largest set of GPUs has 23.5 GB (2 GPUs, headroom taken off)" in error["message"]
        error = proxy.chat("huge-on-one").json()["error"]
        assert "largest set of GPUs has 15.8 GB (1 GPU, headroom taken off)" in error["message"]
        # nobody was asked to go for what can't be
        assert proxy.states() == {"one": "ready"}


def test_a_vulkan_build_is_pinned_by_device_names(tmp_path: Path) -> None:
    models = {"m": model(tmp_path, "m", 12), "wide": model(tmp_path, "wide", 26)}
    world = replace(world_of(Card(gib=8), Card(gib=24)), backend="Vulkan")
    with gpu_machine(tmp_path, world, models) as (proxy, file):
        assert proxy.chat("m").status_code == 200
        assert started(proxy, "m").flag("--device") == "Vulkan1"
        assert file.free_bytes()[uuid(0)] == 8 * GIB
        assert proxy.chat("wide").status_code == 200
        assert started(proxy, "wide").flag("--device") == "Vulkan1,Vulkan0"


def test_slices_of_one_gpu_take_whole_models_and_are_named_by_their_uuid(tmp_path: Path) -> None:
    slices = tuple(FakeMig(uuid=f"MIG-{number}", total_bytes=20 * GIB) for number in range(2))
    whole = FakeGpu(uuid=uuid(0), total_bytes=80 * GIB, migs=slices)
    models = {
        "m": model(tmp_path, "m", 12, gpu_bytes=0),
        "n": model(tmp_path, "n", 12, gpu_bytes=0),
        "wide": model(tmp_path, "wide", 30),
    }
    with gpu_machine(tmp_path, World(gpus=(whole,)), models) as (proxy, _):
        for name in ("m", "n"):
            assert proxy.chat(name).status_code == 200
        assert started(proxy, "m").cards() == ["MIG-0"]
        assert started(proxy, "n").cards() == ["MIG-1"]
        refused = proxy.chat("wide").json()["error"]
        assert "largest set of GPUs has 19.8 GB (1 GPU" in refused["message"]


def test_what_a_model_s_configuration_says_of_its_place_is_carried_out(tmp_path: Path) -> None:
    def configured(name: str, gib: float, **config: Any) -> dict[str, Any]:
        return model(tmp_path, name, gib, gpu_bytes=GIB, config=config)

    models = {
        "by-number": configured("by-number", 3, gpus=[0]),
        "by-uuid": configured("by-uuid", 3, gpus=[uuid(1)]),
        "packed": configured("packed", 3, strategy="packed"),
        "spread": configured("spread", 3, strategy="distribute"),
        "one-only": configured("one-only", 25, max_gpus=1),
        "partial": configured("partial", 40, partial_offload=True),
        "partial-on-one": configured("partial-on-one", 40, partial_offload=True, max_gpus=1),
        "some-layers": configured("some-layers", 3, gpu_layers=4),
        "no-layers": configured("no-layers", 3, gpu_layers=0),
        "fallback": configured("fallback", 40, cpu_fallback=True),
        "forced": configured("forced", 3, cpu=True),
        "auto": configured("auto", 7.3, ctx_size="auto", gpus=[0]),
        "auto-roomy": configured("auto-roomy", 3, ctx_size="auto"),
    }
    world = world_of(Card(gib=8), Card(gib=24))
    with gpu_machine(tmp_path, world, models) as (proxy, _):

        def server_of(name: str) -> Started:
            answer = proxy.chat(name)
            assert answer.status_code == 200, answer.text
            seen = started(proxy, name)
            # each has the machine to itself
            proxy.post(f"/api/models/{name}/unload", timeout_s=60).raise_for_status()
            return seen

        assert server_of("by-number").cards() == [uuid(0)]
        assert server_of("by-uuid").cards() == [uuid(1)]
        assert server_of("packed").cards() == [uuid(0)]
        assert sorted(server_of("spread").cards()) == [uuid(0), uuid(1)]
        refused = proxy.chat("one-only").json()["error"]
        assert "largest set of GPUs has 23.8 GB (1 GPU" in refused["message"]

        partial = server_of("partial")
        assert len(partial.cards()) == 2
        on_one = server_of("partial-on-one")
        assert on_one.cards() == [uuid(1)]
        assert 0 < layers(on_one) < layers(partial) < 150
        assert layers(server_of("some-layers")) == 4

        for name in ("no-layers", "fallback", "forced"):
            on_cpu = server_of(name)
            assert on_cpu.flag("--device") == "none", name
            assert on_cpu.cards() == []
            assert layers(on_cpu) == 0

        assert 4096 <= int(server_of("auto").flag("--ctx-size") or 0) < 8192
        assert server_of("auto-roomy").flag("--ctx-size") == "8192"


def layers(server: Started) -> int:
    return int(server.flag("--n-gpu-layers") or -1)


def test_experts_go_to_the_host_before_whole_layers(tmp_path: Path) -> None:
    mixture = gguf_shapes.Body(
        width=2048,
        layers=24,
        heads=32,
        kv_heads=4,
        head=128,
        inner=6144,
        vocabulary=1024,
        trained=8192,
        experts=64,
        experts_used=8,
        expert_inner=768,
    )
    path = gguf_files.write(gguf_shapes.transformer("moe.Q8_0", "qwen3moe", mixture), tmp_path)
    models = {"moe": {"path": str(path), "partial_offload": True}}
    with gpu_machine(tmp_path, world_of(Card(gib=6)), models) as (proxy, _):
        assert proxy.chat("moe").status_code == 200
        server = started(proxy, "moe")
        assert 0 < int(server.flag("--n-cpu-moe") or 0) < 24
        assert layers(server) == 25
