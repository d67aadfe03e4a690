"""One seed: requests, faults, and then everything must be well again.

First come requests and faults, for a few virtual seconds. Then the faults stop. From there on the
rules of rules.py say what must be, and when.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from smartproxy.manager import __main__ as manager_main
from smartproxy.manager import bring_down, bring_up, lingering, shortage
from smartproxy.proxy import file_watch
from smartproxy.state import demands as demand_rows
from smartproxy.state.store import Store
from tests.simulation import faults, rules
from tests.simulation.machine import GOOD, Machine
from tests.simulation.processes import ManagerProcess, SimulatedClient, WorkerProcess
from tests.simulation.replaced import Now
from tests.simulation.scheduler import Broken, Scheduler
from tests.simulation.state_file import Weather, set_weather
from tests.simulation.worlds import SPECS, world

#: virtual seconds in which requests and faults come
TROUBLE_S = 3.0
#: how often our code looks at things; coarse steps make more of a minute
KNOBS: tuple[tuple[object, str, tuple[float, ...]], ...] = (
    (file_watch, "LOOK_EVERY_S", (0.01, 0.03, 0.1)),
    (bring_down, "DRAIN_LOOK_EVERY_S", (0.05, 0.1)),
    (bring_up, "FIRST_PROBE_EVERY_S", (0.01, 0.05)),
    (bring_up, "LAST_PROBE_EVERY_S", (0.05, 0.1)),
    (shortage, "LOOK_EVERY_S", (0.1,)),
    (manager_main, "WAITING_TICK_S", (0.05, 0.3)),
    (lingering, "PATIENCE_S", (1.0,)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a seed went."""

    seed: int
    #: which rule was broken; None: none
    broken: str | None
    history: str
    steps: int
    virtual_s: float
    #: by what became of them: requests
    requests: dict[str, int]


class Kind(StrEnum):
    """What a seed is rich in: where everything may happen, each thing is rare."""

    ALL = "all"
    LEAVING = "clients leave"
    WRITES = "writes fail"


