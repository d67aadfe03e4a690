"""Builds with known holes, and arguments that open a server: refused, or told at the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smartproxy.config.known_holes import build_number, build_problems, dangerous_args
from smartproxy.config.load import load_settings
from smartproxy.config.settings import Settings
from smartproxy.errors import ConfigError


@pytest.mark.parametrize(
    ("build", "number"),
    [
        ("b10434 (7e4c0a9)", 10434),
        ("10434 (7e4c0a9)", 10434),
        ("1 (571d0d5), b10068", 10068),
        ("1 (5710512)", None),
        ("unknown", None),
        ("0.10068.0", 10068),
    ],
)
def test_a_builds_number_is_read(build: str, number: int | None) -> None:
    assert build_number(build) == number


@pytest.mark.parametrize(("number", "holed"), [(8226, 0), (8227, 1), (11392, 1), (11393, 0)])
def test_an_engine_with_a_known_hole_is_told_with_what_to_use(number: int, holed: int) -> None:
    problems = build_problems(f"b{number} (7e4c0a9)")
    assert len(problems) == holed
    assert all("CVE-2026-107183" in said and "b11393" in said for said in problems)
    assert build_problems(None) == build_problems("1 (7e4c0a9)") == []


def load(folder: Path, model: dict[str, Any], **settings: Any) -> Settings:
    config = folder / "config.json"
    config.write_text(json.dumps({"models": {"m": {"path": "m.gguf", **model}}, **settings}))
    return load_settings(config, environ={})


@pytest.mark.parametrize(
    "args",
    [
        *(["--tools", "all"], ["--agent"], ["-ag"], ["--ui-mcp-proxy"], ["--webui_mcp_proxy"]),
        *(["--mcp-servers-config", "x"], ["--media-path", "/"], ["--media_path=/"], ["--path=/x"]),
        *(["-t", "4", "--slot-save-path", "x"], ["--rpc", "h:1"], ["--log-prompts-dir", "x"]),
        *(["--props"], ["--props=1"]),
    ],
    ids=" ".join,
)
def test_arguments_that_open_a_server_are_refused_unless_allowed(
    args: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r'models.m: --?\w.*"allow_dangerous_args": true'):
        load(tmp_path, {"args": args})
    allowed = load(tmp_path, {"args": args, "allow_dangerous_args": True})
    (warning,) = allowed.dangers()
    assert warning.startswith("models.m.args: -")
    assert len(dangerous_args(args)) == 1


def test_the_environment_is_no_way_around(tmp_path: Path) -> None:
    for name in ("LLAMA_ARG_TOOLS", "LLAMA_ARG_MEDIA_PATH", "LLAMA_ARG_STATIC_PATH"):
        env = {"env": {name: "x"}, "allow_dangerous_args": True}
        with pytest.raises(ConfigError, match="is not allowed here"):
            load(tmp_path, env)


def test_a_start_says_that_client_keys_are_good_for_operations(tmp_path: Path) -> None:
    (warning,) = load(tmp_path, {}, api_keys=["k"]).dangers()
    assert warning.startswith("admin_keys: none")
    assert load(tmp_path, {}, api_keys=["k"], admin_keys=["a"]).dangers() == ()
    assert load(tmp_path, {}).dangers() == ()
