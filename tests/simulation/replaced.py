"""What of the outside is replaced while simulations run: time, threads, processes, HTTP, NVML.

Only names that our modules import from elsewhere, and the few functions of ours that ask the
system. Everything else is the code that runs in production.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
from apscheduler.schedulers.background import BackgroundScheduler

from smartproxy import doorbell, lifetime
from smartproxy.gpus.nvml import GpuObserver
from smartproxy.llama import http, listeners, process
from smartproxy.manager import __main__ as manager_main
from smartproxy.manager import bring_up, context
from smartproxy.memory import estimate
from smartproxy.model_file import metadata
from smartproxy.proxy.relay import relay
from smartproxy.state import store
from tests.simulation.machine import Machine, Seen, ServerFailed, use
from tests.simulation.scheduler import Event, Process, Scheduler
from tests.simulation.state_file import Os, Sqlite, TaskLocal

if TYPE_CHECKING:
    from smartproxy.proxy.relay.upstream import Job as RelayJob


class Now:
    """The seed that runs."""

    scheduler: Scheduler
    machine: Machine


class Clock:
    """In the place of the module time, where our modules use it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def time() -> float:
        return Now.scheduler.time()

    @staticmethod
    def monotonic() -> float:
        return Now.scheduler.now

    perf_counter = monotonic

    @staticmethod
    def sleep(seconds: float) -> None:
        Now.scheduler.sleep(seconds)


class Later(Future[Any]):
    """A future whose result is awaited in virtual time."""

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            event = Event(Now.scheduler)
            self.add_done_callback(lambda _: event.set())
            event.wait(timeout)
        return super().result(0)


class Threads:
    """In the place of ThreadPoolExecutor: as many tasks as there is work, or one after another."""

    def __init__(self, max_workers: int | None = None, thread_name_prefix: str = "", **_: Any):
        self._process: Process = Now.scheduler.current.process
        self._name = f"{self._process.name} {thread_name_prefix}".strip()
        self._one_at_a_time = max_workers == 1
        self._waiting: list[tuple[Later, Callable[[], Any]]] = []
        self._busy = False

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Later:
        later = Later()
        if self._process.dead:
            return later
        self._waiting.append((later, lambda: work(*args, **kwargs)))
        if not (self._one_at_a_time and self._busy):
            self._busy = True
            Now.scheduler.spawn(self._name, self._process, self._run)
        return later

    def map(self, work: Callable[..., Any], *values: Any) -> Iterator[Any]:
        return map(work, *values)

    def _run(self) -> None:
        while self._waiting:
            later, work = self._waiting.pop(0)
            try:
                later.set_result(work())
            except Exception as error:  # noqa: BLE001 - as an executor does
                Now.scheduler.note("thread ended with %r", error)
                later.set_exception(error)
            if not self._one_at_a_time:
                return
        self._busy = False

    def shutdown(self, wait: bool = True, **_: Any) -> None:
        """Tasks end with their process."""

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to wait for."""


class Thread:
    """In the place of threading.Thread: a task of the process that starts it."""

    def __init__(self, *, target: Callable[..., object], args: Any, name: str, daemon: bool):
        self._name, self._work = name, partial(target, *args)

    def start(self) -> None:
        process = Now.scheduler.current.process
        Now.scheduler.spawn(f"{process.name} {self._name}", process, self._work)


class Condition:
    """In the place of threading.Condition. Nobody gives way while he holds one."""

    def __init__(self) -> None:
        self._told = Event(Now.scheduler)

    def __enter__(self) -> Condition:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to unlock."""

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._told.wait(timeout_s)

    def notify_all(self) -> None:
        self._told.set()
        self._told = Event(Now.scheduler)


class Jobs:
    """In the place of the APScheduler: each job is a task."""

    def __init__(self, **_: Any) -> None:
        self._process = Now.scheduler.current.process
        self._wanted: dict[str, Event] = {}
        self._waiting: list[Callable[[], None]] = []

    def add_job(
        self,
        work: Callable[..., object],
        trigger: str | None = None,
        args: Any = (),
        *,
        seconds: float = 0.0,
        id: str | None = None,
        next_run_time: object = None,
        **_: Any,
    ) -> None:
        name = id or work.__name__
        wanted = self._wanted[name] = Event(Now.scheduler)

        def run() -> None:
            if trigger is not None and next_run_time is None:
                Now.scheduler.sleep(seconds)
            while True:
                wanted.clear()
                try:
                    work(*args)
                except Exception as error:  # noqa: BLE001 - as the scheduler does
                    Now.scheduler.note("job %s: %r", name, error)
                if trigger is None:
                    return
                wanted.wait(seconds)

        self._waiting.append(
            lambda: Now.scheduler.spawn(f"{self._process.name} {name}", self._process, run) and None
        )

    def start(self) -> None:
        for begin in self._waiting:
            begin()

    def modify_job(self, id: str, **_: Any) -> None:
        self._wanted[id].set()

    def get_jobs(self) -> list[Job]:
        return [Job(wanted) for wanted in self._wanted.values()]

    def shutdown(self, wait: bool = True) -> None:
        """Tasks end with their process."""


