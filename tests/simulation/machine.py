"""The machine that a simulation runs on: llama-servers, GPUs, ports, the manager's doorbell.

Servers imitate what matters to the proxy: they load for a while, hold GPU memory (given back a
moment after their end), finish what is in flight at a first TERM, crash, hang, or find their port
taken.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psutil

from smartproxy.gpus.types import Gpu, GpuProcess, GpuSnapshot
from smartproxy.lifetime import OWNER_VARIABLE
from smartproxy.llama.http import Counters
from smartproxy.types import GIB
from tests.simulation.scheduler import Event, Scheduler

#: how a server behaves, by how often: (name, weight)
MANNERS = {
    "good": 12,
    "slow": 3,
    "dies loading": 1,
    "hangs loading": 1,
    "out of memory": 1,
    "ignores TERM": 1,
    "spawn fails": 1,
    "log moves": 1,
}
GOOD = {"good": 1}


@dataclass(eq=False, kw_only=True)
class Server:
    """One llama-server process."""

    pid: int
    model: str
    port: int
    argv: Sequence[str]
    env: Mapping[str, str]
    manner: str
    start_ticks: int
    log: int
    #: by GPU uuid
    memory: dict[str, int]
    ended: Event
    ready: bool = False
    exit_code: int | None = None
    busy: int = 0
    terms: int = 0
    #: called at its end
    at_end: list[Callable[[], None]] = field(default_factory=list)

    def say(self, text: str) -> None:
        os.write(self.log, text.encode() + b"\n")


class Popen:
    """What `subprocess.Popen` returns for a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.pid = server.pid
        self.args = server.argv

    @property
    def returncode(self) -> int | None:
        return self._server.exit_code

    def poll(self) -> int | None:
        return self._server.exit_code

    def wait(self, timeout: float | None = None) -> int:
        if not self._server.ended.wait(timeout):
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        assert self._server.exit_code is not None
        return self._server.exit_code


class Memory:
    """As psutil tells it."""

    rss = 100 << 20


class Seen:
    """A process as psutil shows it."""

    def __init__(self, machine: Machine, pid: int) -> None:
        server = machine.servers.get(pid)
        if server is None:
            raise psutil.NoSuchProcess(pid)
        self._machine, self._server = machine, server
        self.pid = pid

    def status(self) -> str:
        return str(psutil.STATUS_RUNNING)

    def cmdline(self) -> list[str]:
        return list(self._server.argv)

    def environ(self) -> dict[str, str]:
        return dict(self._server.env)

    def memory_info(self) -> Memory:
        return Memory()

    def io_counters(self) -> Any:
        moves = self._server.manner == "log moves"
        reads = int(self._machine.scheduler.now * 10) << 20 if moves else 0
        return type("Counters", (), {"read_chars": reads})()


