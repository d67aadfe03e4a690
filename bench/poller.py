"""What a relayed chunk costs over the proxy's own poller, and over uvloop's loop.

`python -m bench.poller --json FILE [--rounds N] [--seconds S] [--scenes NAME ...]`
(`--json /dev/stdout` prints it)

One process relays between pairs of TCP sockets. Both sides use the proxy's Channel and do the same
for each chunk; only the loop and the way it tells about a socket differ. The sides take turns. Each
turn has new processes: one writes the chunks, one relays, one reads. Only the relaying process is
measured, by its CPU seconds, from the first chunk to the last. Ratios are taken within a round.

uvloop is not a requirement of the proxy. Without it this program exits with status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import resource
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.figures import cell, machine, spread
from smartproxy.proxy.wire.channel import HIGH_WATER_BYTES, Channel
from smartproxy.proxy.wire.poller import READ, WRITE, Pollable, PollingLoop

OURS, UVLOOP = "poller", "uvloop"
#: about one token's event of a llama-server
CHUNK = b"x" * 250
CHUNKS_PER_S = 100
TURN_DEADLINE_S = 120.0
#: each figure's title
FIGURES = {
    "cpu_us_per_chunk": "CPU per chunk, us",
    "cpu_us_per_read": "CPU per read, us",
    "chunks_per_read": "chunks per read",
    "peak_mb": "most memory (RSS), MB",
}
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is relayed at the same time."""

    title: str
    pairs: int
    #: pairs that get their chunks at the same instant, as the slots of one llama-server do
    together: int = 1
    #: chunks of each pair, written as fast as they are taken; 0: CHUNKS_PER_S instead
    unpaced_chunks: int = 0


SCENES = {
    "alone": Scene(title="32 streams at 100/s, each in its own time", pairs=32),
    "fours": Scene(title="32 streams at 100/s, 4 at once", pairs=32, together=4),
    "together": Scene(title="32 streams at 100/s, all at once", pairs=32, together=32),
    "full": Scene(title="1 stream at full speed", pairs=1, unpaced_chunks=200_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--rounds", type=int, default=9, help="of each side; default 9")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a paced turn; default 3")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=[*SCENES])
    options = parser.parse_args()
    if importlib.util.find_spec("uvloop") is None:
        print("uvloop is not installed here: pip install uvloop", file=sys.stderr)
        sys.exit(2)
    scenes = {name: SCENES[name] for name in options.scenes}
    result: dict[str, Any] = {"machine": machine(), "uvloop": uvloop_version(), "scenes": {}}
    result["chunk_bytes"] = len(CHUNK)
    for name, scene in scenes.items():
        rounds = [one_round(scene, options.seconds, turn=turn) for turn in range(options.rounds)]
        result["scenes"][name] = {**asdict(scene), "rounds": rounds, **summary(rounds)}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["scenes"]))


def one_round(scene: Scene, seconds: float, *, turn: int) -> dict[str, dict[str, float]]:
    """Measure both sides; who goes first changes with every round."""
    sides = [OURS, UVLOOP] if turn % 2 == 0 else [UVLOOP, OURS]
    return {side: measure(side, scene, seconds) for side in sides}


def measure(side: str, scene: Scene, seconds: float) -> dict[str, float]:
    """Relay a scene once, over one side's loop. Raises RuntimeError where bytes were lost."""
    chunks = scene.unpaced_chunks or round(seconds * CHUNKS_PER_S)
    with contextlib.ExitStack() as stack:
        pairs_in = [stack.enter_context(connected()) for _ in range(scene.pairs)]
        pairs_out = [stack.enter_context(connected()) for _ in range(scene.pairs)]
        relayed = list(
            zip([taken for _, taken in pairs_in], [given for given, _ in pairs_out], strict=True)
        )
        sinks = [taken for _, taken in pairs_out]
        received = stack.enter_context(child(sink, sinks))
        relay = stack.enter_context(child(relay_all, side, relayed))
        answer(relay)  # it is about to read
        stack.enter_context(child(generate, [given for given, _ in pairs_in], chunks, scene))
        found: dict[str, float] = answer(relay)
        wanted_bytes = scene.pairs * chunks * len(CHUNK)
        if (got_bytes := answer(received)) != wanted_bytes:
            raise RuntimeError(f"{side}: {got_bytes} bytes came out, {wanted_bytes} went in")
    total = scene.pairs * chunks
    return {
        "cpu_us_per_chunk": found["cpu_s"] / total * 1e6,
        "cpu_us_per_read": found["cpu_s"] / found["reads"] * 1e6,
        "chunks_per_read": total / found["reads"],
        "peak_mb": found["peak_mb"],
    }


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with one, other:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield one, other


@contextlib.contextmanager
def child(work: Any, *arguments: Any) -> Iterator[Connection]:
    """Run a function in a process of its own; its first argument is where it sends its answers."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        process.join(1)
        process.kill()
        process.join()


def answer(connection: Connection) -> Any:
    """Wait for a child's next answer. Raises EOFError if it ended, TimeoutError."""
    if not connection.poll(TURN_DEADLINE_S):
        raise TimeoutError(f"no answer within {TURN_DEADLINE_S:g} s")
    return connection.recv()


