"""docs/openapi.yaml against the proxy: real answers are as described, to generated requests too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from pydantic import BaseModel
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from smartproxy import errors
from smartproxy.config.load import load_settings
from smartproxy.entities import GPU, GPUAssignment, GPUPoolStatus, GPUProcess, Server
from smartproxy.proxy.app import create_app
from smartproxy.proxy.inference import INFERENCE_PATHS
from smartproxy.proxy.pages.monitoring import openapi_json
from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import build, environment
from tests.support.fakes.world import FakeProcess, WorldFile
from tests.support.paths import ROOT
from tests.support.running import Proxy, fake_model, running, wait_until

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (ROOT / "docs" / "openapi.yaml").read_text(encoding="utf-8")
)
CHECKS = [
    *(not_a_server_error, status_code_conformance),
    *(content_type_conformance, response_schema_conformance),
]
#: every operation but relayed ones, whose answers are llama-server's
OURS = schemathesis.openapi.from_dict(DOCUMENT).exclude(tag="relay")


def validate(body: object, schema: str) -> None:
    """Raise ValidationError unless the body is as a named schema says."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(body)


# --- the document itself ---------------------------------------------------------------------


def test_served_description_is_the_documented_one() -> None:
    assert yaml.safe_load(openapi_json()) == DOCUMENT


@pytest.mark.parametrize("entity", [GPU, GPUAssignment, GPUPoolStatus, GPUProcess, Server])
def test_entity_is_described_with_exactly_its_fields(entity: type[BaseModel]) -> None:
    described = DOCUMENT["components"]["schemas"][entity.__name__]["properties"]
    assert set(described) == {*entity.model_fields, *entity.model_computed_fields}


def test_every_route_of_ours_is_described(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"models": {}}')
    app = create_app(load_settings(config, environ={}))
    described = {re.sub(r"\{\w+\}", "*", path) for path in DOCUMENT["paths"]}
    for rule in app.url_map.iter_rules():
        if rule.endpoint.startswith("relay."):
            continue
        pattern = re.sub(r"<[^>]*>", "*", rule.rule)
        assert any(path == pattern or path.startswith(f"{pattern}/") for path in described), pattern


def test_every_inference_route_is_described() -> None:
    assert set(DOCUMENT["paths"]) >= INFERENCE_PATHS


def test_every_error_code_is_described() -> None:
    codes = {kind.code for kind in subclasses(errors.SmartProxyError)} - {"config_error"}
    described = DOCUMENT["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    assert set(described["code"]["enum"]) >= codes


def subclasses(kind: type[errors.SmartProxyError]) -> Iterator[type[errors.SmartProxyError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


# --- real answers ----------------------------------------------------------------------------


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


@pytest.mark.servers
def test_health_in_trouble_is_as_described(proxy: Proxy) -> None:
    body = proxy.health()
    validate(body, "Health")
    assert {s["state"] for s in body["servers"]} == {"ready", "failed", "starting"}
    assert {g["state"] for g in gpus_of(proxy)} == {"assigned", "error"}


@pytest.mark.servers
def test_status_in_trouble_is_as_described(proxy: Proxy) -> None:
    wait_until(lambda: requests.get(f"{proxy.url}/status").json()["queue"], what="a queue")
    body = requests.get(f"{proxy.url}/status").json()
    validate(body, "Status")
    assert [(q["model_id"], q["state"]) for q in body["queue"]] == [("loading", "starting")]


@pytest.mark.servers
def test_errors_are_as_described(proxy: Proxy) -> None:
    for answer in (
        proxy.chat("nobody"),
        requests.post(f"{proxy.url}/v1/chat/completions", data=b"{"),
        requests.get(f"{proxy.url}/no/such/route"),
        proxy.chat("failed"),
    ):
        validate(answer.json(), "Error")


@pytest.mark.servers
def test_without_a_state_file_health_is_as_described(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"models": {}}')
    client = create_app(load_settings(config, environ={})).test_client()
    for path, schema in (("/health", "Health"), ("/status", "Status")):
        answer = client.get(path)
        assert answer.status_code == 200
        validate(answer.json, schema)


@pytest.mark.servers
@OURS.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_generated_requests_are_as_described(
    proxy: Proxy, case: schemathesis.Case
) -> None:
    case.call_and_validate(base_url=proxy.url, checks=CHECKS, timeout=30)


@pytest.mark.servers
@pytest.mark.parametrize("path", ["/v1/models/", "/models/"])
def test_an_id_with_slashes_is_found(proxy: Proxy, path: str) -> None:
    answer = requests.get(f"{proxy.url}{path}user/loaded.model")
    validate(answer.json(), "ListedModel")
    assert answer.json()["status"] == "ready"


@pytest.mark.servers
def test_load_and_unload_are_as_described(proxy: Proxy) -> None:
    for verb, status in (("unload", "unloaded"), ("load", "ready")):
        answer = requests.post(f"{proxy.url}/api/models/user/loaded.model/{verb}", timeout=30)
        validate(answer.json(), "ListedModel")
        assert answer.json()["status"] == status


@pytest.mark.servers
@pytest.mark.parametrize("model", ["user/loaded.model", "failed"])
def test_plans_are_as_described(proxy: Proxy, model: str) -> None:
    answer = requests.get(f"{proxy.url}/api/models/{model}/plan", timeout=30)
    validate(answer.json(), "Plan")
