"""docs/openapi.yaml against the proxy: real answers are as described, to generated requests too."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import build, environment
from tests.support.fakes.world import FakeProcess, WorldFile
from tests.support.openapi import DOCUMENT, validate
from tests.support.running import Proxy, fake_model, running, wait_until

CHECKS = [
    *(not_a_server_error, status_code_conformance),
    *(content_type_conformance, response_schema_conformance),
]
#: every operation but relayed ones, whose answers are llama-server's
#: and but these two, which change what all the others find (test_pause.py has them)
OURS = (
    schemathesis.openapi.from_dict(DOCUMENT)
    .exclude(tag="relay")
    .exclude(operation_id=["pause", "resume"])
)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with a loaded model, one that failed, one that loads for ever, and a broken GPU."""
    folder = tmp_path_factory.mktemp("openapi")
    world = WorldFile(folder / "world", nvml.unequal_pair())
    stranger = FakeProcess(pid=1, used_bytes=None)
    world.change_gpu(world.world.gpus[0].uuid, processes=(stranger,))
    models = {
        "user/loaded.model": fake_model(gpu_bytes=1 << 20),
        "failed": fake_model(fail_load="oom"),
        "loading": fake_model(silent_load=1),
    }
    env = environment(build(folder), world)
    with running(folder, models, env=env, load_stall_timeout=300) as proxy:
        assert proxy.chat("user/loaded.model").status_code == 200
        assert proxy.chat("failed").status_code == 503
        world.change_gpu(world.world.gpus[1].uuid, lost=True)
        waiting = HTTPConnection("127.0.0.1", proxy.port)
        waiting.request("POST", "/v1/completions", '{"model": "loading"}')
        wait_until(lambda: proxy.states().get("loading") == "starting", what="a load")
        wait_until(lambda: any(g["error"] for g in gpus_of(proxy)), what="a GPU in error")
        yield proxy
        waiting.close()


def gpus_of(proxy: Proxy) -> list[dict[str, Any]]:
    gpus: list[dict[str, Any]] = proxy.health()["gpu_pool_status"]["gpu_list"]
    return gpus


def test_health_in_trouble_is_as_described(proxy: Proxy) -> None:
    body = proxy.health()
    validate(body, "Health")
    assert {s["state"] for s in body["servers"]} == {"ready", "failed", "starting"}
    assert {g["state"] for g in gpus_of(proxy)} == {"assigned", "error"}


def test_status_in_trouble_is_as_described(proxy: Proxy) -> None:
    wait_until(lambda: requests.get(f"{proxy.url}/status").json()["queue"], what="a queue")
    body = requests.get(f"{proxy.url}/status").json()
    validate(body, "Status")
    assert [(q["model_id"], q["state"]) for q in body["queue"]] == [("loading", "starting")]


def test_errors_are_as_described(proxy: Proxy) -> None:
    for answer in (
        proxy.chat("nobody"),
        requests.post(f"{proxy.url}/v1/chat/completions", data=b"{"),
        requests.get(f"{proxy.url}/no/such/route"),
        proxy.chat("failed"),
    ):
        validate(answer.json(), "Error")


@OURS.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_generated_requests_are_as_described(
    proxy: Proxy, case: schemathesis.Case
) -> None:
    case.call_and_validate(base_url=proxy.url, checks=CHECKS, timeout=30)


@pytest.mark.parametrize("path", ["/v1/models/", "/models/"])
def test_an_id_with_slashes_is_found(proxy: Proxy, path: str) -> None:
    answer = requests.get(f"{proxy.url}{path}user/loaded.model")
    validate(answer.json(), "ListedModel")
    assert answer.json()["status"] == "ready"


def test_load_and_unload_are_as_described(proxy: Proxy) -> None:
    for verb, status in (("unload", "unloaded"), ("load", "ready")):
        answer = proxy.post(f"/api/models/user/loaded.model/{verb}", timeout_s=30)
        validate(answer.json(), "ListedModel")
        assert answer.json()["status"] == status


@pytest.mark.parametrize("model", ["user/loaded.model", "failed"])
def test_plans_are_as_described(proxy: Proxy, model: str) -> None:
    answer = requests.get(f"{proxy.url}/api/models/{model}/plan", timeout=30)
    validate(answer.json(), "Plan")