def generate(
    _answers: Connection, socks: Sequence[socket.socket], chunks: int, scene: Scene
) -> None:
    """Write every chunk of every pair, then say that this was the end."""
    interval_s = 1 / CHUNKS_PER_S
    begin_s = time.monotonic()
    for number in range(chunks):
        for place, sock in enumerate(socks):
            if not scene.unpaced_chunks:
                within = place // scene.together * scene.together / len(socks)
                wait_until(begin_s + (number + within) * interval_s)
            sock.sendall(CHUNK)
    for sock in socks:
        sock.shutdown(socket.SHUT_WR)


def wait_until(at_s: float) -> None:
    left_s = at_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def sink(answers: Connection, socks: Sequence[socket.socket]) -> None:
    """Read all sockets to their ends and tell how many bytes there were."""
    got_bytes = 0
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ, sock)
        while selector.get_map():
            for key, _ in selector.select():
                data = key.data.recv(1 << 18)
                got_bytes += len(data)
                if not data:
                    selector.unregister(key.data)
    answers.send(got_bytes)


def relay_all(
    answers: Connection, side: str, socks: Sequence[tuple[socket.socket, socket.socket]]
) -> None:
    """Relay between pairs until all have ended; tell `cpu_s`, `reads` and `peak_mb`."""
    loop: Any = PollingLoop() if side == OURS else uvloop_loop()
    done = loop.create_future()
    streams: list[Stream] = []

    def ended() -> None:
        if all(stream.ended for stream in streams):
            done.set_result(None)

    streams += [Stream(loop, taken, given, ended) for taken, given in socks]
    answers.send("ready")
    before_s = cpu_s()
    loop.run_until_complete(done)
    used_s = cpu_s() - before_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reads = sum(stream.reads for stream in streams)
    answers.send({"cpu_s": used_s, "reads": reads, "peak_mb": peak_mb})


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Stream:
    """One answer on its way: what `relay.upstream` does for a chunk, without looking into it."""

    def __init__(self, loop: Any, taken: socket.socket, given: socket.socket, on_end: Any) -> None:
        for sock in (taken, given):
            sock.setblocking(False)
        self._loop = loop
        self._on_end = on_end
        self._server = Channel(loop, taken, self._on_data, self._on_server_end)
        self._client = Channel(loop, given, lambda _data: None, lambda _error: None)
        self._client.on_drain = self._drained
        self._heard_at = loop.time()
        self._over = False
        self.ended = False
        self.reads = 0
        self._server.read(True)

    def _on_data(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self.reads += 1
        self._client.write(data)
        if self._client.buffered_bytes > HIGH_WATER_BYTES:
            self._server.read(False)

    def _on_server_end(self, error: OSError | None) -> None:
        if error:
            raise error
        self._over = True
        self._drained()

    def _drained(self) -> None:
        if not self._over:
            self._server.read(True)
        elif not self._client.buffered_bytes and not self.ended:
            self.ended = True
            self._server.detach()
            self._client.detach().shutdown(socket.SHUT_WR)
            self._on_end()


class Readers:
    """What a Channel asks of a poller, by a loop's add_reader and add_writer.

    A fault in an owner goes to the loop's exception handler, not to `failed`. The product would
    have to catch it in Channel, where catching costs nothing until there is a fault.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def watch(self, fd: int, owner: Pollable, before: int, wanted: int) -> None:
        """As Poller.watch."""
        changed = before ^ wanted
        if changed & READ:
            if wanted & READ:
                self._loop.add_reader(fd, owner.readable)
            else:
                self._loop.remove_reader(fd)
        if changed & WRITE:
            if wanted & WRITE:
                self._loop.add_writer(fd, owner.writable)
            else:
                self._loop.remove_writer(fd)


def uvloop_loop() -> Any:
    """Return uvloop's loop with the one attribute more that a Channel needs."""
    loop = importlib.import_module("uvloop").new_event_loop()
    loop.poller = Readers(loop)
    return loop


def uvloop_version() -> str:
    return importlib.metadata.version("uvloop")


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the spread of every figure of both sides, and of the ratio uvloop / ours."""
    figures = {
        figure: {side: spread([one[side][figure] for one in rounds]) for side in (OURS, UVLOOP)}
        for figure in FIGURES
    }
    ratios = {
        figure: spread([one[UVLOOP][figure] / one[OURS][figure] for one in rounds])
        for figure in FIGURES
    }
    median_ratio = ratios["cpu_us_per_chunk"]["median"]
    return {"figures": figures, "ratios": ratios, "median_ratio": median_ratio}


def table(scenes: dict[str, Any]) -> str:
    rows = [
        [
            scene["title"] if not place else "",
            title,
            cell(scene["figures"][figure][OURS]),
            cell(scene["figures"][figure][UVLOOP]),
            cell(scene["ratios"][figure]),
        ]
        for scene in scenes.values()
        for place, (figure, title) in enumerate(FIGURES.items())
    ]
    return tabulate(rows, ["median (min-max)", "", OURS, UVLOOP, "uvloop / poller"])


if __name__ == "__main__":
    main()
