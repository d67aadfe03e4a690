"""The manager and the workers of a simulation: our own code, in tasks of the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from smartproxy.catalog.live import Live
from smartproxy.config.settings import Settings
from smartproxy.errors import SmartProxyError
from smartproxy.llama.binary import Binary
from smartproxy.manager import __main__ as manager_main
from smartproxy.manager.context import Tools
from smartproxy.proxy.ensure import Broker
from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.relay.relay import Request
from smartproxy.proxy.relay.upstream import Job
from smartproxy.proxy.wire.heads import AnswerHead
from smartproxy.state import migrate
from smartproxy.state.store import Store
from tests.simulation.loop import SimulatedLoop
from tests.simulation.machine import Bell, Machine
from tests.simulation.replaced import Left, Threads
from tests.simulation.scheduler import Process, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """What the user configured."""

    live: Live
    binary: Binary

    @property
    def settings(self) -> Settings:
        return self.live.settings


class Told:
    """What signals asked of the manager."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.full_stop = self.reload = False
        self.poke: Callable[[], None] = lambda: None
        self.kill_servers: Callable[[], None] = lambda: None


class ManagerProcess(Process):
    """One life of the manager."""

    def __init__(self, number: int, machine: Machine, configured: Configured) -> None:
        super().__init__(f"manager {number}")
        self._machine = machine
        self._configured = configured
        self._scheduler = machine.scheduler
        self.store: Store | None = None
        self.manager: manager_main.Manager | None = None
        self.orders = Told()
        self.over = False
        self._scheduler.spawn(self.name, self, self._run)

    def _run(self) -> None:
        try:
            self._serve()
        except Left:
            pass
        except Exception as error:  # noqa: BLE001 - a manager that crashes is started anew
            self._scheduler.note("the manager crashes: %r", error)
        self.over = True

    def _serve(self) -> None:
        settings = self._configured.settings
        path = settings.state_dir / "state.db"
        self.store = store = Store(path) if path.exists() else migrate.create(path)[0]
        bell = Bell(self._machine)
        tools = Tools(
            live=self._configured.live,
            store=store,
            binary=self._configured.binary,
            threads=Threads(thread_name_prefix="server"),  # type: ignore[arg-type]
            poke=bell.poke,
            stopping=self.orders.stopping,
        )
        self._machine.bell = bell
        self.manager = manager_main.make_manager(tools)
        self.orders.poke = bell.poke
        manager_main._serve(self.manager, bell, self.orders)  # type: ignore[arg-type]

    def kill(self) -> None:
        """End it as SIGKILL does."""
        self._machine.bell = None
        self._scheduler.kill(self)
        if self.store is not None:
            self.store.close_all()


class SimulatedClient(Client):
    """One client: notes how it was answered."""

    full = False

    def __init__(self, number: int, model: str, service_s: float) -> None:
        super().__init__()
        self.number = number
        self.model = model
        self.service_s = service_s
        #: rounds of the loop after which it leaves; None: it stays
        self.leaves_after: int | None = None
        #: these rounds are counted once its worker has committed so many transactions more
        self.after_commits = 0
        self.started = self.left = False
        #: "answered", or the code of the refusal
        self.outcome: str | None = None

    def progress_bytes(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        """Comments of a stream that waits: nobody reads them here."""

    def _send_head(self, head: AnswerHead) -> None:
        """No bytes go anywhere."""

    def answered(self) -> None:
        self.outcome = "answered"
        self.ended = True

    def finish(self) -> None:
        self.ended = True

    def cut(self) -> None:
        self.outcome = self.outcome or "cut"
        self.ended = True

    def fail(self, error: SmartProxyError, *, torn: bool, reader: bytes) -> None:
        self.outcome = error.code
        self.ended = True


class WorkerProcess(Process):
    """One life of a worker: its broker and its loop."""

    def __init__(self, number: int, machine: Machine, configured: Configured) -> None:
        super().__init__(f"worker {number}")
        self._scheduler: Scheduler = machine.scheduler
        self._machine = machine
        machine.workers[self.name] = self
        self.loop = SimulatedLoop(self._scheduler)
        self.loop.turns.between = self._between
        self._live = configured.live
        self.store = Store(configured.settings.state_dir / "state.db")
        self.broker: Broker | None = None
        self.requests: list[SimulatedClient] = []
        self._scheduler.spawn(f"{self.name} loop", self, self._run)

    def _run(self) -> None:
        self.broker = Broker(self.store, self._live)
        while True:
            self.loop.turn()

    def ask(self, client: SimulatedClient, *, stream: bool) -> None:
        """Start a request (any task)."""
        self.requests.append(client)
        self.loop.call_soon_threadsafe(self._start, client, stream)

    def _start(self, client: SimulatedClient, stream: bool) -> None:
        assert self.broker is not None
        job = Job(
            model_id=client.model,
            method="POST",
            target="/v1/chat/completions",
            headers=(),
            body=b"{}",
            stream=stream,
            request_timeout_s=60.0,
            sse_wait_comment_after_s=2.0,
            on_settled=lambda _model, _status: self._settled(client),
        )
        Request(job=job, broker=self.broker, client=client).start()
        client.started = True
        client.after_commits += self.commits

    def _settled(self, client: SimulatedClient) -> None:
        self._scheduler.note(
            "request %d for %s: %s",
            *(client.number, client.model, "left" if client.left else client.outcome),
        )
        self.requests.remove(client)

    def _between(self) -> None:
        for client in self.requests:
            if client.leaves_after is None or client.left or not client.started:
                continue
            if self.commits < client.after_commits:
                continue
            client.leaves_after -= 1
            if client.leaves_after < 0:
                client.left = True
                self._scheduler.note("client %d leaves", client.number)
                client.on_gone()

    def kill(self) -> None:
        """End it as SIGKILL does: its clients see a reset."""
        del self._machine.workers[self.name]
        self._scheduler.kill(self)
        self.loop.give_up()
        self.store.close_all()
        for client in self.requests:
            client.outcome = client.outcome or "reset"
            client.ended = True
        self.requests.clear()