class Job:
    """One of them."""

    def __init__(self, wanted: Event) -> None:
        self._wanted = wanted

    def modify(self, **_: Any) -> None:
        self._wanted.set()


class Observer:
    """In the place of NVML."""

    def observe(self) -> Any:
        return Now.machine.observe()

    def close(self) -> None:
        """Nothing is open."""


class Exchange:
    """In the place of the relay's: one use of a server, without bytes."""

    def __init__(
        self, job: RelayJob, client: Any, address: tuple[str, int], _key: str | None
    ) -> None:
        self._client = client
        self._port = address[1]
        self.answered = self.torn = False

    async def run(self) -> None:
        try:
            await use(Now.machine, self._port, self._client.service_s)
        except ServerFailed as failed:
            raise relay.ServerDied(str(failed)) from None
        self.answered = True
        self._client.answered()


class Module:
    """A module of which some names are others."""

    def __init__(self, module: Any, **others: Any) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Left(Exception):
    """In the place of the end of a process, which the manager calls for."""


def _leave(code: int) -> NoReturn:
    Now.scheduler.note("the manager leaves: %d", code)
    raise Left(code)


def _process_of(pid: int | None) -> Seen:
    if pid is None:
        raise psutil.NoSuchProcess(-1)
    return Seen(Now.machine, pid)


def _replacements() -> dict[Any, Any]:
    """Return what is replaced everywhere in our modules, by identity."""
    ask = {
        lifetime.start_ticks: lambda pid: Now.machine.start_ticks(pid),
        lifetime.same_process: lambda *which: Now.machine.same_process(*which),
        lifetime.worker_id: lambda: Now.machine.worker_id(),
        lifetime.worker_alive: lambda name: Now.machine.worker_alive(name),
        lifetime.owned_processes: lambda owner: Now.machine.owned_processes(owner),
        listeners.listens: lambda *which: Now.machine.listens(*which),
        http.healthy: lambda *which: Now.machine.healthy(*which),
        http.slots_busy: lambda *which: Now.machine.slots_busy(*which),
        http.counters: lambda *which: Now.machine.counters(*which),
        bring_up._bindable: lambda port: Now.machine.bindable(port),
        doorbell.ring: lambda *which: Now.machine.poke(*which),
    }
    free = type("Memory", (), {"available": 8 << 30})()
    return {
        **ask,
        time: Clock(),
        ThreadPoolExecutor: Threads,
        BackgroundScheduler: Jobs,
        GpuObserver: Observer,
        relay.Exchange: Exchange,
        psutil: Module(psutil, Process=_process_of, virtual_memory=lambda: free),
        # pure functions of what never changes here: asked thousands of times
        metadata.from_json: lru_cache(metadata.from_json),
        estimate.make_need: _remembered(estimate.make_need),
    }


def _remembered(work: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def remembered(loaded: Any, *, context_size: int | None) -> Any:
        key = f"{loaded!r} {context_size}"
        if key not in known:
            known[key] = work(loaded, context_size=context_size)
        return known[key]

    return remembered


@contextmanager
def replaced() -> Iterator[None]:
    """Replace the outside for as long as it lasts."""
    Now.scheduler = Scheduler(0)  # for what is asked before a seed begins
    undo: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        undo.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    others = {id(original): (original, other) for original, other in _replacements().items()}
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] == "smartproxy"]:
        for name, value in list(vars(module).items()):
            if id(value) in others:
                put(module, name, others[id(value)][1])
    popen = lambda *args, **how: Now.machine.popen(*args, **how)  # noqa: E731
    killpg = lambda *which: Now.machine.killpg(*which)  # noqa: E731
    put(process, "subprocess", Module(subprocess, Popen=popen))
    put(process, "os", Module(os, killpg=killpg))
    put(context, "threading", Module(threading, Thread=Thread, Condition=Condition))
    put(store, "sqlite3", Sqlite())
    put(store, "os", Os())
    put(store, "threading", Module(store.threading, local=TaskLocal))
    put(manager_main, "logging", Module(logging, shutdown=lambda: None))
    put(manager_main, "os", Module(os, _exit=_leave, getpid=lambda: 4000))
    log = logging.getLogger("smartproxy")
    handler = History()
    before = log.level, log.propagate, list(log.handlers)
    log.handlers[:], log.propagate = [handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.propagate, log.handlers[:] = before[1], before[2]
        for module, name, value in reversed(undo):
            setattr(module, name, value)


class History(logging.Handler):
    """Puts what our modules log into the history."""

    def emit(self, record: logging.LogRecord) -> None:
        # what differs from one run to the next says nothing of the seed
        text = re.sub(r" at 0x[0-9a-f]+|/\S*smartproxy-simulation-[^/]+", "", record.getMessage())
        if record.exc_info:
            text += f" {record.exc_info[1]!r}"
        Now.scheduler.note("%s", text)
