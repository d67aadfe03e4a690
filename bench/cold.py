"""What the proxy adds to a cold start: a request for an unloaded model, to its first token.

`python -m bench.cold --json FILE [--rounds N] [--real-rounds N]`

Against the same command started by hand and asked as soon as it is ready: over the fast server in
C, which is up in milliseconds, so that what is left is the proxy; and over the real model. And ten
clients at once for one unloaded model. One part of a round after the other, by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.datapath import answering_for_the_real_one
from bench.processes import build
from bench.stacks import MODEL, environment
from tests.support.ports import free_port
from tests.support.running import REAL_MODEL, Proxy, running

CLIENTS = 10
DEADLINE_S = 60.0
#: as the manager's own probing: a bare start must not look ready later than it is
PROBE_EVERY_S = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--rounds", type=int, default=20, help="over the fast server; default 20")
    parser.add_argument("--real-rounds", type=int, default=5, help="over the model; default 5")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-cold-") as name:
        folder = Path(name)
        fast = answering_for_the_real_one(folder, build(folder)["upstream"])
        result = {"fast server": side(folder / "fast", fast, options.rounds)}
        if options.real_rounds:
            result["real model"] = side(folder / "real", None, options.real_rounds)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def side(folder: Path, server: Path | None, rounds: int) -> dict[str, Any]:
    """Return the figures over one kind of server (None: the real one), all in milliseconds."""
    folder.mkdir()
    settings: dict[str, Any] = {"enable_gpu_monitoring": False}
    model: dict[str, Any] = {"path": str(REAL_MODEL)}
    if server:
        settings["llama_server"] = str(server)
    else:  # its threads wait for each other in a loop: on a busy machine one is quickest
        model["args"] = ["--threads", "1"]
    with running(folder, {MODEL: model}, real=True, **settings) as proxy:
        first_token_at(proxy.port)
        measured = [one_round(proxy) for _ in range(rounds)]
    return {
        "rounds": measured,
        "median": {key: statistics.median(one[key] for one in measured) for key in measured[0]},
        "worst": {key: max(one[key] for one in measured) for key in measured[0]},
    }


def one_round(proxy: Proxy) -> dict[str, float]:
    unload(proxy)
    asked_at = time.time()
    through_s = first_token_at(proxy.port) - asked_at
    (row,) = proxy.rows("SELECT * FROM servers WHERE state = 'ready'")
    unload(proxy)
    bare_ready_s, bare_s = bare_start(json.loads(row["command"]), row["api_key"])
    unload(proxy)
    together = ten_clients(proxy)
    return {
        "proxy": through_s * 1e3,
        "bare": bare_s * 1e3,
        "added": (through_s - bare_s) * 1e3,
        "bare, to ready": bare_ready_s * 1e3,
        "bare, ready to first token": (bare_s - bare_ready_s) * 1e3,
        "asked to decided": (row["created_at"] - asked_at) * 1e3,
        "decided to ready": (row["ready_at"] - row["created_at"]) * 1e3,
        "ready to first token": (asked_at + through_s - row["ready_at"]) * 1e3,
        "ten clients, first to last": (max(together) - min(together)) * 1e3,
    }


def unload(proxy: Proxy) -> None:
    proxy.post(f"/api/models/{MODEL}/unload", timeout_s=DEADLINE_S).raise_for_status()


def ten_clients(proxy: Proxy) -> list[float]:
    """Return when each of ten got its first token."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda _: first_token_at(proxy.port), range(CLIENTS)))


def first_token_at(port: int, api_key: str = "none") -> float:
    """Ask for one token and return when it came (unix seconds)."""
    body = {
        **{"model": MODEL, "max_tokens": 1, "stream": True, "temperature": 0},
        "messages": [{"role": "user", "content": "hi"}],
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        while line := answer.readline():
            if b'"content":"' in line or b'"content": "' in line:
                came_at = time.time()
                answer.read()
                return came_at
    raise RuntimeError(f"no token; status {answer.status}")


def bare_start(command: list[str], api_key: str) -> tuple[float, float]:
    """Start a command by hand; returns seconds from there to ready, and to the first token."""
    port = free_port()
    command = [*command]
    command[command.index("--port") + 1] = str(port)
    env = {**environment(), "LLAMA_API_KEY": api_key, "CUDA_VISIBLE_DEVICES": ""}
    began = time.time()
    null = subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdin=null, stdout=null, stderr=null) as server:
        try:
            while not healthy(port):
                if server.poll() is not None or time.time() > began + DEADLINE_S:
                    raise RuntimeError("the bare server did not come up")
                time.sleep(PROBE_EVERY_S)
            ready_s = time.time() - began
            return ready_s, first_token_at(port, api_key) - began
        finally:
            server.kill()


def healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return sock.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def table(result: Mapping[str, Mapping[str, Any]]) -> str:
    titles = next(iter(result.values()))["median"]
    rows = [
        [key, *(f"{one['median'][key]:.1f} ({one['worst'][key]:.1f})" for one in result.values())]
        for key in titles
    ]
    return tabulate(rows, ["ms, median (worst)", *result])


if __name__ == "__main__":
    main()