class Machine:
    """What outlives every process of ours."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        gpus: Sequence[int],
        model_bytes: Mapping[str, int],
        state_dir: str,
    ) -> None:
        self.scheduler = scheduler
        self.gpu_bytes = {f"GPU-{index}": size for index, size in enumerate(gpus)}
        self.model_bytes = model_bytes
        self.state_dir = state_dir
        self.servers: dict[int, Server] = {}
        self.manners: Mapping[str, int] = MANNERS
        #: share of HTTP calls to servers that get no answer
        self.silent_share = 0.0
        self.strangers_ports: set[int] = set()
        #: (seconds when it is back, GPU, bytes) of servers that ended
        self.coming_back: list[tuple[float, str, int]] = []
        self.failed_gpus: set[str] = set()
        self.nvml_hangs_until = 0.0
        self.bell: Bell | None = None
        self.workers: dict[str, Any] = {}
        self._pids = 5000
        #: told when a second process of a model starts, and such
        self.wrongs: list[str] = []

    # processes

    def popen(self, argv: Sequence[str], *, env: Mapping[str, str], stdout: int, **_: Any) -> Popen:
        scheduler = self.scheduler
        scheduler.pause()
        manner = scheduler.random.choices(list(self.manners), list(self.manners.values()))[0]
        if manner == "spawn fails":
            scheduler.note("spawn fails")
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        self._pids += 1
        said = dict(pairwise(argv))
        model, port = said["--alias"], int(said["--port"])
        uuids = [uuid for uuid in env["CUDA_VISIBLE_DEVICES"].split(",") if uuid]
        share = int(self.model_bytes[model] * 0.8)
        server = Server(
            pid=self._pids,
            model=model,
            port=port,
            argv=argv,
            env=env,
            manner=manner,
            start_ticks=self._pids,
            log=os.dup(stdout),
            memory={uuid: share // len(uuids) for uuid in uuids},
            ended=Event(scheduler),
        )
        others = [each for each in self.servers.values() if each.model == model]
        if others:
            self.wrongs.append(f"pid {server.pid} and {others[0].pid} both serve {model}")
        scheduler.note("pid %d starts: %s on port %d, %s", server.pid, model, port, manner)
        taken = port in self.strangers_ports or port in self.ports()
        self.servers[server.pid] = server
        life = self._find_port_taken if taken else self._live
        scheduler.spawn(f"pid {server.pid}", scheduler.outside, lambda: life(server))
        scheduler.pause()
        return Popen(server)

    def _find_port_taken(self, server: Server) -> None:
        self.scheduler.sleep(0.01)
        server.say("couldn't bind HTTP server socket")
        self.end(server, 1)

    def _live(self, server: Server) -> None:
        chance = self.scheduler.random
        self.scheduler.sleep(chance.uniform(0.01, 0.4) * (5 if server.manner == "slow" else 1))
        if server.exit_code is not None:
            return
        if server.manner == "dies loading":
            server.say("error loading model: it is broken")
            self.end(server, 1)
        elif server.manner == "out of memory":
            server.say("cudaMalloc failed: out of memory")
            self.end(server, 1)
        elif server.manner not in ("hangs loading", "log moves"):
            server.ready = True
            self.scheduler.note("pid %d is ready", server.pid)

    def end(self, server: Server, exit_code: int) -> None:
        """A process ends; its memory comes back a little later."""
        if server.exit_code is not None:
            return
        scheduler = self.scheduler
        server.exit_code, server.ready = exit_code, False
        scheduler.note("pid %d ended: %d", server.pid, exit_code)
        del self.servers[server.pid]
        back_at = scheduler.now + scheduler.random.choice((0.0, 0.0, 0.2, 1.0))
        self.coming_back += [(back_at, uuid, size) for uuid, size in server.memory.items()]
        os.close(server.log)
        server.ended.set()
        for tell in server.at_end:
            tell()
        if self.bell is not None and server.pid in self.bell.watched:
            self.bell.event.set()

    def killpg(self, pid: int, number: int) -> None:
        server = self.servers.get(pid)
        if server is None:
            raise ProcessLookupError(pid)
        self.scheduler.note("signal %d to pid %d", number, pid)
        server.terms += 1
        if number == signal.SIGKILL:
            self.end(server, -number)
        elif server.manner != "ignores TERM" and (server.terms > 1 or not server.busy):
            self.scheduler.spawn(
                f"pid {pid} stops", self.scheduler.outside, lambda: self._stop(server)
            )

    def _stop(self, server: Server) -> None:
        self.scheduler.sleep(self.scheduler.random.choice((0.001, 0.05, 0.3)))
        self.end(server, 0)

    def ports(self) -> set[int]:
        """Return the ports that servers listen on."""
        return {server.port for server in self.servers.values()}

    def on_port(self, port: int) -> Server | None:
        return next((each for each in self.servers.values() if each.port == port), None)

    # what our code asks of the system

    def start_ticks(self, pid: int) -> int | None:
        server = self.servers.get(pid)
        return server.start_ticks if server else None

    def same_process(self, pid: int | None, ticks: int | None) -> bool:
        return pid in self.servers and self.servers[pid].start_ticks == ticks

    def owned_processes(self, owner: str) -> list[Seen]:
        return [
            Seen(self, server.pid)
            for server in self.servers.values()
            if server.env.get(OWNER_VARIABLE) == owner
        ]

    def bindable(self, port: int) -> bool:
        return port not in self.strangers_ports and port not in self.ports()

    def listens(self, pid: int, port: int) -> bool:
        return pid in self.servers and self.on_port(port) is self.servers[pid]

    def worker_alive(self, name: str) -> bool:
        return name in self.workers

    def worker_id(self) -> str:
        return self.scheduler.current.process.name

    # HTTP to servers

    def healthy(self, port: int, *_: Any) -> bool:
        self.scheduler.maybe_pause(0.5)
        if self.scheduler.chance(self.silent_share):
            self.scheduler.sleep(2.0)
            return False
        server = self.on_port(port)
        return server is not None and server.ready

    def slots_busy(self, port: int, api_key: str) -> int | None:
        self.scheduler.maybe_pause(0.5)
        if self.scheduler.chance(self.silent_share):
            self.scheduler.sleep(2.0)
            return None
        server = self.on_port(port)
        return server.busy if server is not None and server.ready else None

    def counters(self, port: int, api_key: str) -> Counters | None:
        self.scheduler.pause()
        server = self.on_port(port)
        if server is None or not server.ready or self.scheduler.chance(self.silent_share):
            return None
        slots = [{"is_processing": place < server.busy} for place in range(4)]
        return Counters(metrics={"predicted_tokens_total": 1.0}, slots=slots)

    def poke(self, _state_dir: object, word: bytes) -> None:
        if self.bell is not None:
            self.bell.words.add(word)
            self.bell.event.set()

    # GPUs

    def observe(self) -> GpuSnapshot:
        scheduler = self.scheduler
        scheduler.sleep(0.002)
        while scheduler.now < self.nvml_hangs_until:
            scheduler.sleep(self.nvml_hangs_until - scheduler.now)
        self.coming_back = [each for each in self.coming_back if each[0] > scheduler.now]
        gpus = tuple(self._gpu(index, uuid) for index, uuid in enumerate(self.gpu_bytes))
        return GpuSnapshot(
            gpus=gpus, observed_at=scheduler.time(), reason=None if gpus else "none here"
        )

    def _gpu(self, index: int, uuid: str) -> Gpu:
        processes = tuple(
            GpuProcess(pid=server.pid, used_bytes=server.memory[uuid])
            for server in self.servers.values()
            if uuid in server.memory and server.ready
        )
        used = sum(process.used_bytes or 0 for process in processes)
        used += sum(size for _, held, size in self.coming_back if held == uuid)
        total, failed = self.gpu_bytes[uuid], uuid in self.failed_gpus
        return Gpu(
            index=index,
            uuid=uuid,
            name="simulated",
            pci_bus_id=f"0000:{index:02x}:00.0",
            total_bytes=total,
            used_bytes=used,
            free_bytes=total - used,
            processes=processes,
            error="it fell off the bus" if failed else None,
            lost=failed,
        )


class Bell:
    """The manager's doorbell in virtual time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.event = Event(machine.scheduler)
        self.words: set[bytes] = set()
        self.watched: set[int] = set()

    def poke(self) -> None:
        self.event.set()

    def watch(self, pids: Set[int]) -> None:
        if any(pid in self.watched or pid in self._machine.servers for pid in pids):
            self.watched = {pid for pid in pids if pid in self._machine.servers}

    def wait(self, timeout_s: float) -> set[bytes]:
        self.event.wait(timeout_s)
        self.event.clear()
        words, self.words = self.words, set()
        return words


class ServerFailed(Exception):
    """The server died while it answered, or was not there."""


async def use(machine: Machine, port: int, seconds: float) -> None:
    """Be answered by the server on a port. Raises ServerFailed."""
    server = machine.on_port(port)
    if server is None or not server.ready:
        raise ServerFailed(f"nobody answers on port {port}")
    loop = asyncio.get_running_loop()
    died: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        loop.call_soon_threadsafe(lambda: died.done() or died.set_result(None))

    server.at_end.append(tell)
    server.busy += 1
    try:
        done, _ = await asyncio.wait([died], timeout=seconds)
        if done:
            raise ServerFailed(f"pid {server.pid} died")
    finally:
        server.busy -= 1
        server.at_end.remove(tell)


def gigabytes(number: float) -> int:
    """Return so many GB (2^30 bytes) in bytes."""
    return int(number * GIB)
