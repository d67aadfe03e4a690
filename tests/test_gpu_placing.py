"""Models on GPUs, end to end: the stand-in NVML, stand-in servers, command lines from /proc."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import gguf_files, gguf_shapes
from tests.fakes.world import WorldFile
from tests.gpu_running import (
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
from tests.running import Proxy, free_port, wait_until

pytestmark = pytest.mark.servers


def test_a_model_goes_where_the_plan_said_on_one_of_two_unequal_cards(tmp_path: Path) -> None:
    models = {"big": model(tmp_path, "big", 12), "small": model(tmp_path, "small", 5)}
    with gpu_machine(tmp_path, world_of(Card(gib=8), Card(gib=24)), models) as (proxy, _):
        told = plan(proxy, "big")
        assert [gpu["id"] for gpu in told["placement"]["gpus"]] == [1]
        assert [gpu["fits"] for gpu in told["candidates"]] == [False, True]
        assert "too small for the whole model" in told["candidates"][0]["note"]
        assert proxy.llama_servers() == []

        assert proxy.chat("big").status_code == 200
        server = started(proxy, "big")
        assert server.cards() == [uuid(1)]
        assert server.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
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


def test_two_loads_at_once_share_the_last_room_in_turn(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name, 5, load_s=0.5) for name in ("a", "b")}
    with (
        gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _),
        ThreadPoolExecutor(2) as pool,
    ):
        answers = list(pool.map(proxy.chat, models))
        assert [answer.status_code for answer in answers] == [200, 200]
        # never both, though neither showed in NVML when the other was decided on
        (first, second) = proxy.rows("SELECT * FROM servers ORDER BY id")
        assert first["state"] == "stopped"
        assert second["created_at"] >= first["state_changed_at"]
        assert proxy.rows("SELECT 1 FROM events WHERE message LIKE '%ran out of GPU memory%'") == []


def test_loads_that_fit_side_by_side_run_at_the_same_time(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name, 5, load_s=1.5) for name in ("a", "b", "c")}
    world = world_of(Card(gib=8), Card(gib=16))
    with gpu_machine(tmp_path, world, models) as (proxy, _), ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(proxy.chat, models))
        assert [answer.status_code for answer in answers] == [200] * 3
        rows = proxy.rows("SELECT created_at, ready_at FROM servers")
        assert max(row["created_at"] for row in rows) < min(row["ready_at"] for row in rows)


def test_a_slow_load_holds_up_no_other(tmp_path: Path) -> None:
    models = {
        "slow": model(tmp_path, "slow", 5, silent_load=1),
        "quick": model(tmp_path, "quick", 5),
        "next": model(tmp_path, "next", 5),
    }
    world = world_of(Card(gib=8), Card(gib=8))
    with gpu_machine(tmp_path, world, models) as (proxy, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(proxy.chat, "slow")
        wait_until(lambda: proxy.states().get("slow") == "starting", what="slow starting")
        # one starts beside it, and one more has an idle model evicted meanwhile
        assert proxy.chat("quick").status_code == 200
        assert proxy.chat("next").status_code == 200
        assert proxy.states() == {"slow": "starting", "quick": "stopped", "next": "ready"}
        proxy.stop()
        assert waiting.result().json()["error"]["code"] == "shutting_down"


def test_the_next_load_waits_until_the_memory_is_really_back(tmp_path: Path) -> None:
    models = {
        "old": model(tmp_path, "old", 5, free_lag_s=1.5),
        "bystander": model(tmp_path, "bystander", 2),
        "new": model(tmp_path, "new", 5),
    }
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _):
        for name in ("old", "bystander", "new"):
            assert proxy.chat(name).status_code == 200
        rows = {row["model_id"]: row for row in proxy.rows("SELECT * FROM servers")}
        assert rows["new"]["created_at"] - rows["old"]["state_changed_at"] > 1.0
        # nobody else had to go for what was coming, and nobody died for want of it
        assert proxy.states() == {"old": "stopped", "bystander": "ready", "new": "ready"}


def test_a_crashed_model_s_memory_is_waited_for_too(tmp_path: Path) -> None:
    models = {
        "crashes": model(tmp_path, "crashes", 5, crash_on_request=1, free_lag_s=1.0),
        "bystander": model(tmp_path, "bystander", 2),
        "new": model(tmp_path, "new", 5),
    }
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _):
        assert proxy.chat("bystander").status_code == 200
        assert proxy.chat("crashes").json()["error"]["code"] == "backend_failed"
        assert proxy.chat("new").status_code == 200
        assert proxy.states()["bystander"] == "ready"


def test_memory_that_a_stranger_took_is_noticed_at_the_death_of_the_load(tmp_path: Path) -> None:
    models = {
        "idle": model(tmp_path, "idle", 4),
        "m": model(tmp_path, "m", 4, oom_if_less_than_free=3 * GIB),
    }
    world = world_of(Card(gib=10), Card(gib=5))
    # the regular look is far away: what the planner knows is old
    with gpu_machine(tmp_path, world, models, gpu_poll_interval=60) as (proxy, file):
        wait_until(lambda: looked_s_ago(proxy) > 0.5, what="no look is on its way")
        file.change_gpu(uuid(0), used_bytes=8 * GIB)
        assert proxy.chat("m").status_code == 200
        assert started(proxy, "m").cards() == [uuid(1)]
        tries = proxy.rows("SELECT state, reason FROM servers ORDER BY id")
        assert [row["state"] for row in tries] == ["stopped", "ready"]
        assert "others have taken all but 2.0 GB" in tries[0]["reason"]
        assert proxy.health()["status"] == "ok"


def looked_s_ago(proxy: Proxy) -> float:
    (row,) = proxy.rows("SELECT observed_at FROM manager")
    return time.time() - float(row["observed_at"])


def test_a_model_that_needs_more_than_estimated_gets_it_at_the_second_try(tmp_path: Path) -> None:
    models = {
        "idle": model(tmp_path, "idle", 2),
        "m": model(tmp_path, "m", 4, oom_if_less_than_free=5 * GIB),
    }
    with gpu_machine(tmp_path, world_of(Card(gib=6.5)), models) as (proxy, _):
        assert proxy.chat("idle").status_code == 200
        before = plan(proxy, "m")["estimate"]["total_memory"]
        assert proxy.chat("m").status_code == 200
        # it fitted beside the idle one, died, and then had it make room
        assert proxy.states() == {"idle": "stopped", "m": "ready"}
        (dead,) = proxy.rows(
            "SELECT reason FROM servers WHERE model_id = 'm' AND state = 'stopped'"
        )
        assert "its need is raised by 0.4 GB a GPU; it is tried once more" in dead["reason"]
        assert plan(proxy, "m")["estimate"]["total_memory"] > before + 0.3


def test_a_second_death_for_want_of_memory_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    models = {"m": model(tmp_path, "m", 4, fail_load="oom_kv")}
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _):
        answer = proxy.chat("m")
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "model_load_failed"
        assert "cudaMalloc failed: out of memory" in error["message"]
        assert re.search(r"GPU 0 was to give 4\.\d GB and has 8\.0 GB free now", error["message"])
        assert len(proxy.rows("SELECT 1 FROM servers")) == 2
        assert proxy.health()["status"] == "degraded"


def test_a_need_raised_beyond_the_machine_is_refused_as_such(tmp_path: Path) -> None:
    models = {"m": model(tmp_path, "m", 7.5, fail_load="oom")}
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _):
        error = proxy.chat("m").json()["error"]
        assert error["code"] == "insufficient_gpu_memory"
        assert re.search(r"needs \d+\.\d GB, largest set of GPUs has 7\.8 GB", error["message"])


def test_two_models_that_do_not_fit_together_take_turns(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name, 5) for name in ("a", "b")}
    world = world_of(Card(gib=8))
    with (
        gpu_machine(tmp_path, world, models, min_residency=1) as (proxy, _),
        ThreadPoolExecutor(8) as pool,
    ):
        end = time.monotonic() + 12

        def client(name: str) -> int:
            served = 0
            while time.monotonic() < end:
                assert proxy.chat(name, max_tokens=1).status_code == 200
                served += 1
            return served

        counts = list(pool.map(client, ["a", "b"] * 4))
        assert min(counts) >= 1
        loads = proxy.rows("SELECT model_id FROM servers ORDER BY id")
        # they alternate, and each turn serves many
        names = [row["model_id"] for row in loads]
        assert all(one != other for one, other in pairwise(names))
        assert 2 <= len(names) <= 13
        assert sum(counts) > 5 * len(names)


def test_what_was_used_much_stays_even_over_a_restart_of_the_manager(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name, 5) for name in ("often", "once", "new")}
    world = world_of(Card(gib=8), Card(gib=8))
    with gpu_machine(tmp_path, world, models) as (proxy, _), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: proxy.chat("often").status_code, range(200)))
        assert answers == [200] * 200
        assert proxy.chat("once").status_code == 200

        def counted() -> dict[str, int]:
            rows = proxy.rows("SELECT model_id, requests, tokens FROM uses WHERE tokens > 0")
            return {row["model_id"]: round(row["requests"]) for row in rows}

        wait_until(lambda: counted().keys() == {"often", "once"}, what="uses counted")
        assert counted()["often"] > 150
        assert counted()["once"] <= 1
        os.kill(proxy.manager_pid(), signal.SIGKILL)
        # the one used last goes, for it was used but once: its silence soon weighs more
        wait_until(
            lambda: [victim["model"] for victim in plan(proxy, "new")["evictions"]] == ["once"],
            what="the rarely used one would go",
        )
        assert proxy.chat("new").status_code == 200
        assert proxy.states() == {"often": "ready", "once": "stopped", "new": "ready"}


def test_a_request_that_nginx_carries_keeps_its_model(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name, 5) for name in ("old", "new")}
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models, queue_timeout=2) as (proxy, _):
        assert proxy.chat("old").status_code == 200
        (row,) = proxy.rows("SELECT port, api_key FROM servers")
        # as nginx does: straight to the server, without a lease
        with requests.post(
            f"http://127.0.0.1:{row['port']}/v1/chat/completions",
            headers={"Authorization": f"Bearer {row['api_key']}"},
            json={"messages": [], "stream": True, "max_tokens": 200, "fake": {"token_s": 0.02}},
            stream=True,
            timeout=60,
        ) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert next(lines).startswith(b"data:")
            answer = proxy.chat("new")
            assert answer.json()["error"]["code"] == "gpu_memory_busy"
            assert list(lines)[-1] == b"data: [DONE]"
        assert proxy.states() == {"old": "ready"}
        assert proxy.chat("new").status_code == 200


def test_an_event_tells_how_long_its_decision_took(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name, 5) for name in ("old", "new")}
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _):
        for name in models:
            assert proxy.chat(name).status_code == 200
        rows = proxy.rows("SELECT message, data FROM events WHERE data LIKE '%decision_ms%'")
        decided = {row["message"].split(" model=")[0]: json.loads(row["data"]) for row in rows}
        assert decided.keys() == {
            "server 1 starting",
            "server 1 ready->draining",
            "server 2 starting",
        }
        assert all(0 < data["decision_ms"] < 1000 for data in decided.values())
        (row,) = proxy.rows("SELECT decision_s FROM manager")
        assert row["decision_s"] * 1000 == pytest.approx(
            decided["server 2 starting"]["decision_ms"], abs=0.001
        )


def test_a_vulkan_build_is_pinned_by_device_names(tmp_path: Path) -> None:
    models = {"m": model(tmp_path, "m", 12), "wide": model(tmp_path, "wide", 26)}
    world = replace(world_of(Card(gib=8), Card(gib=24)), backend="Vulkan")
    with gpu_machine(tmp_path, world, models) as (proxy, file):
        assert proxy.chat("m").status_code == 200
        assert started(proxy, "m").flag("--device") == "Vulkan1"
        assert file.free_bytes()[uuid(0)] == 8 * GIB
        assert proxy.chat("wide").status_code == 200
        assert started(proxy, "wide").flag("--device") == "Vulkan1,Vulkan0"


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
            requests.post(f"{proxy.url}/api/models/{name}/unload", timeout=60).raise_for_status()
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


def test_ten_models_on_four_cards_under_a_mixed_load_never_oversubscribe(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7, "g": 10, "h": 13, "i": 20, "j": 28}
    models = {
        name: model(tmp_path, name, gib, load_s=0.2, gpu_steps=4, free_lag_s=0.3)
        for name, gib in sizes.items()
    }
    cards = (Card(gib=8), Card(gib=8, used_gib=1), Card(gib=16), Card(gib=24))
    pool = {"size": 8, "port_start": free_port()}
    chooser = random.Random(5)
    wanted = [chooser.choice("aaabbbcccddeeffgghhij") for _ in range(80)]
    with (
        gpu_machine(tmp_path, world_of(*cards), models, server_pool=pool) as (proxy, world),
        ThreadPoolExecutor(9) as threads,
    ):
        done = threading.Event()
        watching = threads.submit(oversubscribed, proxy, world, done)
        answers = list(threads.map(lambda name: proxy.chat(name, max_tokens=2), wanted))
        done.set()
        looks, wrong = watching.result()
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        assert wrong == []
        assert looks > 50
        assert proxy.rows("SELECT 1 FROM events WHERE message LIKE '%ran out of GPU memory%'") == []
        loaded = {row["model_id"] for row in proxy.rows("SELECT model_id FROM servers")}
        assert loaded == set(wanted)
        both = proxy.rows(
            "SELECT server_id FROM assignments GROUP BY server_id HAVING count(*) > 1"
        )
        assert both  # the largest has to be divided


def oversubscribed(proxy: Proxy, world: WorldFile, done: threading.Event) -> tuple[int, list[str]]:
    """Look until done: return how often, and where more was promised or held than there is."""
    looks, wrong = 0, []
    while not done.wait(0.01):
        looks += 1
        promised = {
            row["gpu_uuid"]: row["bytes"]
            for row in proxy.rows(
                "SELECT gpu_uuid, sum(reserved_bytes) AS bytes FROM assignments JOIN servers ON"
                " servers.id = server_id WHERE state IN ('starting', 'ready', 'draining',"
                " 'stopping') GROUP BY gpu_uuid"
            )
        }
        free = world.free_bytes()
        for card in world.world.gpus:
            held = card.total_bytes - card.used_bytes - free[card.uuid]
            room = card.total_bytes - card.used_bytes - 256 * MIB
            if promised.get(card.uuid, 0) > room or held > room:
                wrong.append(f"{card.uuid}: {promised.get(card.uuid)} and {held} of {room}")
    return looks, wrong
