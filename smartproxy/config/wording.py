"""A failed validation -> one line: which key, what it got, what it must be. Pure.

What a key must be is read off its JSON Schema, so no text here repeats a default or a bound.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

#: their values never appear in a message
_SECRET = frozenset({"api_keys", "admin_keys", "env"})
_SHOWN_CHARACTERS = 60
_MAX_PATH_CHARACTERS = 200

Json = Mapping[str, Any]


def one_line(error: ValidationError, data: Any, schema: Json, written_as: Mapping[str, str]) -> str:
    """Return the first problem in words, and how many more there are."""
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    keys, node, parent = _find(first["loc"], schema)
    path = _written(".".join(map(str, keys)), written_as)
    if first["type"] == "extra_forbidden":
        text = _unknown_key(str(first["loc"][-1]), path, parent, schema)
    elif first["type"] == "value_error":
        text = ": ".join(filter(None, (path, str(first["ctx"]["error"]))))
    elif first["type"] == "json_invalid":
        text = f"can't be read: {first['ctx']['error']}"  # a lone surrogate, too deep
    else:
        text = f"{path or 'the whole'}: got {_got(data, keys)}, must be {_expected(node, schema)}"
    others = {_find(other["loc"], schema)[0] for other in problems[1:]}
    others = {other for other in others if other != keys[: len(other)]}
    if not others:
        return text
    return f"{text} (and {len(others)} more problem{'s' if len(others) > 1 else ''})"


def _find(loc: Sequence[int | str], schema: Json) -> tuple[tuple[int | str, ...], Json, Json]:
    """Return the part of loc that is in the file, its schema and that of what holds it.

    The rest of loc is pydantic's own: which branch of a union, or "[key]".
    """
    node: Json = schema
    parent: Json = schema
    keys: list[int | str] = []
    for key in loc:
        below = _below(node, key, schema)
        if below is None or key == "[key]":
            break
        parent, node = node, below
        keys.append(key)
    else:
        return tuple(keys), node, parent
    unknown = loc[len(keys)]
    if _kind(node, schema) == "object" and isinstance(unknown, str) and unknown != "[key]":
        return (*keys, unknown), {}, node
    return tuple(keys), node, parent


def _below(node: Json, key: int | str, schema: Json) -> Json | None:
    for choice in _choices(node, schema):
        if isinstance(key, int):
            found = choice.get("items")
        else:
            found = choice.get("properties", {}).get(key, choice.get("additionalProperties"))
        if isinstance(found, Mapping):
            return found
    return None


def _choices(node: Json, schema: Json) -> list[Json]:
    """Return what a value may be, without null and with references followed."""
    if "$ref" in node:
        return _choices(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], schema)
    if "anyOf" in node:
        return [one for each in node["anyOf"] for one in _choices(each, schema)]
    return [] if node.get("type") == "null" else [node]


def _kind(node: Json, schema: Json) -> str | None:
    choices = _choices(node, schema)
    return choices[0].get("type") if choices else None


def _unknown_key(key: str, path: str, parent: Json, schema: Json) -> str:
    known = [name for one in _choices(parent, schema) for name in one.get("properties", {})]
    if key in schema["$defs"]["ModelSettings"]["properties"]:
        return f"{path}: unknown key here, it goes under a model (models.NAME.{key})"
    if key in schema["properties"]:
        return f"{path}: unknown key here, it goes to the top of the file"
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f'{path}: unknown key, did you mean "{near[0]}"?'
    return f"{path}: unknown key, must be one of {', '.join(sorted(known))}"


def _written(path: str, written_as: Mapping[str, str]) -> str:
    """Return the path with the older key that the user really wrote."""
    for today, old in written_as.items():
        if path == today or path.startswith(f"{today}."):
            return f"{old}{path[len(today) :]}"
    return path if len(path) <= _MAX_PATH_CHARACTERS else path[:_MAX_PATH_CHARACTERS] + "..."


def _got(data: Any, keys: Sequence[int | str]) -> str:
    if any(key in _SECRET for key in keys):
        return "something else"
    for key in keys:
        data = data[key]
    text = json.dumps(data, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _expected(node: Json, schema: Json) -> str:
    texts = [_expected_one(choice, schema) for choice in _choices(node, schema)]
    return " or ".join(dict.fromkeys(texts))


def _expected_one(node: Json, schema: Json) -> str:
    if "enum" in node or "const" in node:
        values = [json.dumps(value) for value in node.get("enum", [node.get("const")])]
        return " or ".join(values) if len(values) < 3 else f"one of {', '.join(values)}"
    match node.get("type"):
        case "integer":
            return "a whole number" + _range(node)
        case "number":
            return "a number" + _range(node)
        case "boolean":
            return "true or false"
        case "array":
            least = " of at least one: " if node.get("minItems") else " of: "
            return f"a list{least}{_expected(node['items'], schema)}"
        case "object":
            return "an object {...}"
        case _:
            return "a path" if node.get("format") == "path" else "text"


def _range(node: Json) -> str:
    above, low, high = (node.get(bound) for bound in ("exclusiveMinimum", "minimum", "maximum"))
    if above is not None:
        return f" above {above}" + ("" if high is None else f", at most {high}")
    if low is not None:
        return f" of at least {low}" if high is None else f" from {low} to {high}"
    return ""
