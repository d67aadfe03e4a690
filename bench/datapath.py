"""What a proxy between client and server costs, beside what one would use instead.

`python -m bench.datapath --json FILE [--quick] [--rounds N] [--with-litellm] [--only NAME ...]
[--cells requests first_byte paced full at_once idle real] [--quiet-wait S]`

All sides are up at once and are measured in turn, round after round; the strict client in C checks
every byte of every answer. Ratios are taken within a round, so that what else the machine does
hits both sides. Needs gcc; nginx if it is to take part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import stacks
from bench.figures import PEERS, machine, ratios, summary, table
from bench.processes import Stack, build, load, wait_for_quiet
from smartproxy.llama.binary import find
from tests.support.nginxes import NGINX

ROOT = Path(__file__).parent.parent
LITELLM_VENV = ROOT / ".bench" / "litellm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    requests: int = 6000
    one_client: int = 400
    sixteen_clients: int = 1600
    paced_tokens: int = 300
    full_tokens: int = 3000
    at_once_tokens: int = 60
    idle_s: int = 2
    real_requests: int = 20


QUICK = Sizes(
    requests=2000,
    one_client=150,
    sixteen_clients=480,
    paced_tokens=100,
    full_tokens=1000,
    at_once_tokens=30,
    idle_s=1,
    real_requests=8,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--quick", action="store_true", help="fewer requests: about a minute")
    parser.add_argument("--with-litellm", action="store_true", help="install it too, and measure")
    parser.add_argument("--only", nargs="+", help="names of the sides to measure")
    parser.add_argument("--cells", nargs="+", default=[*CELLS, "real"], help="default: all")
    parser.add_argument(
        "--quiet-wait", type=float, default=0.0, help="s to wait for a quiet machine, per cell"
    )
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended then too
    with tempfile.TemporaryDirectory(prefix="bench-datapath-") as name:
        folder = Path(name)
        programs = build(folder)
        with fast_stacks(folder, programs["upstream"], options) as fast:
            cells = [CELLS[name] for name in CELLS if name in options.cells]
            quiet_wait_s = options.quiet_wait
            rounds = [
                one_round(
                    fast, programs["load"], cells, sizes, turn=turn, quiet_wait_s=quiet_wait_s
                )
                for turn in range(options.rounds)
            ]
        if "real" in options.cells:
            with real_stacks(folder, options.only) as real:
                add_real(rounds, real, programs["load"], sizes)
    result = {"machine": machine(), "sizes": asdict(sizes), "rounds": rounds}
    result["figures"] = summary(rounds)
    result["ratios"] = {peer: ratios(rounds, peer) for peer in PEERS if peer in rounds[0]}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


# --- the sides -------------------------------------------------------------------------------


@contextlib.contextmanager
def fast_stacks(folder: Path, upstream: Path, options: argparse.Namespace) -> Iterator[list[Stack]]:
    """Start every side over the fast server."""
    server = answering_for_the_real_one(folder, upstream)
    with contextlib.ExitStack() as parts:
        direct = parts.enter_context(stacks.direct([upstream], folder / "direct"))
        sides: dict[str, Callable[[], contextlib.AbstractContextManager[Stack]]] = {
            "llama.cpp router": lambda: stacks.router(upstream, folder / "router"),
            "ours": lambda: stacks.ours(server, folder / "ours"),
        }
        if NGINX:
            sides["nginx alone"] = lambda: stacks.nginx_alone(direct.address, folder / "nginx")
            sides["ours behind nginx"] = lambda: stacks.ours(
                server, folder / "ours-nginx", behind_nginx=True
            )
        if options.with_litellm:
            sides["LiteLLM"] = lambda: stacks.litellm(
                LITELLM_VENV, direct.address, folder / "litellm"
            )
        chosen = [name for name in sides if not options.only or name in options.only]
        yield [direct, *(parts.enter_context(sides[name]()) for name in chosen)]


@contextlib.contextmanager
def real_stacks(folder: Path, only: Sequence[str] | None) -> Iterator[list[Stack]]:
    """Start the sides over a real llama-server each, with one and the same small model."""
    sides: dict[str, Callable[[], contextlib.AbstractContextManager[Stack]]] = {
        "llama.cpp router": lambda: stacks.router(None, folder / "real-router"),
        "ours": lambda: stacks.ours(None, folder / "real-ours"),
    }
    if NGINX:
        sides["ours behind nginx"] = lambda: stacks.ours(
            None, folder / "real-ours-nginx", behind_nginx=True
        )
    real, _ = find(None, os.environ.get("PATH"))
    argv = [real, "--model", stacks.REAL_MODEL, "--threads", "1", "--ctx-size", "8192"]
    with contextlib.ExitStack() as parts:
        direct = parts.enter_context(stacks.direct(argv, folder / "real-direct"))
        chosen = [name for name in sides if not only or name in only]
        yield [direct, *(parts.enter_context(sides[name]()) for name in chosen)]


def answering_for_the_real_one(folder: Path, upstream: Path) -> Path:
    """Return a program that serves as the fast server, and describes itself as the real one."""
    real, _ = find(None, os.environ.get("PATH"))
    script = folder / "llama-server"
    asked = f'case "$1" in --version|--help|--list-devices) exec {real} "$@";; esac'
    script.write_text(f'#!/bin/sh\n{asked}\nexec {upstream} "$@"\n')
    script.chmod(0o755)
    return script


# --- measuring -------------------------------------------------------------------------------


def one_round(
    sides: list[Stack],
    client: Path,
    cells: list[Cell],
    sizes: Sizes,
    *,
    turn: int,
    quiet_wait_s: float,
) -> dict[str, Any]:
    """Return the figures of each side; who goes first changes with the turn."""
    turn %= len(sides)
    figures: dict[str, dict[str, Any]] = {side.name: {"errors": 0} for side in sides}
    idle: list[float] = []
    for cell in cells:
        for side in (*sides[turn:], *sides[:turn]):
            if side.share < 1 and cell in (at_once_cell, idle_cell):
                continue  # minutes of failures: LiteLLM
            idle.append(wait_for_quiet(quiet_wait_s))
            one = figures[side.name]
            for key, value in cell(client, side, sizes).items():
                one[key] = value + one["errors"] if key == "errors" else value
    for one in figures.values():
        for key in ("p50_us", "16_p50_us") if "first_byte_p50_us" in one else ():
            added = one[f"first_byte_{key}"] - figures["direct"][f"first_byte_{key}"]
            one[f"added_{key}"] = added
    return {"idle_before_cells": statistics.mean(idle), **figures}


def requests_cell(client: Path, side: Stack, sizes: Sizes) -> dict[str, float]:
    count = max(100, int(sizes.requests * side.share))
    got = load(client, side, "--connections", 16, "--requests", count)
    return {
        "requests_per_s": count / got["wall_s"],
        "cpu_us_per_request": got["cpu_s"] / count * 1e6,
        "errors": got["errors"],
    }


def first_byte_cell(client: Path, side: Stack, sizes: Sizes) -> dict[str, float]:
    counts = [max(60, int(n * side.share)) for n in (sizes.one_client, sizes.sixteen_clients)]
    one, many = (
        load(client, side, "--stream", "--connections", connections, "--requests", count)
        for connections, count in zip((1, 16), counts, strict=True)
    )
    return {
        "first_byte_p50_us": one["first_byte_us"]["p50"],
        "first_byte_p99_us": one["first_byte_us"]["p99"],
        "first_byte_16_p50_us": many["first_byte_us"]["p50"],
        "first_byte_16_p99_us": many["first_byte_us"]["p99"],
        "errors": one["errors"] + many["errors"],
    }


def streams(
    client: Path, side: Stack, count: int, tokens: int, interval_us: int, **more: float
) -> dict[str, Any]:
    options = ("--connections", count, "--requests", count, "--tokens", tokens)
    return load(client, side, "--stream", *options, "--interval-us", interval_us, **more)


def paced_cell(client: Path, side: Stack, sizes: Sizes) -> dict[str, float]:
    count = 64 if side.share == 1 else 8
    got = streams(client, side, count, sizes.paced_tokens, 10_000)
    return {
        "cpu_s_per_100k_chunks": got["cpu_s"] / max(1, got["events"]) * 1e5,
        "errors": got["errors"],
    }


def full_cell(client: Path, side: Stack, sizes: Sizes) -> dict[str, float]:
    got = streams(client, side, 32, max(50, int(sizes.full_tokens * side.share)), 0)
    return {
        "chunks_per_s": got["events"] / got["wall_s"],
        "full_cpu_s_per_100k_chunks": got["cpu_s"] / max(1, got["events"]) * 1e5,
        "errors": got["errors"],
    }


def at_once_cell(client: Path, side: Stack, sizes: Sizes) -> dict[str, float]:
    tokens = sizes.at_once_tokens
    got = streams(client, side, 512, tokens, 100_000, meanwhile=tokens * 0.07)
    return {
        "at_once_first_byte_p99_ms": got["first_byte_us"]["p99"] / 1e3,
        "at_once_pss_mb": got.get("pss_mb", 0.0),
        "at_once_data_pss_mb": got.get("data_pss_mb", 0.0),
        "at_once_cpu_s": got["cpu_s"],
        "errors": got["errors"],
    }


def idle_cell(client: Path, side: Stack, sizes: Sizes) -> dict[str, float]:
    """Streams that have had their first event and wait a minute for the second."""
    options = ("--connections", 2000, "--requests", 2000, "--tokens", 2)
    options = (*options, "--interval-us", 60_000_000, "--hold-s", sizes.idle_s)
    got = load(client, side, "--stream", *options, meanwhile=sizes.idle_s)
    missing = 2000 - got["events"]
    return {"idle_pss_mb": got.get("pss_mb", 0.0), "errors": got["errors"] + max(0, missing)}


Cell = Callable[[Path, Stack, Sizes], dict[str, float]]
CELLS: dict[str, Cell] = {
    "requests": requests_cell,
    "first_byte": first_byte_cell,
    "paced": paced_cell,
    "full": full_cell,
    "at_once": at_once_cell,
    "idle": idle_cell,
}


def add_real(rounds: list[dict[str, Any]], sides: list[Stack], client: Path, sizes: Sizes) -> None:
    """Measure one-token streams of the real model, one client, and put them into the rounds."""
    for number, figures in enumerate(rounds):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            options = ("--foreign", "--connections", 1, "--requests", sizes.real_requests)
            got = load(client, side, "--stream", "--tokens", 1, *options)
            one = figures[side.name]
            one["real_first_byte_p50_us"] = got["first_byte_us"]["p50"]
            one["errors"] += got["errors"]


if __name__ == "__main__":
    main()
