"""CPU-only generation: tokens per second through the proxy against llama-server started alone.

`python -m bench.cpu_speed --json FILE [--rounds N]` runs the real model both ways on this machine:
in every round one answer of each, who goes first changing, so that both see the same machine.
Beside the clock it tells processor time, which others on the machine disturb less; so does
`--threads 1`, as no thread then waits for another that was put off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from tabulate import tabulate

from bench.latency import wait_for_health
from smartproxy.llama import binary
from smartproxy.llama.binary import child_environment
from tests.support.ports import free_port
from tests.support.running import REAL_MODEL, running

MODEL = "smollm2-135m"
WARM_UP_ROUNDS = 1
TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    parser.add_argument("--threads", type=int, help="of each server; default: its own choice")
    options = parser.parse_args()
    threads = ["--threads", str(options.threads)] if options.threads else []
    with tempfile.TemporaryDirectory(prefix="bench-cpu-") as folder:
        models = {MODEL: {"path": str(REAL_MODEL), "args": threads}}
        proxied = running(Path(folder), models, real=True, enable_gpu_monitoring=False)
        with proxied as proxy, alone(threads) as own:
            proxy.chat(MODEL).raise_for_status()
            (row,) = proxy.rows("SELECT pid FROM servers WHERE state = 'ready'")
            ours = Side(port=proxy.port, server=psutil.Process(row["pid"]))
            result = compare({"alone": own, "proxy": ours}, options.rounds)
    result["threads"] = options.threads
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Where to ask, and whose processor time to count."""

    port: int
    server: psutil.Process


@contextlib.contextmanager
def alone(threads: list[str]) -> Iterator[Side]:
    """Run llama-server as its user does without us: model and port, the rest its own defaults."""
    path, library_dir = binary.find(None, os.environ.get("PATH"))
    port = free_port()
    command = [str(path), "--model", str(REAL_MODEL), "--port", str(port), "--ctx-size", "8192"]
    command += threads
    null = subprocess.DEVNULL
    environment = child_environment(os.environ, library_dir)
    with subprocess.Popen(command, env=environment, stdout=null, stderr=null) as server:
        try:
            wait_for_health(server, port)
            yield Side(port=port, server=psutil.Process(server.pid))
        finally:
            server.kill()


def compare(sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """Return the medians of both, and of their ratio in each round."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + WARM_UP_ROUNDS):
        for name in sorted(sides, reverse=number % 2 == 0):
            wall_s, processor_s = answer(sides[name])
            if number >= WARM_UP_ROUNDS:
                wall[name].append(TOKENS / wall_s)
                processor[name].append(TOKENS / processor_s)
    return {
        "rounds": rounds,
        "tokens": TOKENS,
        "tokens_per_s": _compared(wall),
        "tokens_per_processor_s": _compared(processor),
    }


def _compared(speeds: dict[str, list[float]]) -> dict[str, float]:
    ratios = [mine / own for mine, own in zip(speeds["proxy"], speeds["alone"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        **{name: round(statistics.median(values), 2) for name, values in speeds.items()},
        **{"ratio_low": round(low, 3), "ratio": round(median, 3), "ratio_high": round(high, 3)},
    }


def answer(side: Side) -> tuple[float, float]:
    """Ask for one answer; returns its seconds by the clock, and those of its server's threads."""
    body = {
        **{"model": MODEL, "prompt": "Once upon a time", "max_tokens": TOKENS},
        **{"temperature": 0, "ignore_eos": True, "cache_prompt": False},
    }
    used_s, began = _processor_s(side.server), time.perf_counter()
    said = requests.post(f"http://127.0.0.1:{side.port}/v1/completions", json=body, timeout=300)
    took_s = time.perf_counter() - began
    said.raise_for_status()
    written: int = said.json()["usage"]["completion_tokens"]
    if written != TOKENS:
        raise RuntimeError(f"port {side.port} wrote {written} tokens instead of {TOKENS}")
    return took_s, _processor_s(side.server) - used_s


def _processor_s(server: psutil.Process) -> float:
    times = server.cpu_times()
    used_s: float = times.user + times.system
    return used_s


def table(result: dict[str, Any]) -> str:
    lines = [
        [told, *(result[key][name] for name in ("alone", "proxy", "ratio", *SPREAD))]
        for told, key in (
            ("tokens/s", "tokens_per_s"),
            ("tokens per second of processor time", "tokens_per_processor_s"),
        )
    ]
    headers = ["median of rounds", "alone", "proxy", "ratio", "quartile", "quartile"]
    threads = f"{result['threads']} threads" if result["threads"] else "its own number of threads"
    return (
        f"{tabulate(lines, headers)}\n"
        f"({result['rounds']} rounds of {result['tokens']} tokens, CPU, {threads})"
    )


SPREAD = ("ratio_low", "ratio_high")


if __name__ == "__main__":
    main()
