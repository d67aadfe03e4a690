"""A real configuration with parts changed: settings, or one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from smartproxy.config.load import load_settings
from smartproxy.errors import ConfigError
from tests.support.examples import examples

REAL: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 8000,
    "models": {
        "a": {"path": "a.gguf", "aliases": ["b"], "args": ["-t", "4"], "env": {"A": "1"}},
        "c": {"repo": "user/name", "variant": "Q4_K_M", "gpus": [0, "GPU-1"], "ctx_size": "auto"},
        "d": {"path": "d.gguf", "args": ["--props"], "allow_dangerous_args": True, "ttl": 0},
    },
    "server_pool": {"size": 4, "port_start": 9000},
    "api_keys": ["one", "two"],
    "admin_keys": ["three"],
    "allowed_hosts": ["gpu.example", "*.lan"],
    "allowed_origins": ["https://chat.example", "*"],
    "gpu": {"enabled": True, "monitoring_interval": 2},
    "max_body_mb": 64,
    "queue_timeout": 300,
}
STRANGE = st.sampled_from(
    [
        *(None, True, -1, 0, 2**70, 1e308, "", " ", "\0", "x" * 5000, [], {}, [[]], {"a": {}}),
        *("--tools", "--rpc=x", "../..", "${HOME}", "*", "null", "https://a/b", "\ud800", "é"),
    ]
)
EDIT = st.tuples(st.integers(0, 1000), st.sampled_from(["set", "delete", "add", "wrap"]), STRANGE)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value: what holds it, and its key or index there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [(value, key) for key, _ in inner]
    for _, key in list(found):
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def changed(edits: list[tuple[int, str, Any]]) -> dict[str, Any]:
    whole = copy.deepcopy(REAL)
    for number, how, drawn in edits:
        strange = copy.deepcopy(drawn)  # the next edit may change what this one put in
        all_places = places(whole)
        if not all_places:
            break
        holder, key = all_places[number % len(all_places)]
        if how == "delete":
            del holder[key]
        elif how == "wrap":
            holder[key] = [holder[key]]
        elif how == "add" and isinstance(holder, dict):
            holder[str(strange)[:50]] = strange
        else:
            holder[key] = strange
    return whole


def check(path: Path) -> None:
    told = ""
    try:
        load_settings(path, environ={}).dangers()
    except ConfigError as refused:
        told = str(refused)
    assert len(told.splitlines()) <= 1
    assert len(told) < 5000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.json"


def test_the_configuration_that_is_changed_loads(path: Path) -> None:
    path.write_text(json.dumps(REAL))
    assert set(load_settings(path, environ={}).models) == {"a", "c", "d"}


@hypothesis_settings(
    max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(edits=st.lists(EDIT, min_size=1, max_size=3))
def test_any_change_of_a_real_configuration_gives_settings_or_one_line(
    path: Path, edits: list[tuple[int, str, Any]]
) -> None:
    path.write_text(json.dumps(changed(edits)))
    check(path)


@hypothesis_settings(max_examples=examples(200), deadline=None)
@given(at=st.floats(0, 1), cut=st.integers(0, 40), text=st.text('{}[]",:\\/*0e- \n', max_size=6))
def test_any_change_of_its_text_gives_settings_or_one_line(
    path: Path, at: float, cut: int, text: str
) -> None:
    whole = json.dumps(REAL)
    place = int(at * len(whole))
    path.write_text(whole[:place] + text + whole[place + cut :])
    check(path)
