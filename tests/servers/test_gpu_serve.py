"""GPUs from their first look to their loss: the whole product over the stand-in NVML."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import NAME, environment
from tests.support.fakes.world import GIB, FakeGpu, FakeMig, FakeProcess, Fault, World, WorldFile
from tests.support.running import Proxy, fake_model, running, wait_until

BIG, SMALL = "GPU-11111111-aaaa", "GPU-22222222-bbbb"
MODEL = fake_model(gpu_bytes=GIB // 2)
Start = Callable[..., AbstractContextManager[Proxy]]


@pytest.fixture
def start(tmp_path: Path, library: Path, world: WorldFile) -> Start:
    def started(models: dict[str, Any] | None = None, **settings: Any) -> Any:
        options: dict[str, Any] = {"gpu_poll_interval": 0.2, "min_residency": 0, **settings}
        env = options.pop("env", environment(library, world))
        return running(tmp_path, models or {"m": MODEL}, env=env, **options)

    return started


def gpus(proxy: Proxy) -> dict[str, dict[str, Any]]:
    return {gpu["uuid"]: gpu for gpu in proxy.health()["gpu_pool_status"]["gpu_list"]}


def wait_gpu(proxy: Proxy, uuid: str, state: str) -> None:
    wait_until(lambda: gpus(proxy).get(uuid, {}).get("state") == state, what=f"{uuid} {state}")


def placed_on(proxy: Proxy, model: str) -> list[str] | None:
    """Return the uuids of the GPUs that a model's live server is on; [] is the CPU.

    None: it has no server in this moment.
    """
    for server in proxy.health()["servers"]:
        if server["model_id"] == model:
            uuids: list[str] = (server["gpu_assignment"] or {"gpu_uuids": []})["gpu_uuids"]
            return uuids
    return None


def events(proxy: Proxy, like: str) -> list[str]:
    rows = proxy.rows(f"SELECT message FROM events WHERE message LIKE '{like}' ORDER BY id")
    return [row["message"] for row in rows]


def warnings(proxy: Proxy) -> list[str]:
    """Return the log's warnings, but for those of the stand-in: on the CPU it prints no buffers."""
    lines = [line for line in proxy.log().splitlines() if " WARNING " in line]
    return [line for line in lines if "its log tells no buffers" not in line]


# --- healthy -------------------------------------------------------------------------------------


def test_two_unequal_cards_are_shown_and_filled(start: Start, world: WorldFile) -> None:
    world.change_gpu(SMALL, temperature_c=71, power_w=123.5, utilization=9)
    with start() as proxy:
        assert proxy.chat("m").status_code == 200
        # a look in the middle of the load shows less
        wait_until(
            lambda: [p["used_memory"] for p in gpus(proxy)[BIG]["processes"]] == [0.5],
            what="its process is seen with all it has",
        )
        health = proxy.health()
        pool = health["gpu_pool_status"]
        assert (health["mode"], health["status"]) == ("gpu", "ok")
        assert (pool["total_gpus"], pool["available_gpus"], pool["total_vram"]) == (2, 1, 32.0)
        assert pool["available_vram"] == pool["free_memory"] == 31.5
        big, small = pool["gpu_list"]
        assert (big["id"], big["state"], big["assigned_models"]) == (0, "assigned", ["m"])
        assert big["used_memory"] == 0.5
        assert (small["temperature"], small["power_usage"], small["utilization"]) == (71, 123.5, 9)
        assert events(proxy, "gpu 0 available->assigned%") == [
            "gpu 0 available->assigned: model 'm' is placed on it"
        ]


