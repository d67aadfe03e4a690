"""Older forms of config.json: today's keys come out, with a warning that says what to write."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from smartproxy.config.legacy import translate
from smartproxy.config.load import Settings, load_settings
from smartproxy.errors import ConfigError
from smartproxy.planner.types import Strategy

#: every section the previous generation had, with the values it was shipped with
PREVIOUS_GENERATION: dict[str, Any] = {
    "backend": "llama.cpp",
    "server": {"host": "0.0.0.0", "port": 11555},
    "server_pool": {
        "size": 2,
        "host": "localhost",
        "port_start": 11601,
        "gpu_layers": 999,
        "request_timeout": 600,
        "health_timeout": 5.0,
    },
    "ollama": {"host": "localhost", "port": 11434, "timeout": 300},
    "llama_cpp": {"models": {"phi": {"repo": "microsoft/Phi-3-mini-4k", "variant": "Q8_0"}}},
    "models": {"qwen": {"repo": "Qwen/Qwen2.5-0.5B-GGUF", "variant": "Q4_K_M"}},
    "gpu": {
        "enabled": True,
        "enable_gpu_monitoring": True,
        "allocation_strategy": "distribute",
        "monitoring_interval": 5.0,
        "cpu_fallback": True,
        "kv_offload": True,
    },
    "agents": ["gpu"],
    "simulation": None,
}


def load(tmp_path: Path, content: Any) -> Settings:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return load_settings(path, environ={})


def test_previous_generations_file_means_what_it_meant(tmp_path: Path) -> None:
    settings = load(tmp_path, PREVIOUS_GENERATION)
    assert (settings.host, settings.port) == ("0.0.0.0", 11555)
    assert (settings.server_pool.size, settings.server_pool.port_start) == (2, 11601)
    assert (settings.gpu_layers, settings.request_timeout) == (999, 600)
    assert settings.gpu_allocation_strategy is Strategy.DISTRIBUTE
    assert settings.gpu_poll_interval == 5
    assert settings.enable_gpu_monitoring is True
    assert list(settings.models) == ["phi", "qwen"]
    assert settings.models["phi"].variant == "Q8_0"


def test_old_cpu_fallback_does_not_become_todays(tmp_path: Path) -> None:
    settings = load(tmp_path, {"gpu": {"cpu_fallback": True}})
    assert settings.cpu_fallback is False
    (warning,) = settings.warnings
    assert warning.startswith("gpu.cpu_fallback is ignored: ")
    assert '"cpu_fallback" at the top' in warning


@pytest.mark.parametrize(
    ("content", "old", "instead"),
    [
        ({"server": {"host": "::1"}}, "server.host", "host"),
        ({"server": {"port": 81}}, "server.port", "port"),
        ({"server_pool": {"gpu_layers": 0}}, "server_pool.gpu_layers", "gpu_layers"),
        ({"server_pool": {"request_timeout": 9}}, "server_pool.request_timeout", "request_timeout"),
        ({"server_pool": {"num_servers": 9}}, "server_pool.num_servers", "server_pool.size"),
        ({"gpu": {"enabled": False}}, "gpu.enabled", "enable_gpu_monitoring"),
        ({"gpu": {"monitoring_interval": 9}}, "gpu.monitoring_interval", "gpu_poll_interval"),
        (
            {"gpu": {"allocation_strategy": "distribute"}},
            "gpu.allocation_strategy",
            "gpu_allocation_strategy",
        ),
        ({"gpu": {"cache_type_k": "q8_0"}}, "gpu.cache_type_k", "cache_type_k"),
        ({"llama_cpp": {"models": {}}}, "llama_cpp.models", "models"),
        ({"max_slots": 2}, "max_slots", "parallel"),
    ],
)
def test_each_older_key_is_translated_with_one_warning(
    content: dict[str, Any], old: str, instead: str
) -> None:
    translation = translate(content)
    (warning,) = translation.warnings
    assert warning.startswith(f"{old} is an older form: ")
    assert f'"{instead}"' in warning
    value: Any = content
    for key in old.split("."):
        value = value[key]
    found: Any = translation.data
    for key in instead.split("."):
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("content", "old"),
    [
        ({"agents": []}, "agents"),
        ({"agents": ["a"], "models": {}}, "agents"),
        ({"plugins_dir": "plugins"}, "plugins_dir"),
        ({"simulation": {"host": "x"}}, "simulation"),
        ({"ollama": {"host": "http://localhost:11434"}}, "ollama.host"),
        ({"server_pool": {"health_timeout": 5.0}}, "server_pool.health_timeout"),
        ({"gpu": {"activation_overhead_factor": 0.25}}, "gpu.activation_overhead_factor"),
    ],
)
def test_what_is_not_carried_over_is_said(content: dict[str, Any], old: str) -> None:
    (warning,) = translate(content).warnings
    assert warning.startswith(f"{old} is ignored: ")


@pytest.mark.parametrize(
    ("enabled", "monitoring", "expected"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_either_old_switch_turns_monitoring_off(
    enabled: bool, monitoring: bool, expected: bool
) -> None:
    gpu = {"enabled": enabled, "enable_gpu_monitoring": monitoring}
    assert translate({"gpu": gpu}).data == {"enable_gpu_monitoring": expected}


def test_todays_key_wins_over_an_older_one_with_a_warning() -> None:
    translation = translate({"port": 81, "server": {"port": 82}})
    assert translation.data == {"port": 81}
    assert translation.warnings == ('server.port is ignored: "port" is set too, and is used',)


def test_of_the_two_old_strategy_keys_the_later_one_wins() -> None:
    gpu = {"allocation_strategy": "distribute", "gpu_allocation_strategy": "single-gpu-preferred"}
    data = translate({"gpu": gpu}).data
    assert data == {"gpu_allocation_strategy": "single-gpu-preferred"}


def test_todays_model_wins_over_an_older_one_of_its_name() -> None:
    translation = translate(
        {"models": {"a": {"path": "new"}}, "llama_cpp": {"models": {"a": {"path": "old"}}}}
    )
    assert translation.data == {"models": {"a": {"path": "new"}}}
    assert 'llama_cpp.models.a is ignored: "models" has it too, and is used' in translation.warnings


def test_todays_form_passes_through_untouched() -> None:
    content = {"server_pool": {"size": 4, "port_start": 8080}, "models": {"a": {"path": "x"}}}
    translation = translate(content)
    assert translation.data == content
    assert translation.warnings == ()


def test_what_was_given_is_not_changed() -> None:
    given = copy.deepcopy(PREVIOUS_GENERATION)
    translate(given)
    assert given == PREVIOUS_GENERATION


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"gpu": {"foo": 1}}, 'gpu.foo: unknown key in the older "gpu"'),
        ({"gpu": 3}, "gpu: this older section must be an object"),
        ({"server": []}, "server: this older section must be an object"),
        ({"llama_cpp": {"models": 3}}, "llama_cpp.models: must be an object of models by id"),
        ({"ollama": {"modles": []}}, "ollama.modles: unknown key"),
        # the key that the user wrote, not the one it became
        (
            {"gpu": {"monitoring_interval": "x"}},
            'gpu.monitoring_interval: got "x", must be a number',
        ),
        ({"server_pool": {"num_servers": 0}}, "server_pool.num_servers: got 0, must be a whole"),
        (
            {"llama_cpp": {"models": {"q": {"repo": "a/b", "pin": True}}}},
            'llama_cpp.models.q.pin: unknown key, did you mean "pinned"?',
        ),
    ],
)
def test_mistakes_in_older_sections_are_named_as_they_were_written(
    tmp_path: Path, content: Any, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "is_open"),
    [({}, True), ({"api_keys": ["k"]}, False), ({"open_to_network": False}, False)],
)
def test_an_older_file_that_is_open_to_the_network_stays_so_with_a_warning(
    tmp_path: Path, more: dict[str, Any], is_open: bool
) -> None:
    settings = load(tmp_path, {"models": {}, "server": {"host": "0.0.0.0"}, **more})
    assert settings.open_to_network is is_open
    assert any("open_to_network" in warning for warning in settings.warnings) is is_open
