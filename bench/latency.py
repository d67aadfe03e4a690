"""Time to first token: a server asked directly against through the proxy, and cold loads.

`python -m bench.latency --json FILE [--rounds N]` starts a proxy of its own with the real model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tabulate import tabulate

from smartproxy.llama.binary import child_environment
from tests.support.ports import free_port
from tests.support.running import REAL_MODEL, Proxy, running

MODEL = "smollm2-135m"
WARM_UP_ROUNDS = 3
COLD_ROUNDS = 3
LOAD_DEADLINE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--rounds", type=int, default=40, help="of each side; default 40")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds wants 2 or more")
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as folder:
        models = {MODEL: {"path": str(REAL_MODEL)}}
        with running(Path(folder), models, real=True) as proxy:
            result = {"warm": warm(proxy, options.rounds), "cold": cold(proxy)}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def warm(proxy: Proxy, rounds: int) -> dict[str, Any]:
    """Measure a loaded model both ways, one after the other in every round."""
    proxy.chat(MODEL).raise_for_status()
    server = ready_server(proxy)
    key = {"Authorization": f"Bearer {server['api_key']}"}
    sides: dict[str, Callable[[], float]] = {
        "direct": lambda: first_token_s(server["port"], key),
        "proxy": lambda: first_token_s(proxy.port, {}),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + WARM_UP_ROUNDS):
        # who goes first changes, so that neither always finds the processor as the other left it
        for name in sorted(sides, reverse=number % 2 == 0):
            took_s = sides[name]()
            if number >= WARM_UP_ROUNDS:
                times[name].append(took_s)
    added = [through - direct for direct, through in zip(*times.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rounds": rounds,
        **{name: spread_ms(values) for name, values in times.items()},
        "added_ms": spread_ms(added),
        "ratio_of_medians": round(medians["proxy"] / medians["direct"], 3),
    }


def cold(proxy: Proxy) -> dict[str, Any]:
    """Measure loads: through the proxy to the first token, and the same command started bare.

    `load_s` is what the proxy recorded for its own start, spawn to ready.
    """
    rounds = []
    for _ in range(COLD_ROUNDS):
        proxy.post(f"/api/models/{MODEL}/unload", timeout_s=60).raise_for_status()
        through_s = first_token_s(proxy.port, {})
        server = ready_server(proxy)
        proxy.post(f"/api/models/{MODEL}/unload", timeout_s=60).raise_for_status()
        bare_ready_s, bare_first_token_s = bare_start(json.loads(server["command"]))
        rounds.append(
            {
                "proxy_first_token_s": round(through_s, 3),
                "server_load_s": round(server["load_s"], 3),
                "bare_ready_s": round(bare_ready_s, 3),
                "bare_first_token_s": round(bare_first_token_s, 3),
            }
        )
    return {
        "rounds": rounds,
        "median": {key: statistics.median(r[key] for r in rounds) for key in rounds[0]},
    }


def ready_server(proxy: Proxy) -> dict[str, Any]:
    (server,) = proxy.rows("SELECT * FROM servers WHERE state = 'ready'")
    return server


def first_token_s(port: int, headers: Mapping[str, str]) -> float:
    """Return seconds from connecting to the first event that carries text."""
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "."}, {"role": "user", "content": "hi"}],
        **{"max_tokens": 1, "stream": True, "temperature": 0, "id_slot": 0},
        "cache_prompt": True,  # the less the model does, the clearer is what the proxy adds
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=LOAD_DEADLINE_S)
    sent_at = time.perf_counter()
    try:
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {**kind, **headers})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"port {port} answered {answer.status}: {answer.read()[:300]!r}")
        while line := answer.readline():
            if carries_text(line):
                took_s = time.perf_counter() - sent_at
                answer.read()
                return took_s
    finally:
        connection.close()
    raise RuntimeError(f"port {port}: the stream ended without a token")


def carries_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    event = json.loads(line[6:])
    if "error" in event:
        raise RuntimeError(f"error in the stream: {event['error']}")
    return any(choice["delta"].get("content") for choice in event["choices"])


def bare_start(command: list[str]) -> tuple[float, float]:
    """Start the proxy's own command by hand; returns s to ready and s to the first token."""
    port = free_port()
    command = list(command)
    command[command.index("--port") + 1] = str(port)
    environment = child_environment(os.environ, Path(command[0]).parent)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    started_at = time.perf_counter()
    null = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=null, stderr=null) as server:
        try:
            wait_for_health(server, port)
            ready_s = time.perf_counter() - started_at
            return ready_s, ready_s + first_token_s(port, {})
        finally:
            server.kill()


def wait_for_health(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + LOAD_DEADLINE_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the bare server ended with {server.returncode}")
        connection = HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.005)
    raise RuntimeError(f"the bare server was not ready within {LOAD_DEADLINE_S} s")


def spread_ms(values_s: list[float]) -> dict[str, float]:
    """Return median and p99 (the largest of fewer than 100 values) in milliseconds."""
    p99_s = sorted(values_s)[min(len(values_s) - 1, int(len(values_s) * 0.99))]
    return {"median": round(statistics.median(values_s) * 1e3, 3), "p99": round(p99_s * 1e3, 3)}


def table(result: Mapping[str, Any]) -> str:
    measured = result["warm"]
    rows = [
        [name, measured[key]["median"], measured[key]["p99"]]
        for name, key in (("direct", "direct"), ("proxy", "proxy"), ("added", "added_ms"))
    ]
    first = tabulate(rows, ["time to first token", "median ms", "p99 ms"], floatfmt=".2f")
    colds = [[key.removesuffix("_s"), value] for key, value in result["cold"]["median"].items()]
    second = tabulate(colds, ["cold load", "median s"], floatfmt=".3f")
    return (
        f"{first}\nproxy / direct: {measured['ratio_of_medians']} "
        f"({measured['rounds']} rounds)\n\n{second}\n({len(result['cold']['rounds'])} rounds)"
    )


if __name__ == "__main__":
    main()
