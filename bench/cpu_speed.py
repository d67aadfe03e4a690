"""CPU-only generation: tokens per second through the proxy against llama-server started alone.

`python -m bench.cpu_speed --json FILE [--rounds N]` runs the real model both ways on this machine:
in every round one answer of each, who goes first changing, so that both see the same machine.
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
from pathlib import Path
from typing import Any

import requests
from tabulate import tabulate

from bench.latency import wait_for_health
from smartproxy.manager import binary
from smartproxy.manager.binary import child_environment
from tests.running import REAL_MODEL, free_port, running

MODEL = "smollm2-135m"
WARM_UP_ROUNDS = 1
TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-cpu-") as folder:
        models = {MODEL: {"path": str(REAL_MODEL)}}
        proxied = running(Path(folder), models, real=True, enable_gpu_monitoring=False)
        with proxied as proxy, alone() as port:
            result = compare({"alone": port, "proxy": proxy.port}, options.rounds)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


@contextlib.contextmanager
def alone() -> Iterator[int]:
    """Run llama-server as its user does without us: model and port, the rest its own defaults."""
    path, library_dir = binary.find(None, os.environ.get("PATH"))
    port = free_port()
    command = [str(path), "--model", str(REAL_MODEL), "--port", str(port), "--ctx-size", "8192"]
    null = subprocess.DEVNULL
    environment = child_environment(os.environ, library_dir)
    with subprocess.Popen(command, env=environment, stdout=null, stderr=null) as server:
        try:
            wait_for_health(server, port)
            yield port
        finally:
            server.kill()


def compare(ports: dict[str, int], rounds: int) -> dict[str, Any]:
    """Return the medians of both and of their ratio in each round."""
    speeds: dict[str, list[float]] = {name: [] for name in ports}
    for number in range(rounds + WARM_UP_ROUNDS):
        for name in sorted(ports, reverse=number % 2 == 0):
            speed = tokens_per_second(ports[name])
            if number >= WARM_UP_ROUNDS:
                speeds[name].append(speed)
    ratios = [mine / own for mine, own in zip(speeds["proxy"], speeds["alone"], strict=True)]
    return {
        "rounds": rounds,
        "tokens": TOKENS,
        **{f"{name}_tokens_per_s": round(statistics.median(s), 1) for name, s in speeds.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(edge, 3) for edge in statistics.quantiles(ratios, n=4)[::2]],
    }


def tokens_per_second(port: int) -> float:
    """Return the speed of one answer, from asking to its last byte."""
    body = {
        **{"model": MODEL, "prompt": "Once upon a time", "max_tokens": TOKENS},
        **{"temperature": 0, "ignore_eos": True, "cache_prompt": False},
    }
    began = time.perf_counter()
    answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=300)
    took_s = time.perf_counter() - began
    answer.raise_for_status()
    written: int = answer.json()["usage"]["completion_tokens"]
    if written != TOKENS:
        raise RuntimeError(f"port {port} wrote {written} tokens instead of {TOKENS}")
    return written / took_s


def table(result: dict[str, Any]) -> str:
    lines = [
        ["llama-server alone", result["alone_tokens_per_s"]],
        ["through the proxy", result["proxy_tokens_per_s"]],
    ]
    low, high = result["ratio_quartiles"]
    return (
        f"{tabulate(lines, [f'CPU, {TOKENS} tokens', 'tokens/s (median)'])}\n"
        f"proxy / alone, per round: median {result['ratio_median']}, middle half {low} to {high}"
        f" ({result['rounds']} rounds)"
    )


if __name__ == "__main__":
    main()
