"""A key of a client or an operator, and what it may use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smartproxy.config.values import ApiKey, ModelName, Text


def _text_too(schema: dict[str, Any]) -> None:
    """Say that a key alone, as text, will do."""
    whole = {name: schema.pop(name) for name in tuple(schema)}
    for key in whole["properties"].values():
        key["description"] = " ".join(key.get("description", "").split())
    schema["anyOf"] = [whole, {"type": "string"}]


class KeySettings(BaseModel):
    """One of `api_keys` or `admin_keys`; as text, it is a key without a name and limits."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra=_text_too,
    )

    key: ApiKey = Field(repr=False)
    """The key."""
    name: Text | None = None
    """What logs and answers call it: they never say the key."""
    models: tuple[ModelName, ...] | None = Field(None, min_length=1)
    """Names of the models that it may use. Without it: all."""
    max_in_flight: int | None = Field(None, ge=1, le=1_000_000)
    """How many of its requests to models may be open at the same time. Without it: any number."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"key": value}
        if isinstance(value, dict) and not (value.get("name") and value.get("key")):
            raise ValueError("must have a name, which logs and answers call it by, and a key")
        if isinstance(value, dict) and isinstance(value.get("models"), list):
            return {**value, "models": tuple(value["models"])}  # strict: this is no JSON any more
        return value


def keys_problem(keys: Iterable[KeySettings]) -> str | None:
    """Return why keys can't be told apart; None: they can. Plain ones may stand twice."""
    names: set[str] = set()
    seen: dict[str, KeySettings] = {}
    for key in keys:
        other = seen.setdefault(key.key, key)
        if other is not key and (other.name or key.name):
            return f'the key "{other.name or key.name}" stands twice: one may have one name only'
        if key.name in names:
            return f'"{key.name}" is the name of two keys'
        if key.name:
            names.add(key.name)
    return None
