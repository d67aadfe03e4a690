"""Older forms of config.json -> today's keys, with one warning each that says what to write.

Knows the previous generation's nested sections; nothing else in the project does. Pure: plain
JSON values in, plain JSON values out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smartproxy.config.values import only_this_machine
from smartproxy.errors import ConfigError

#: section ("" is the top) -> its key -> where that stands today; of two keys for one, the first
#: that is there wins, as it did then
_MOVED: Mapping[str, Mapping[str, str]] = {
    "": {"max_slots": "parallel"},
    "server": {"host": "host", "port": "port"},
    "server_pool": {
        "gpu_layers": "gpu_layers",
        "request_timeout": "request_timeout",
        "num_servers": "server_pool.size",
    },
    "gpu": {
        "enable_gpu_monitoring": "enable_gpu_monitoring",
        "enabled": "enable_gpu_monitoring",
        "gpu_allocation_strategy": "gpu_allocation_strategy",
        "allocation_strategy": "gpu_allocation_strategy",
        "monitoring_interval": "gpu_poll_interval",
        "cache_type_k": "cache_type_k",
        "cache_type_v": "cache_type_v",
    },
    "llama_cpp": {"models": "models"},
}

_OWN_ESTIMATES = "estimates follow what llama.cpp itself allocates"

#: section -> its key -> why it goes
_DROPPED: Mapping[str, Mapping[str, str]] = {
    "": {
        "agents": "there are no agents any more",
        "plugins_dir": "there are no agents any more",
        "simulation": "there is no simulation any more",
    },
    "server_pool": {
        "host": "servers listen on the loopback address only",
        "health_timeout": "the proxy does not need it",
    },
    "gpu": {
        "cpu_fallback": "without a GPU the CPU is always used; for models that do not fit the GPUs,"
        ' write "cpu_fallback" at the top',
        "kv_offload": _OWN_ESTIMATES,
        "repack": _OWN_ESTIMATES,
        "no_host": _OWN_ESTIMATES,
        "activation_overhead_factor": _OWN_ESTIMATES,
    },
    "ollama": dict.fromkeys(
        ("host", "port", "timeout", "models"), "models run with llama.cpp only"
    ),
}

#: sections that are gone altogether; server_pool still is one
_OLD_SECTIONS = ("server", "gpu", "llama_cpp", "ollama")


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A configuration in today's keys."""

    data: dict[str, Any]
    warnings: tuple[str, ...]
    #: today's key -> the older one that it was written as, for error messages
    written_as: Mapping[str, str]


@dataclass(slots=True)
class _Draft:
    data: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    written_as: dict[str, str] = field(default_factory=dict)


def translate(data: Mapping[str, Any]) -> Translation:
    """Return the same configuration in today's keys; what is not old is left as it is.

    Raises ConfigError for an old section that is no object, or holds a key it never had.
    """
    draft = _Draft(dict(data))
    for section in ("", "server_pool", *_OLD_SECTIONS):
        if section == "":
            _translate_keys(draft, section, draft.data)
        elif isinstance(draft.data.get(section), dict):
            draft.data[section] = dict(draft.data[section])
            _translate_keys(draft, section, draft.data[section])
    for section in _OLD_SECTIONS:
        _close(draft, section)
    _keep_open(draft)
    return Translation(data=draft.data, warnings=tuple(draft.warnings), written_as=draft.written_as)


def _translate_keys(draft: _Draft, section: str, keys: dict[str, Any]) -> None:
    """Take the older keys out of one section and put them where they belong today."""
    for key, today in _MOVED.get(section, {}).items():
        if key in keys:
            _move(draft, _path(section, key), today, keys.pop(key))
    for key, why in _DROPPED.get(section, {}).items():
        if key in keys:
            del keys[key]
            draft.warnings.append(f"{_path(section, key)} is ignored: {why}")


def _move(draft: _Draft, old: str, today: str, value: Any) -> None:
    if today == "models":
        return _move_models(draft, old, value)
    if value is None:
        return draft.warnings.append(f"{old} is ignored: it is null")
    *sections, key = today.split(".")
    target = draft.data
    for section in sections:
        target = target.setdefault(section, {})
    if old == "gpu.enabled" and value is False:
        target[key] = False  # either of the two switches turned monitoring off
    elif key in target:
        return draft.warnings.append(f'{old} is ignored: "{today}" is set too, and is used')
    else:
        target[key] = value
    draft.written_as[today] = old
    draft.warnings.append(f'{old} is an older form: write "{today}" instead')


def _move_models(draft: _Draft, old: str, value: Any) -> None:
    models = draft.data.get("models", {})
    if not isinstance(value, dict) or not isinstance(models, dict):
        raise ConfigError(f"{old}: must be an object of models by id")
    draft.warnings.append(f'{old} is an older form: write "models" at the top instead')
    for model_id in value.keys() & models.keys():
        draft.warnings.append(f'{old}.{model_id} is ignored: "models" has it too, and is used')
    draft.data["models"] = {**value, **models}
    for model_id in value.keys() - models.keys():
        draft.written_as[f"models.{model_id}"] = f"{old}.{model_id}"


def _close(draft: _Draft, section: str) -> None:
    """Remove an old section, which must be empty by now."""
    if section not in draft.data:
        return
    left = draft.data.pop(section)
    if left is not None and not isinstance(left, dict):
        raise ConfigError(f"{section}: this older section must be an object")
    if left:
        raise ConfigError(f'{section}.{next(iter(left))}: unknown key in the older "{section}"')


def _keep_open(draft: _Draft) -> None:
    """An older file that opened the proxy to the network does so still, and is told of it."""
    host, keys = draft.data.get("host"), draft.data.get("api_keys")
    if draft.written_as.get("host") != "server.host" or not isinstance(host, str):
        return
    if keys or "open_to_network" in draft.data or only_this_machine(host):
        return
    draft.data["open_to_network"] = True
    draft.warnings.append(
        f"server.host is {host}, and nobody needs a key: everybody on the network may use the"
        ' models; set api_keys, or write "open_to_network": true to say that it is meant'
    )


def _path(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key
