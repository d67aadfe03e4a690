"""GPU memory that comes back late, is taken by others, or was estimated too low: end to end."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.support.gpu_running import GIB, Card, gpu_machine, model, started, uuid, world_of
from tests.support.running import Proxy, wait_until


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
        assert proxy.chat("m").status_code == 200
        # it fitted beside the idle one, died, and then had it make room
        assert proxy.states() == {"idle": "stopped", "m": "ready"}
        dead, alive = proxy.rows("SELECT * FROM servers WHERE model_id = 'm' ORDER BY id")
        assert "its need is raised by 0.4 GB a GPU; it is tried once more" in dead["reason"]
        assert alive["estimated_bytes"] > dead["estimated_bytes"] + 0.3 * GIB


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
