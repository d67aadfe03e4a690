"""Estimated against measured, end to end: over stand-ins."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_running import GIB, MIB, Card, gpu_machine, model, uuid, world_of
from tests.support.running import Proxy, wait_until

#: what the log rounds away, of three lines
ROUNDING = 0.02 * MIB
#: a prompt that fills a micro-batch
LONG_PROMPT = "word " * 600


def load(proxy: Proxy, model_id: str) -> dict[str, Any]:
    """Load a model and return its server's row once the GPUs were looked at since."""
    assert proxy.chat(model_id).status_code == 200

    def row() -> dict[str, Any] | None:
        rows = server_rows(proxy, model_id)
        return rows[-1] if rows and rows[-1]["measured_bytes"] else None

    return wait_until(row, what=f"{model_id} measured")


def unload(proxy: Proxy, model_id: str) -> None:
    answer = proxy.post(f"/api/models/{model_id}/unload", timeout_s=60)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: proxy.states()[model_id] == "stopped", what=f"{model_id} stopped")


def server_rows(proxy: Proxy, model_id: str) -> list[dict[str, Any]]:
    return proxy.rows(f"SELECT * FROM servers WHERE model_id = '{model_id}' ORDER BY id")


def assignments(proxy: Proxy, server_id: int) -> list[dict[str, Any]]:
    return proxy.rows(f"SELECT * FROM assignments WHERE server_id = {server_id} ORDER BY gpu_index")


def overhead(proxy: Proxy, place: int = 0) -> dict[str, Any] | None:
    rows = proxy.rows(f"SELECT * FROM overheads WHERE gpu_uuid = '{uuid(place)}'")
    return rows[0] if rows else None


def prompt(proxy: Proxy, model_id: str) -> None:
    """Have a server work through a whole micro-batch."""
    message = {"role": "user", "content": LONG_PROMPT}
    assert proxy.chat(model_id, messages=[message]).status_code == 200


def test_a_second_load_is_estimated_at_what_the_first_was_measured_to_take(
    tmp_path: Path,
) -> None:
    taken = 3 * GIB - 200 * MIB
    models = {"m": model(tmp_path, "m", 3, gpu_bytes=taken)}
    with gpu_machine(tmp_path, world_of(Card(gib=24)), models) as (proxy, _):
        first = load(proxy, "m")
        (promised,) = assignments(proxy, first["id"])
        assert first["measured_bytes"] == promised["measured_bytes"] == taken
        assert first["estimated_bytes"] > taken
        # until prompts have made its pools grow, all of the estimate stays withheld
        assert promised["reserved_bytes"] == first["estimated_bytes"]
        row, host = proxy.rows("SELECT * FROM measurements ORDER BY device_index DESC")
        assert (row["device"], host["device"]) == (uuid(0), "host")
        assert row["process_bytes"] == taken
        assert row["buffers_bytes"] == pytest.approx(taken - 256 * MIB, abs=ROUNDING)
        assert row["estimated_bytes"] == row["predicted_bytes"] + row["overhead_bytes"]
        assert host["process_bytes"] > MIB
        most = row["buffers_bytes"] + ROUNDING + 1
        wait_until(
            lambda: proxy.rows("SELECT * FROM models")[0]["estimated_bytes"] <= most,
            what="the catalogue's estimate",
        )

        unload(proxy, "m")
        second = load(proxy, "m")
        again = row["buffers_bytes"] + row["overhead_bytes"]
        assert again <= second["estimated_bytes"] <= again + ROUNDING + 1
        assert second["estimated_bytes"] < first["estimated_bytes"]


def test_an_under_estimate_is_an_error_and_raises_every_estimate_of_the_file_at_once(
    tmp_path: Path,
) -> None:
    taken = 5 * GIB
    config = model(tmp_path, "m", 3, gpu_bytes=taken)
    with gpu_machine(tmp_path, world_of(Card(gib=24)), {"m": config}) as (proxy, _):
        first = load(proxy, "m")
        assert first["estimated_bytes"] < taken
        wait_until(lambda: assignments(proxy, first["id"])[0]["reserved_bytes"] >= taken)
        told = proxy.rows("SELECT * FROM events WHERE kind = 'estimate'")
        assert any("its next estimate is raised" in event["message"] for event in told)
        errors = [line for line in proxy.log().splitlines() if "ERROR" in line]
        assert any("were estimated" in line for line in errors), proxy.log()

        (row,) = proxy.rows("SELECT * FROM measurements WHERE device != 'host'")
        missing = row["buffers_bytes"] - row["predicted_bytes"]
        assert missing > GIB
        # it outlives the manager, and holds for settings that were never loaded
        proxy.stop()
        settings = json.loads(proxy.config_path.read_text())
        settings["models"]["m"]["parallel"] = 2
        settings["ctx_size"] = 4096
        proxy.config_path.write_text(json.dumps(settings))
        proxy.start()
        other = load(proxy, "m")
        (part,) = proxy.rows(
            f"SELECT * FROM measurements WHERE server_id = {other['id']} AND device != 'host'"
        )
        raised = part["estimated_bytes"] - part["overhead_bytes"] - part["predicted_bytes"]
        assert missing <= raised <= missing + ROUNDING
        assert part["settings_key"] != row["settings_key"]


