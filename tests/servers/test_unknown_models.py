"""llama-fit-params beside the server is asked about architectures that the rules don't know."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import gguf_files, gguf_shapes
from tests.support.gpu_running import MIB, Card, gpu_machine, plan, uuid, world_of
from tests.support.running import STAND_IN, wait_until

SERVER = """\
#!/bin/sh
exec {python} {stand_in} "$@"
"""
#: as b11434 prints it, with what it was asked kept beside it
TOOL = """\
#!/bin/sh
case "$*" in --help) echo "-c, --ctx-size N"; echo "-fa, --flash-attn"; echo "--n-gpu-layers N"
    exit 0;; esac
printf '%s\\n' "$CUDA_VISIBLE_DEVICES" "$@" > {asked}
{body}
"""
TELLS = "echo 'CUDA0 600 64 200'; echo 'Host 20 0 30'"


def build_with_tool(folder: Path, body: str) -> Path:
    """Make a build's folder: the stand-in server, and a tool that says `body`."""
    folder.mkdir()
    server, tool = folder / "llama-server", folder / "llama-fit-params"
    server.write_text(SERVER.format(python=sys.executable, stand_in=STAND_IN))
    tool.write_text(TOOL.format(asked=folder / "asked", body=body))
    for path in (server, tool):
        path.chmod(0o755)
    return server


def brand_new(folder: Path) -> dict[str, Any]:
    """Write a model of an architecture that nobody knows; without flash attention it is dear."""
    body = gguf_shapes.Body(
        width=2048, layers=8, heads=32, kv_heads=8, head=64, inner=8192, vocabulary=1024
    )
    path = gguf_files.write(gguf_shapes.transformer("new.F16", "brandnew", body), folder)
    return {"path": str(path), "args": ["--fake", f"gpu_bytes={1200 * MIB}"]}


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_an_unknown_architecture_takes_what_the_tool_tells_until_a_server_ran(
    tmp_path: Path,
) -> None:
    server = build_with_tool(tmp_path / "bin", TELLS)
    models, world = {"new": brand_new(tmp_path)}, world_of(Card(gib=8), Card(gib=24))
    with gpu_machine(tmp_path, world, models, llama_server=str(server)) as (proxy, _):
        before = plan(proxy, "new")["estimate"]
        assert before["confident"] is False
        rows = wait_until(
            lambda: proxy.rows("SELECT * FROM measurements ORDER BY device_index DESC"),
            what="the tool's answer",
        )
        assert [(row["device"], row["server_id"]) for row in rows] == [
            (uuid(1), None),
            ("host", None),
        ]
        # the GPU with most room; only flags that the tool has
        said = asked(tmp_path / "bin")
        assert said[0] == uuid(1)
        assert said[said.index("--ctx-size") + 1] == "2048"
        assert said[said.index("--flash-attn") + 1] == "auto"
        assert "--parallel" not in said
        assert said[-2:] == ["--fit-print", "on"]

        (device,) = plan(proxy, "new")["estimate"]["devices"]
        told = device["total_memory"] - device["overhead_memory"]
        assert told == pytest.approx((600 + 64 + 200) / 1024, abs=0.01)
        assert told < before["total_memory"] - 0.5

        assert proxy.chat("new").status_code == 200
        (row,) = proxy.rows(
            "SELECT * FROM measurements WHERE server_id IS NOT NULL AND device != 'host'"
        )
        assert row["estimated_bytes"] - row["overhead_bytes"] == pytest.approx(
            864 * MIB, abs=4 * MIB
        )


def test_a_tool_that_fails_is_told_of_once_and_the_high_estimate_stays(tmp_path: Path) -> None:
    server = build_with_tool(tmp_path / "bin", "echo broken >&2; exit 3")
    models = {"new": brand_new(tmp_path)}
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models, llama_server=str(server)) as (
        proxy,
        _,
    ):
        before = plan(proxy, "new")["estimate"]
        wait_until(lambda: "could not be asked: exit code 3: broken" in proxy.log(), what="warning")
        assert plan(proxy, "new")["estimate"] == before
        assert proxy.rows("SELECT * FROM measurements") == []
        assert asked(tmp_path / "bin")