def test_the_inventory_names_cards_slices_and_driver(start: Start, world: WorldFile) -> None:
    cards = [
        FakeGpu(uuid=f"GPU-{n}", pci_bus_id=f"00000000:{n + 1:02X}:00.0", total_bytes=80 * GIB)
        for n in range(8)
    ]
    slices = (FakeMig(uuid="MIG-a", total_bytes=40 * GIB),)
    world.write(World(gpus=(*cards[:7], replace(cards[7], migs=slices))))
    with start() as proxy:
        wait_until(lambda: len(gpus(proxy)) == 8, what="all eight")
        pool = proxy.health()["gpu_pool_status"]
        assert pool["driver_version"] == "580.95.05"
        assert [gpu["id"] for gpu in pool["gpu_list"][:7]] == list(range(7))
        assert [gpu["pci_bus_id"] for gpu in pool["gpu_list"]] == [c.pci_bus_id for c in cards]
        assert [gpu["mig"] for gpu in pool["gpu_list"]] == [False] * 7 + [True]
        assert pool["gpu_list"][7]["total_memory"] == 40
        assert pool["gpu_list"][0]["compute_capability"] == "8.9"


def test_an_unloaded_model_leaves_its_gpu_available(start: Start) -> None:
    with start() as proxy:
        assert proxy.chat("m").status_code == 200
        proxy.post("/api/models/m/unload", timeout_s=30).raise_for_status()
        assert gpus(proxy)[BIG]["state"] == "available"
        assert events(proxy, "gpu 0 assigned->%") == [
            "gpu 0 assigned->available: model 'm' is gone"
        ]


def test_status_tells_our_processes_from_others(start: Start, world: WorldFile) -> None:
    world.change_gpu(BIG, processes=(FakeProcess(pid=os.getpid(), used_bytes=GIB),))
    with start() as proxy:
        assert proxy.chat("m").status_code == 200

        def processes() -> list[dict[str, Any]]:
            seen: list[dict[str, Any]] = requests.get(f"{proxy.url}/status").json()["gpus"]
            return seen[0]["processes"]

        wait_until(
            lambda: {p["ours"]: p["used_memory"] for p in processes()} == {False: 1.0, True: 0.5},
            what="both processes with all they have",
        )
        by_owner = {process["ours"]: process for process in processes()}
        assert by_owner[True]["model_id"] == "m"
        assert by_owner[False]["pid"] == os.getpid()


def test_a_health_check_asks_for_a_fresh_look(start: Start, world: WorldFile) -> None:
    with start(gpu_poll_interval=300) as proxy:
        wait_until(lambda: gpus(proxy), what="the first look")
        world.change_gpu(SMALL, used_bytes=3 * GIB)
        wait_until(lambda: gpus(proxy)[SMALL]["used_memory"] == 3, what="a look before its time")


def test_a_card_without_power_reading_lacks_only_that(start: Start, world: WorldFile) -> None:
    world.change(faults=(Fault(function="nvmlDeviceGetPowerUsage", code=nvml.NOT_SUPPORTED),))
    with start() as proxy:
        assert proxy.chat("m").status_code == 200
        assert [gpu["power_usage"] for gpu in gpus(proxy).values()] == [None, None]
        assert placed_on(proxy, "m") == [BIG]
        metrics = requests.get(f"{proxy.url}/metrics").text
        assert "smartproxy_gpu_temperature_celsius{" in metrics
        assert "smartproxy_gpu_power_watts{" not in metrics


# --- failing -------------------------------------------------------------------------------------


def test_a_lost_card_takes_its_server_and_the_next_request_goes_elsewhere(
    start: Start, world: WorldFile
) -> None:
    with start({"m": MODEL, "n": {**MODEL, "gpus": [1]}}) as proxy:
        assert proxy.chat("m").status_code == 200
        assert proxy.chat("n").status_code == 200
        world.change_gpu(BIG, lost=True)
        wait_until(lambda: proxy.states()["m"] == "stopped", what="its server is stopped")
        health = proxy.health()
        assert health["status"] == "degraded"
        assert any(reason.startswith("gpu 0: ") for reason in health["reasons"])
        assert proxy.states()["n"] == "ready"
        assert proxy.chat("m").status_code == 200
        assert placed_on(proxy, "m") == [SMALL]
        (lost,) = events(proxy, "gpu 0 %->error%")
        assert "lost" in lost.lower()
        (stopped,) = events(proxy, "server 1 ready->draining%")
        assert "gpu 0 failed" in stopped


