"""What monitoring sees: text tables, the queue, fresh answers when nothing else is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from typing import Any

import pytest
import requests

from smartproxy.proxy.pages import tables
from tests.support.running import Proxy, fake_model, running, wait_until

TEXT = {"Accept": "text/plain"}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    models = {"ready": fake_model(), "slow": fake_model(silent_load=1)}
    folder = tmp_path_factory.mktemp("monitoring")
    with running(folder, models, load_stall_timeout=300) as proxy:
        assert proxy.chat("ready").status_code == 200
        yield proxy


def status(proxy: Proxy) -> dict[str, Any]:
    body: dict[str, Any] = requests.get(f"{proxy.url}/status").json()
    return body


def waiting(proxy: Proxy, path: str, body: str) -> Any:
    """Return an open connection whose request waits for a model that never comes."""
    connection = HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    return closing(connection)


def test_status_joins_what_a_server_takes_and_does(proxy: Proxy) -> None:
    wait_until(lambda: _server(proxy)["slots_total"], what="it was asked for its slots")
    server = _server(proxy)
    assert server["state"] == "ready"
    assert server["load_time"] > 0
    assert server["context_size"] == 8192
    assert (server["slots_busy"], server["requests_in_flight"]) == (0, 0)
    assert server["memory"]["host_estimated"] > 0
    assert server["memory"]["gpus"] == []


def _server(proxy: Proxy) -> dict[str, Any]:
    (server,) = (s for s in status(proxy)["servers"] if s["model_id"] == "ready")
    return server


def test_status_counts_requests_in_flight_and_tokens(proxy: Proxy) -> None:
    stream = proxy.chat("ready", stream=True, max_tokens=100_000, fake={"token_s": 0.01})
    wait_until(lambda: _server(proxy)["requests_in_flight"] == 1, what="the stream is counted")
    wait_until(lambda: _server(proxy)["slots_busy"] == 1, what="its slot is busy")
    wait_until(lambda: _server(proxy)["tokens_per_second"] > 1, what="tokens flow")
    stream.close()
    wait_until(lambda: _server(proxy)["requests_in_flight"] == 0, what="it is over")


def test_status_shows_who_waits_for_what(proxy: Proxy) -> None:
    body = '{"model": "slow"}'
    with waiting(proxy, "/v1/completions", body), waiting(proxy, "/v1/completions", body):
        wait_until(lambda: _queue(proxy) == [("slow", 2, "starting")], what="both are in the queue")
        assert "slow" in requests.get(f"{proxy.url}/status", headers=TEXT).text.split("waits")[1]
    wait_until(lambda: _queue(proxy) == [], what="nobody waits")


def _queue(proxy: Proxy) -> list[tuple[str, int, str]]:
    return [(q["model_id"], q["requests"], q["state"]) for q in status(proxy)["queue"]]


@pytest.mark.parametrize("path", ["/health", "/status"])
def test_tables_for_a_terminal(proxy: Proxy, path: str) -> None:
    answer = requests.get(f"{proxy.url}{path}", headers=TEXT)
    assert answer.headers["Content-Type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert lines[0].startswith("status ok, mode cpu")
    assert any(line.split()[1:3] == ["ready", "ready"] for line in lines)
    assert "no GPUs" in lines


def test_json_is_what_everybody_else_gets(proxy: Proxy) -> None:
    for accept in ("*/*", "text/html,*/*;q=0.8", "application/json"):
        answer = requests.get(f"{proxy.url}/health", headers={"Accept": accept})
        assert answer.json()["status"] == "ok", accept


def test_health_is_answered_while_every_thread_waits_for_a_load(proxy: Proxy) -> None:
    with ExitStack() as open_requests:
        for _ in range(64):
            open_requests.enter_context(waiting(proxy, "/api/models/slow/load", ""))
        asked = "SELECT count(*) AS n FROM demands WHERE explicit"
        wait_until(lambda: proxy.rows(asked)[0]["n"] >= 16, what="every thread is taken")
        for _ in range(20):
            assert requests.get(f"{proxy.url}/health", timeout=5).status_code == 200
        proxy.stop()


# --- tables --------------------------------------------------------------------------------------


def test_status_table_shows_gpus_and_whose_processes_they_have() -> None:
    body: dict[str, Any] = {
        **{"status": "degraded", "mode": "gpu", "reasons": ["gpu 1: lost"], "observed_age": 1.25},
        "servers": [],
        "queue": [],
        "gpus": [
            {
                **{"id": 0, "name": "NVIDIA L4", "state": "assigned", "utilization": 42.0},
                **{"used_memory": 20.0, "total_memory": 24.0, "reserved_memory": 18.5},
                **{"temperature": None, "power_usage": 71.26, "assigned_models": ["a", "b"]},
                "processes": [
                    {"pid": 7, "name": "llama-server", "used_memory": 18.0}
                    | {"ours": True, "model_id": "a"},
                    {"pid": 8, "name": None, "used_memory": None}
                    | {"ours": False, "model_id": None},
                ],
            }
        ],
    }
    lines = [line.split() for line in tables.status(body).splitlines()]
    assert lines[0] == ["status", "degraded,", "mode", "gpu,", "GPUs", "seen", "1.2", "s", "ago"]
    assert lines[1] == ["gpu", "1:", "lost"]
    gpu = "0 NVIDIA L4 assigned 20.0/24.0 18.50 42 - 71.3 a, b"
    assert gpu.split() in lines
    assert ["0", "7", "llama-server", "18.00", "a"] in lines
    assert ["0", "8", "-", "-", "(other's)"] in lines
