"""Many models and requests on few GPUs, end to end: loads at once, swaps, who stays."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import requests

from tests.support.fakes.world import WorldFile
from tests.support.gpu_running import MIB, Card, gpu_machine, model, plan, world_of
from tests.support.ports import free_pool
from tests.support.running import Proxy, wait_until


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
        assert out_of_memory(proxy) == []


def out_of_memory(proxy: Proxy) -> list[str]:
    rows = proxy.rows("SELECT message FROM events WHERE message LIKE '%ran out of GPU memory%'")
    return [row["message"] for row in rows]


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
        waits = [message for message in decided if message.startswith("model 'new' waits ")]
        assert len(waits) == 1
        assert decided.keys() - {*waits} == {
            "server 1 starting",
            "server 1 ready->draining",
            "server 2 starting",
        }
        assert all(0 < data["decision_ms"] < 1000 for data in decided.values())
        (row,) = proxy.rows("SELECT decision_s FROM manager")
        assert row["decision_s"] * 1000 == pytest.approx(
            decided["server 2 starting"]["decision_ms"], abs=0.001
        )


def test_ten_models_on_four_cards_under_a_mixed_load_never_oversubscribe(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7, "g": 10, "h": 13, "i": 20, "j": 28}
    models = {
        name: model(tmp_path, name, gib, load_s=0.2, gpu_steps=4, free_lag_s=0.3)
        for name, gib in sizes.items()
    }
    cards = (Card(gib=8), Card(gib=8, used_gib=1), Card(gib=16), Card(gib=24))
    pool = {"size": 8, "port_start": free_pool(8)}
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
        assert looks > 5
        assert out_of_memory(proxy) == []
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
