"""Keys of clients, as text and with limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smartproxy.catalog.catalog import build_catalog
from smartproxy.config.load import load_settings
from smartproxy.config.settings import Settings
from smartproxy.errors import ConfigError

ALICE = {"name": "alice", "key": "sesame"}


def load(folder: Path, **content: Any) -> Settings:
    path = folder / "config.json"
    path.write_text(json.dumps({"models": {"m": {"path": "m.gguf", "aliases": ["n"]}}, **content}))
    return load_settings(path, environ={})


def test_a_key_may_be_text_or_have_a_name_and_limits(tmp_path: Path) -> None:
    limited = {**ALICE, "models": ["n"], "max_in_flight": 2}
    settings = load(tmp_path, api_keys=["plain", "plain", limited])
    assert [key.key for key in settings.api_keys] == ["plain", "plain", "sesame"]
    assert list(settings.named_keys) == ["sesame"]
    assert build_catalog(settings).models_of_keys == {"alice": {"m"}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([{"key": "sesame"}], "api_keys.0: must have a name"),
        ([{"name": "a", "key": ""}], "must have a name"),
        ([{**ALICE, "max_in_flight": 0}], "api_keys.0.max_in_flight"),
        ([{**ALICE, "models": []}], "api_keys.0.models"),
        ([{**ALICE, "max": 1}], "api_keys.0.max: unknown key"),
        ([ALICE, {"name": "alice", "key": "other"}], '"alice" is the name of two keys'),
        ([ALICE, "sesame"], 'the key "alice" stands twice'),
    ],
)
def test_a_wrong_key_is_told_in_one_line_without_it(
    tmp_path: Path, keys: list[Any], said: str
) -> None:
    with pytest.raises(ConfigError) as told:
        load(tmp_path, api_keys=keys)
    assert said in str(told.value)
    assert "sesame" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_key_for_an_unknown_model_is_told(tmp_path: Path) -> None:
    settings = load(tmp_path, api_keys=[{**ALICE, "models": ["nobody"]}])
    with pytest.raises(ConfigError, match='models of the API key "alice": model "nobody"'):
        build_catalog(settings)
