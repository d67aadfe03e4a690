"""config.json and the environment -> frozen Settings, or one clear line that says what is wrong.

The only reader of both. `python -m smartproxy.config.load` writes docs/config.schema.json anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from smartproxy.config.legacy import Translation, translate
from smartproxy.config.settings import ModelSettings, ServerPool, Settings
from smartproxy.config.wording import one_line
from smartproxy.errors import ConfigError

__all__ = ["ModelSettings", "ServerPool", "Settings", "json_schema", "load_settings"]

SCHEMA_PATH = Path(__file__).parents[2] / "docs" / "config.schema.json"


def load_settings(
    path: Path | None = None,
    *,
    state_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Return the checked settings of one file, with every path in them absolute.

    path: else SMARTPROXY_CONFIG, else config.json in the working directory. state_dir: else
    SMARTPROXY_STATE_DIR, else the key, else "state" beside the file; it need not exist yet. Raises
    ConfigError with one line. Model files are not looked at: see catalog.build_catalog.
    """
    path = Path(os.path.abspath(path or environ.get("SMARTPROXY_CONFIG") or "config.json"))
    try:
        return _load(path, state_dir or _state_dir_of(environ))
    except ConfigError as error:
        raise ConfigError(_visible(f"{path}: {error}")) from None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of config.json in today's form, for editors."""
    schema = Settings.model_json_schema()
    schema["properties"]["$schema"] = {"type": "string", "description": "For editors; not read."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _state_dir_of(environ: Mapping[str, str]) -> Path | None:
    named = environ.get("SMARTPROXY_STATE_DIR")
    return Path(named) if named else None


def _load(path: Path, state_dir: Path | None) -> Settings:
    data = _read(path)
    data.pop("$schema", None)
    data.setdefault("state_dir", str(Settings.model_fields["state_dir"].default))
    translation = translate(data)
    settings = _validated(translation, path.parent)
    if state_dir is not None:
        settings = settings.model_copy(update={"state_dir": Path(os.path.abspath(state_dir))})
    settings._config_path = path
    settings._warnings = translation.warnings
    _check_files(settings)
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(str(error)) from None
    if not isinstance(data, dict):
        raise ConfigError("must be a JSON object {...}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key given twice: the first of two models of one name would silently be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"{json.dumps(twice)} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ConfigError(f"{name} is not JSON")


def _validated(translation: Translation, folder: Path) -> Settings:
    try:
        # through JSON text: strict there still takes lists for tuples and text for paths
        text = json.dumps(translation.data)
        return Settings.model_validate_json(text, strict=True, context={"folder": folder})
    except ValidationError as error:
        line = one_line(error, translation.data, _cached_schema(), translation.written_as)
        raise ConfigError(line) from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None


def _visible(text: str) -> str:
    """Escape what would break the line: keys and values in a message are the file's own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@cache
def _cached_schema() -> dict[str, Any]:
    return json_schema()


def _check_files(settings: Settings) -> None:
    """Refuse to start without a file that the configuration names, model files aside."""
    folder, binary = settings.models_dir, settings.llama_server
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"models_dir: {folder} is not a folder")
    if settings.state_dir.exists() and not settings.state_dir.is_dir():
        raise ConfigError(f"state_dir: {settings.state_dir} is not a folder")
    if binary is not None and not (binary.is_file() and os.access(binary, os.X_OK)):
        raise ConfigError(f"llama_server: {binary} is not an executable file")


def _main() -> None:
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {SCHEMA_PATH}", file=sys.stderr)


def schema_text() -> str:
    """Return what docs/config.schema.json must hold."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    _main()