def test_a_request_on_a_lost_card_is_answered_by_another(
    start: Start, world: WorldFile, tmp_path: Path
) -> None:
    model = fake_model(gpu_bytes=GIB // 2, hang_on_request=1, once=tmp_path / "hung")
    with start({"m": model}) as proxy, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(proxy.chat, "m")
        wait_until((tmp_path / "hung").exists, what="a request that gets no byte of an answer")
        world.change_gpu(BIG, lost=True)
        assert asked.result().status_code == 200
        assert placed_on(proxy, "m") == [SMALL]


def test_a_lost_card_that_returns_is_used_again(start: Start, world: WorldFile) -> None:
    with start({"m": {**MODEL, "gpus": [0]}}) as proxy:
        assert proxy.chat("m").status_code == 200
        world.change_gpu(BIG, lost=True)
        wait_gpu(proxy, BIG, "error")
        world.change_gpu(BIG, lost=False)
        wait_gpu(proxy, BIG, "available")
        assert proxy.chat("m").status_code == 200
        assert placed_on(proxy, "m") == [BIG]
        assert events(proxy, "gpu 0 error->%") == ["gpu 0 error->available: it answers again"]
        assert proxy.health()["status"] == "ok"
    # it took a new session to see it again; each was closed, the last with the manager
    assert re.fullmatch(r"(\+-){2,}", world.sessions())


def test_a_server_on_a_card_that_cannot_be_read_finishes_its_requests(
    start: Start, world: WorldFile
) -> None:
    with start() as proxy:
        stream = proxy.chat("m", stream=True, max_tokens=250, fake={"token_s": 0.03})
        lines = stream.iter_lines()
        assert next(line for line in lines if line).startswith(b"data:")
        fault = Fault(function="nvmlDeviceGetMemoryInfo_v2", code=nvml.UNKNOWN, uuid=BIG)
        world.change(faults=(fault,))
        wait_gpu(proxy, BIG, "error")
        assert proxy.states()["m"] == "ready"
        wait_until(lambda: proxy.states()["m"] == "draining", what="it is drained")
        assert [line for line in lines if line][-1] == b"data: [DONE]"
        wait_until(lambda: proxy.states()["m"] == "stopped", what="its server is stopped")
        assert proxy.chat("m").status_code == 200
        assert placed_on(proxy, "m") == [SMALL]


def test_a_card_with_one_bad_moment_keeps_its_server(start: Start, world: WorldFile) -> None:
    with start() as proxy:
        assert proxy.chat("m").status_code == 200
        fault = Fault(function="nvmlDeviceGetMemoryInfo_v2", code=nvml.TIMEOUT, uuid=BIG)
        world.change(faults=(fault,))
        wait_gpu(proxy, BIG, "error")
        world.change(faults=())
        wait_gpu(proxy, BIG, "assigned")
        assert proxy.states() == {"m": "ready"}
        assert events(proxy, "server 1 ready->%") == []


def test_without_any_card_left_cpu_fallback_is_used_until_one_returns(
    start: Start, world: WorldFile
) -> None:
    world.write(World(gpus=world.world.gpus[:1]))
    with start(cpu_fallback=True) as proxy:
        assert proxy.chat("m").status_code == 200
        world.change_gpu(BIG, lost=True)
        wait_until(lambda: proxy.states()["m"] == "stopped", what="its server is stopped")
        assert proxy.chat("m").status_code == 200
        assert placed_on(proxy, "m") == []
        world.change_gpu(BIG, lost=False)
        wait_until(lambda: proxy.states()["m"] == "ready" and placed_on(proxy, "m") == [BIG])


# --- without NVML --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        nvml.DRIVER_NOT_LOADED,
        nvml.LIBRARY_NOT_FOUND,
        nvml.NO_PERMISSION,
        nvml.LIB_RM_VERSION_MISMATCH,
        nvml.UNKNOWN,
    ],
)
def test_where_nvml_cannot_be_used_everything_runs_on_the_cpu(
    start: Start, world: WorldFile, code: int
) -> None:
    world.change(init_code=code)
    with start() as proxy:
        assert_cpu_mode(proxy)
        assert proxy.health()["mode_reason"].startswith("NVML can't be used: ")


