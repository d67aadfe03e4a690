"""How fast /health answers: idle, under load, during loads, with NVML hanging, without a manager.

`python -m bench.health --json FILE [--seconds N]` starts a proxy of its own over the stand-in NVML
and the stand-in llama-server. Every second question goes to a bare HTTP server in a process of its
own that answers as many bytes: what it takes is this machine's and the asker's part.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
from tabulate import tabulate

from bench.polls import Poll, percentile_ms, poll
from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import build, environment
from tests.support.fakes.world import Fault, WorldFile
from tests.support.ports import free_pool, free_port
from tests.support.running import Proxy, fake_model, running, wait_until

STREAMS = 16
#: seconds between two tokens of a stream: together they are STREAMS / TOKEN_S events a second
TOKEN_S = 0.02
POLL_EVERY_S = 0.02
TIMEOUT_S = 5.0
#: the goal (SPEC 2)
GOAL_MS = 10.0
MODELS = {
    "busy": fake_model(token_s=TOKEN_S, tokens=1_000_000),
    **{name: fake_model(load_s=0.4) for name in ("a", "b")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--seconds", type=float, default=20, help="of each scene; default 20")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-health-") as name:
        folder = Path(name)
        world = WorldFile(folder / "world", nvml.unequal_pair())
        env = environment(build(folder), world)
        pool = {"size": 2, "port_start": free_pool(2)}
        with running(folder, MODELS, env=env, server_pool=pool, min_residency=0) as proxy:
            proxy.chat("a").raise_for_status()
            scenes = play(proxy, world, options.seconds)
    options.json.write_text(json.dumps(scenes, indent=1) + "\n")
    print(table(scenes))


def play(proxy: Proxy, world: WorldFile, seconds: float) -> dict[str, Any]:
    """Return the figures of every scene."""
    scenes: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "idle": contextlib.nullcontext,
        "16 streams": lambda: streaming(proxy),
        "models load and make room": lambda: loading(proxy),
        "streams and loads": lambda: both(proxy),
        "NVML hangs": lambda: hanging(proxy, world),
        "NVML hangs, streams": lambda: both(proxy, hanging(proxy, world)),
        "manager gone": lambda: without_manager(proxy),
        "manager gone, streams": lambda: both(proxy, without_manager(proxy)),
    }
    found = {}
    with bare_server(len(requests.get(f"{proxy.url}/health").content)) as bare_port:
        for name, scene in scenes.items():
            with scene():
                found[name] = measure(proxy.port, bare_port, seconds)
    return found


def measure(port: int, bare_port: int, seconds: float) -> dict[str, Any]:
    ours: list[Poll] = []
    bare: list[Poll] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ours.append(poll(port, timeout_s=TIMEOUT_S))
        time.sleep(POLL_EVERY_S / 2)
        bare.append(poll(bare_port, timeout_s=TIMEOUT_S))
        time.sleep(POLL_EVERY_S / 2)
    return {
        "polls": len(ours),
        "answered_200": sum(poll.available for poll in ours),
        "degraded": sum(poll.said == "degraded" for poll in ours),
        **{f"{name}_ms": percentile_ms(ours, share) for name, share in SHARES.items()},
        **{f"bare_{name}_ms": percentile_ms(bare, share) for name, share in SHARES.items()},
        "p99_under_10_ms": percentile_ms(ours, 0.99) < GOAL_MS,
    }


SHARES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


# --- scenes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def streaming(proxy: Proxy) -> Iterator[None]:
    """Keep streams open and read for the length of the block."""
    ended = threading.Event()

    def read() -> None:
        answer = proxy.chat("busy", stream=True, max_tokens=1_000_000)
        for _ in answer.iter_lines():
            if ended.is_set():
                break
        answer.close()

    with threads(read, STREAMS, ended):
        wait_until(lambda: proxy.states().get("busy") == "ready", what="the streams' model")
        yield


@contextlib.contextmanager
def loading(proxy: Proxy) -> Iterator[None]:
    """Load two models in turn, each making room for the other."""
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            for name in ("a", "b"):
                proxy.chat(name)

    with threads(load, 1, ended):
        yield


@contextlib.contextmanager
def hanging(proxy: Proxy, world: WorldFile) -> Iterator[None]:
    """Have every look at the GPUs hang for 5 s."""
    world.change(faults=(Fault(function="nvmlDeviceGetMemoryInfo_v2", hang_s=5),))
    wait_until(lambda: proxy.health()["observed_age"] > 2.5, what="a look that hangs")
    yield
    world.change(faults=())
    wait_until(lambda: proxy.health()["observed_age"] < 2, what="looks go on")


@contextlib.contextmanager
def without_manager(proxy: Proxy) -> Iterator[None]:
    """Stop the manager's process: gone, but not started again while we measure."""
    pid = proxy.manager_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: proxy.health()["status"] == "degraded", what="its silence is noticed")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: proxy.health()["status"] == "ok", what="it is back")


@contextlib.contextmanager
def both(
    proxy: Proxy, other: contextlib.AbstractContextManager[None] | None = None
) -> Iterator[None]:
    """Streams together with something else; loads, unless another thing is named."""
    with streaming(proxy), other or loading(proxy):
        yield


@contextlib.contextmanager
def threads(work: Callable[[], None], number: int, ended: threading.Event) -> Iterator[None]:
    running = [threading.Thread(target=work) for _ in range(number)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in running:
            thread.join()


# --- the bare server -----------------------------------------------------------------------------


@contextlib.contextmanager
def bare_server(size_bytes: int) -> Iterator[int]:
    """Run a server that does nothing but answer; yields its port."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=serve_bare, args=(port, size_bytes), daemon=True
    )
    process.start()
    try:
        wait_until(lambda: poll(port, timeout_s=1).available, what="the bare server")
        yield port
    finally:
        process.terminate()
        process.join()


def serve_bare(port: int, size_bytes: int) -> None:
    asyncio.run(_serve_bare(port, b'{"status": "ok"}'.ljust(size_bytes)))


async def _serve_bare(port: int, body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


def table(scenes: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        [
            *(name, found["polls"], found["answered_200"], found["degraded"]),
            *(found["p50_ms"], found["p99_ms"], found["max_ms"]),
            *(found["bare_p50_ms"], found["bare_p99_ms"]),
        ]
        for name, found in scenes.items()
    ]
    headers = [
        "/health",
        "polls",
        "200",
        "degraded",
        "p50 ms",
        "p99",
        "max",
        "bare p50",
        "bare p99",
    ]
    return tabulate(lines, headers, floatfmt=".2f")


if __name__ == "__main__":
    main()