class Story:
    """All that takes part in one seed."""

    def __init__(self, seed: int, kind: Kind | None) -> None:
        chance = random.Random(f"story {seed}")
        self.chance = chance
        self.kind = kind or chance.choice((Kind.ALL, Kind.ALL, Kind.LEAVING, Kind.WRITES))
        self.scheduler = Scheduler(seed)
        self.world = world(chance.randrange(len(SPECS)))
        configured = self.world.configured
        self.machine = Machine(
            self.scheduler,
            gpus=self.world.gpus,
            model_bytes=self.world.model_bytes,
            state_dir=str(configured.settings.state_dir),
        )
        Now.scheduler, Now.machine = self.scheduler, self.machine
        self.weather = Weather(self.scheduler, self.world.template)
        set_weather(self.weather)
        self.state_path = configured.settings.state_dir / "state.db"
        self.manager: ManagerProcess | None = None
        self.workers: list[WorkerProcess] = []
        self.clients: list[SimulatedClient] = []
        self.lives = 0
        #: faults come no more
        self.healed = False
        self.store: Store | None = None
        self.weather.committed = rules.Promises(self).check

    def spawn(self, name: str, work: Callable[[], object]) -> None:
        self.scheduler.spawn(name, self.scheduler.outside, work)

    def run(self) -> None:
        """Play the seed; raises Broken."""
        # outside of the scheduler's tasks: for questions of the rules
        self.store = Store(self.state_path)
        self.spawn("serve", self._keep_manager)
        for _ in range(self.chance.choice((1, 1, 2))):
            self.start_worker()
        self.spawn("clients", self._clients)
        self.spawn("faults", lambda: faults.bring(self, FAULTS_OF[self.kind]))
        scheduler = self.scheduler
        scheduler.run(lambda: scheduler.now > 1000.0 + TROUBLE_S)
        self._heal()
        rules.requests_end(self, rules.PATIENCE_S)
        # before others use the same servers, which would clear up behind those
        rules.nothing_is_left_on_its_way(self)
        for model in self.world.model_bytes:
            rules.is_served(self, model)
        rules.nothing_is_left_on_its_way(self)
        rules.can_be_unloaded(self)

    def start_worker(self) -> None:
        self.lives += 1
        worker = WorkerProcess(self.lives, self.machine, self.world.configured)
        self.workers.append(worker)

    def ask(self, model: str) -> SimulatedClient:
        """Send a request to one of the workers."""
        client = SimulatedClient(
            len(self.clients), model, self.chance.choice((0.0, 0.02, 0.2, 1.0))
        )
        self.clients.append(client)
        self.scheduler.note("request %d for %s", client.number, model)
        self.chance.choice(self.workers).ask(client, stream=self.chance.random() < 0.3)
        return client

    def ask_manager(self, kind: str, model: str) -> int:
        """Write a demand of a person's, as the API does."""
        assert self.store is not None
        demand_id = demand_rows.ask(
            self.store, kind, model, self.workers[0].name, now=self.store.now(), explicit=True
        )
        self.machine.poke("", kind.encode())
        return demand_id

    def _keep_manager(self) -> None:
        number = 0
        while True:
            number += 1
            manager = self.manager = ManagerProcess(number, self.machine, self.world.configured)
            while not manager.over and not manager.dead:
                self.scheduler.sleep(0.1)
            if not manager.dead:
                manager.kill()
            self.scheduler.sleep(self.chance.choice((0.05, 0.5)))

    def _clients(self) -> None:
        chance = self.chance
        for _ in range(chance.randrange(2, 9)):
            self.scheduler.sleep(chance.choice((0.0, 0.01, 0.1, 0.6)))
            leaves, commits = None, 0
            leaving = 0.9 if self.kind is Kind.LEAVING else 0.35
            if chance.random() < leaving:  # at some moment, or as something has just been written
                commits = chance.choice((0, 1, 1, 2))
                leaves = chance.randrange(0, 5 if commits else 40)
            if self.workers:
                client = self.ask(chance.choice(list(self.world.model_bytes)))
                client.leaves_after, client.after_commits = leaves, commits

    def _heal(self) -> None:
        self.scheduler.note("faults stop")
        self.healed = True
        self.weather.clear()
        machine = self.machine
        machine.manners, machine.silent_share = GOOD, 0.0
        machine.failed_gpus.clear()
        machine.strangers_ports.clear()
        for server in machine.servers.values():
            server.ready = True  # who hung goes on
        while not self.workers:
            self.start_worker()

    def end(self) -> None:
        """End all that still runs, without a word."""
        set_weather(None)
        for worker in list(self.workers):
            worker.kill()
        if self.manager is not None and not self.manager.dead:
            self.manager.kill()
        self.scheduler.kill(self.scheduler.outside)
        for server in list(self.machine.servers.values()):
            self.machine.end(server, -9)
        if self.store is not None:
            self.store.close_all()
        self.weather.keeper.close()


FAULTS_OF = {
    Kind.ALL: faults.ALL,
    Kind.LEAVING: (),
    Kind.WRITES: (faults.a_write_fails, faults.the_disk_is_full),
}


def play(seed: int, kind: Kind | None = None) -> Outcome:
    """Play a seed and say how it went; only within `replaced()`. kind: None lets it choose."""
    with _knobs(seed):
        story = Story(seed, kind)
        broken: str | None = None
        try:
            story.run()
        except Broken as error:
            broken = str(error)
            story.scheduler.note("BROKEN: %s", broken)
        finally:
            history = story.scheduler
            story.end()
    outcomes: dict[str, int] = {}
    for client in story.clients:
        how = "left" if client.left else client.outcome or "open"
        outcomes[how] = outcomes.get(how, 0) + 1
    return Outcome(
        seed=seed,
        broken=broken,
        history=history.told(),
        steps=history.steps,
        virtual_s=history.now - 1000.0,
        requests=outcomes,
    )


@contextmanager
def _knobs(seed: int) -> Iterator[None]:
    chance = random.Random(f"knobs {seed}")
    before = [(module, name, getattr(module, name)) for module, name, _ in KNOBS]
    for module, name, values in KNOBS:
        setattr(module, name, chance.choice(values))
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
