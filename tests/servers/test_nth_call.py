"""The n-th call fails, for every n: each write, each spawn, each call of a server, one at a time.

A clean run ends the count. After each run that failed once, the world must come right by itself:
the model loads, ends, and leaves no live row (which holds its port), process, lease or thread.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import pytest

from smartproxy.errors import StateError
from smartproxy.lifetime import owned_processes
from smartproxy.llama.process import Child
from smartproxy.manager.adopt import adopt_all
from smartproxy.manager.bring_down import unload
from smartproxy.manager.server_watch import watch
from smartproxy.manager.tick import Manager, tick
from smartproxy.state import demands as demand_rows
from smartproxy.state import leases
from smartproxy.state import servers as server_rows
from smartproxy.state.server_row import LiveServer
from smartproxy.state.store import Store
from smartproxy.types import ServerState
from tests.support.managers import manager_of, without_look
from tests.support.running import wait_until


class Nth:
    """Counts calls in all threads; the n-th since it was set is to fail, and no other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self.failed = False

    def set(self, number: int) -> None:
        """Choose the call that fails; 0: none does."""
        with self._lock:
            self._left, self.failed = number, False

    def is_it(self) -> bool:
        """Count one call, and return whether it is to fail."""
        with self._lock:
            self._left -= 1
            self.failed = self.failed or self._left == 0
            return self._left == 0


class FailingStore(Store):
    """A state file of which SQLite refuses the n-th write, as on a file system that turned bad."""

    def __init__(self, path: Path, nth: Nth) -> None:
        super().__init__(path)
        self._nth = nth

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with super().write() as connection:
            if not self._nth.is_it():
                yield connection
                return
            connection.execute("PRAGMA query_only = ON")
            try:
                yield connection
                raise AssertionError("a transaction that wrote nothing")
            finally:
                connection.execute("PRAGMA query_only = OFF")


@dataclass
class Scene:
    """A manager, its clients, and what is wrong with the machine."""

    nth: Nth
    manager: Manager
    #: the clients' own way to the state file, which does not fail
    clients: Store
    #: those of the managers before, which this process has to reap as nobody else does
    earlier: list[Child] = field(default_factory=list)

    def rows(self) -> list[LiveServer]:
        return server_rows.live_servers(self.clients)

    def processes(self) -> list[int]:
        return [one.pid for one in owned_processes(str(self.manager.tools.settings.state_dir))]

    def passes(self, done: Callable[[], bool], what: str) -> None:
        """Make passes as the main loop does, which goes on after a state file that failed."""

        def look() -> bool:
            with suppress(StateError):
                tick(self.manager, self.clients.now())
                return done()
            return False

        wait_until(look, within_s=30, what=what)

    def load(self) -> None:
        """Ask for the model as clients do, again after an answer that it failed; use it once."""

        def ready() -> bool:
            if not demand_rows.open_demands(self.clients) and not self.rows():
                self.ask()
            return any(
                row.state == ServerState.READY
                and leases.take_lease(self.clients, "worker", row.id, now=self.clients.now())
                for row in self.rows()
            )

        self.passes(ready, "the model is ready")
        [row] = self.rows()
        with suppress(StateError):
            watch(self.manager.tools)  # a scheduler's job
        now = self.clients.now()
        leases.release_lease(self.clients, "worker", row.id, last_used_at=now)
        with self.clients.write() as connection:
            connection.execute("DELETE FROM demands")
        self.no_thread_is_left()

    def ask(self) -> None:
        now = self.clients.now()
        demand_rows.ask(self.clients, "load", "m", "worker", now=now, explicit=True)

    def end(self) -> None:
        def gone() -> bool:
            unload(self.manager.loading, "m", "a test's", self.clients.now())
            return not self.rows() and not self.manager.loading.children.are_left()

        self.passes(gone, "the server has ended")

    def no_thread_is_left(self) -> None:
        children = self.manager.loading.children
        ids = range(1, 1000)
        wait_until(lambda: not any(map(children.is_carried, ids)), what="no thread carries it")

    def nothing_is_left(self) -> None:
        self.no_thread_is_left()
        assert self.rows() == []
        assert self.processes() == []
        assert self.manager.loading.children.snapshot() == {}
        for table in ("leases", "demands"):
            assert self.clients.read(f"SELECT * FROM {table}") == []

    def adopt(self) -> None:
        """Have another manager follow; one whose start fails is started again."""
        while True:
            self.earlier += self.manager.loading.children.snapshot().values()
            self.manager = without_look(self.manager.tools)
            with suppress(StateError):
                adopt_all(self.manager.loading)
                return


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    nth = Nth()
    with ThreadPoolExecutor(8) as threads:
        manager = manager_of(tmp_path, threads, store=lambda path: FailingStore(path, nth))
        clients = Store(manager.tools.store.path)
        told = Scene(nth, manager, clients)
        yield told
        nth.set(0)
        for left in owned_processes(str(manager.tools.settings.state_dir)):
            left.kill()  # of a test that failed
        for child in told.earlier:
            child.wait(10)
        clients.close()


def for_every(scene: Scene, story: Callable[[], None]) -> int:
    """Tell the story again and again, one call later failing each time; return how many there are.

    The story begins and ends with nothing.
    """
    for number in itertools.count(1):
        scene.nth.set(number)
        story()
        failed = scene.nth.failed
        scene.nth.set(0)
        scene.nothing_is_left()
        if not failed:
            return number - 1
    raise AssertionError


def test_every_write_of_a_servers_life_may_fail_once(scene: Scene) -> None:
    def story() -> None:
        scene.load()
        scene.end()

    # a row, what is expected, a process, ready, what was measured, drain, stop, end at the least
    assert for_every(scene, story) >= 8


def test_every_spawn_may_fail_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, spawns = subprocess.Popen, Nth()

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        if spawns.is_it():
            raise OSError(12, "Cannot allocate memory")
        return spawn(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    scene.nth = spawns

    def story() -> None:
        scene.load()
        scene.end()

    assert for_every(scene, story) == 1


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError])
def test_every_call_of_a_server_may_fail_once(
    error: type[OSError], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, calls = socket.socket.connect, Nth()

    def failing(self: socket.socket, address: Any) -> None:
        connect(self, address)  # one that nobody listens for fails anyway
        if calls.is_it():
            raise error("the server is slow")

    monkeypatch.setattr(socket.socket, "connect", failing)
    scene.nth = calls

    def story() -> None:
        scene.load()
        scene.end()

    # its health, its counters with its slots, and its slots once more before it ends
    assert for_every(scene, story) >= 3


@pytest.mark.parametrize("state", ["starting", "ready", "draining", "stopping", "lost"])
def test_every_write_of_an_adoption_may_fail_once(state: str, scene: Scene) -> None:
    for number in itertools.count(1):
        scene.load()
        before = scene.processes()
        with scene.clients.write() as connection:
            if state == "lost":
                connection.execute("DELETE FROM leases")
                connection.execute("DELETE FROM servers")
            else:
                where = "WHERE state = 'ready'"
                connection.execute(f"UPDATE servers SET state = ? {where}", (state,))
        scene.nth.set(number)
        scene.adopt()
        if state in ("draining", "stopping"):
            scene.end()
        else:
            scene.load()
            assert scene.processes() == before, "another one was started"
        failed = scene.nth.failed
        scene.nth.set(0)
        scene.end()
        scene.nothing_is_left()
        if not failed:
            return