def test_overhead_is_learned_per_gpu_and_lowers_what_other_models_are_charged(
    tmp_path: Path,
) -> None:
    models = {
        "a": model(tmp_path, "a", 3, gpu_overhead_bytes=100 * MIB),
        "b": model(tmp_path, "b", 4, gpu_overhead_bytes=100 * MIB),
    }
    with gpu_machine(tmp_path, world_of(Card(gib=24)), models) as (proxy, _):
        first = load(proxy, "a")
        cold = wait_until(lambda: overhead(proxy), what="overhead")
        assert cold["overhead_bytes"] == pytest.approx(100 * MIB, abs=2 * ROUNDING)
        assert not cold["warm"]
        prompt(proxy, "a")
        wait_until(lambda: overhead(proxy)["warm"], what="overhead after a prompt")  # type: ignore[index]
        # its pools are as big as they get: nothing more is withheld than it has
        wait_until(
            lambda: assignments(proxy, first["id"])[0]["reserved_bytes"] == first["measured_bytes"]
        )
        (gpu,) = proxy.rows("SELECT * FROM gpus")
        assert gpu["overhead_bytes"] == overhead(proxy)["overhead_bytes"]  # type: ignore[index]

        second = load(proxy, "b")
        (part,) = proxy.rows(
            f"SELECT * FROM measurements WHERE server_id = {second['id']} AND device != 'host'"
        )
        assert part["overhead_bytes"] == gpu["overhead_bytes"]


def test_pools_that_grow_with_prompts_are_seen_and_kept_across_a_managers_death(
    tmp_path: Path,
) -> None:
    models = {"m": model(tmp_path, "m", 3, gpu_pool_bytes=700 * MIB)}
    with gpu_machine(tmp_path, world_of(Card(gib=24)), models) as (proxy, _):
        row = load(proxy, "m")
        before = proxy.manager_pid()
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: proxy.manager_pid() not in (None, before), what="next manager")
        prompt(proxy, "m")

        def grown() -> dict[str, Any] | None:
            known = overhead(proxy)
            return known if known and known["overhead_bytes"] > 900 * MIB else None

        assert wait_until(grown, what="growth")["overhead_bytes"] == pytest.approx(
            956 * MIB, abs=2 * ROUNDING
        )
        (part,) = assignments(proxy, row["id"])
        assert part["measured_bytes"] == server_rows(proxy, "m")[-1]["measured_bytes"]
        assert part["reserved_bytes"] >= part["measured_bytes"]


def test_each_gpu_of_a_split_learns_its_own_part(tmp_path: Path) -> None:
    shares = (7 * GIB, 5 * GIB)
    models = {"m": model(tmp_path, "m", 12, gpu_bytes=f"{shares[0]}/{shares[1]}")}
    with gpu_machine(tmp_path, world_of(Card(gib=10), Card(gib=8)), models) as (proxy, _):
        first = load(proxy, "m")
        assert first["measured_bytes"] == sum(shares)
        by_gpu = [part["measured_bytes"] for part in assignments(proxy, first["id"])]
        rows = proxy.rows(
            "SELECT * FROM measurements WHERE device_index >= 0 ORDER BY device_index"
        )
        # the server's first device is the GPU that was named first
        assert [row["process_bytes"] for row in rows] == list(shares)
        assert sorted(by_gpu) == sorted(shares)
        unload(proxy, "m")
        second = load(proxy, "m")
        again = proxy.rows(
            f"SELECT * FROM measurements WHERE server_id = {second['id']} AND device_index >= 0"
            " ORDER BY device_index"
        )
        for one, other in zip(rows, again, strict=True):
            assert one["layout"] == other["layout"]
            expected = one["buffers_bytes"] + other["overhead_bytes"]
            assert expected <= other["estimated_bytes"] <= expected + ROUNDING + 1


def test_a_persons_estimate_is_taken_and_raised_only_by_a_server_that_took_more(
    tmp_path: Path,
) -> None:
    models = {
        "less": model(tmp_path, "less", 3, config={"estimated_vram": 6.0}),
        "more": model(tmp_path, "more", 3, gpu_bytes=5 * GIB, config={"estimated_vram": 2.0}),
    }
    with gpu_machine(tmp_path, world_of(Card(gib=40)), models) as (proxy, _):
        for name in models:
            load(proxy, name)
            unload(proxy, name)
            load(proxy, name)
        (first, second), (low, raised) = (server_rows(proxy, name) for name in ("less", "more"))
        assert first["estimated_bytes"] == second["estimated_bytes"] >= 6 * GIB
        assert 2 * GIB <= low["estimated_bytes"] < 3 * GIB
        assert raised["estimated_bytes"] >= 5 * GIB