def test_without_the_library_everything_runs_on_the_cpu(
    start: Start, tmp_path: Path, world: WorldFile
) -> None:
    with start(env=environment(tmp_path / "nowhere" / NAME, world)) as proxy:
        assert_cpu_mode(proxy)


def test_monitoring_can_be_switched_off(start: Start) -> None:
    with start(enable_gpu_monitoring=False) as proxy:
        assert_cpu_mode(proxy)
        pool = proxy.health()["gpu_pool_status"]
        assert pool["gpu_monitoring_enabled"] is False
        assert proxy.health()["mode_reason"] == "enable_gpu_monitoring is false"


def assert_cpu_mode(proxy: Proxy) -> None:
    """Everything works, on the CPU, with one warning and no error, however often it looks."""
    assert proxy.chat("m").status_code == 200
    assert placed_on(proxy, "m") == []
    looked_at = proxy.health()["observed_at"]
    wait_until(lambda: proxy.health()["observed_at"] > looked_at + 1, what="several more looks")
    health = proxy.health()
    pool = health["gpu_pool_status"]
    assert (health["mode"], health["status"]) == ("cpu", "ok")
    assert (pool["total_gpus"], pool["total_vram"], pool["gpu_list"]) == (0, 0, [])
    assert pool["gpu_available"] is False
    assert len(warnings(proxy)) == 1, warnings(proxy)
    assert "mode=cpu" in warnings(proxy)[0]
    assert " ERROR " not in proxy.log()


def test_a_driver_that_appears_later_takes_over_idle_models_from_the_cpu(
    start: Start, tmp_path: Path, library: Path, world: WorldFile
) -> None:
    later = tmp_path / "later" / NAME
    later.parent.mkdir()
    with start({"m": MODEL, "cpu": {**MODEL, "cpu": True}}, env=environment(later, world)) as proxy:
        assert proxy.chat("m").status_code == 200
        assert proxy.chat("cpu").status_code == 200
        assert proxy.health()["mode"] == "cpu"
        shutil.copy(library, later)
        wait_until(lambda: proxy.health()["mode"] == "gpu", what="the driver is noticed")
        wait_until(lambda: proxy.states()["m"] == "ready" and placed_on(proxy, "m") == [BIG])
        assert placed_on(proxy, "cpu") == []
        assert len(warnings(proxy)) == 1
        (moved,) = events(proxy, "server 1 ready->draining%")
        assert "for want of a GPU" in moved


# --- hanging -------------------------------------------------------------------------------------


def hang(proxy: Proxy, world: WorldFile, seconds: float) -> None:
    """Return once a look at the GPUs hangs; so does every one after it."""
    hanging = Fault(function="nvmlDeviceGetMemoryInfo_v2", hang_s=seconds, uuid=BIG)
    world.change(faults=(hanging,))
    wait_until(lambda: proxy.health()["observed_age"] > 1.0, what="a look that hangs")


def test_no_request_waits_for_an_nvml_that_hangs(start: Start, world: WorldFile) -> None:
    with start({"m": MODEL, "cpu": {**MODEL, "cpu": True}}) as proxy:
        assert proxy.chat("m").status_code == 200
        hang(proxy, world, 5)
        seen_at = proxy.health()["observed_at"]
        assert proxy.chat("m").status_code == 200
        assert proxy.chat("cpu").status_code == 200  # a load, too
        for path in ("/health", "/status", "/metrics"):
            assert requests.get(f"{proxy.url}{path}").status_code == 200
        health = proxy.health()
        assert health["observed_at"] == seen_at  # all of that happened within one look
        assert health["manager"]["alive"] is True


def test_an_nvml_that_hangs_does_not_hold_up_the_end(start: Start, world: WorldFile) -> None:
    with start() as proxy:
        assert proxy.chat("m").status_code == 200
        hang(proxy, world, 600)
        proxy.stop()
        assert proxy.process is not None
        assert proxy.process.returncode == 0
        assert "leaving without waiting for it" in proxy.log()
        assert "did not end within" not in proxy.log()
        assert proxy.llama_servers() == []
