"""docs/openapi.yaml itself: it describes every route, entity and error there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flask import Flask
from pydantic import BaseModel

from smartproxy import errors
from smartproxy.config.load import load_settings
from smartproxy.entities import GPU, GPUAssignment, GPUPoolStatus, GPUProcess, Server
from smartproxy.proxy.app import create_app
from smartproxy.proxy.inference import INFERENCE_PATHS
from smartproxy.proxy.pages.monitoring import openapi_json
from tests.support.openapi import DOCUMENT, validate


def flask_app(config: Path) -> Flask:
    app = create_app(load_settings(config, environ={})).wsgi
    assert isinstance(app, Flask)
    return app


def test_served_description_is_the_documented_one() -> None:
    assert yaml.safe_load(openapi_json()) == DOCUMENT


@pytest.mark.parametrize("entity", [GPU, GPUAssignment, GPUPoolStatus, GPUProcess, Server])
def test_entity_is_described_with_exactly_its_fields(entity: type[BaseModel]) -> None:
    described = DOCUMENT["components"]["schemas"][entity.__name__]["properties"]
    assert set(described) == {*entity.model_fields, *entity.model_computed_fields}


def test_every_route_of_ours_is_described(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"models": {}}')
    app = flask_app(config)
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


def test_without_a_state_file_health_is_as_described(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"models": {}}')
    client = flask_app(config).test_client()
    for path, schema in (("/health", "Health"), ("/status", "Status")):
        answer = client.get(path)
        assert answer.status_code == 200
        validate(answer.json, schema)
