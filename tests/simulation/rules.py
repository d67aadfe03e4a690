"""What must hold at every moment, and what must come once the faults have stopped."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING

from smartproxy.errors import BY_CODE
from tests.simulation.scheduler import Broken

if TYPE_CHECKING:
    from tests.simulation.story import Story

LIVE = "('starting', 'ready', 'draining', 'stopping')"
#: how a request may end: an answer, a refusal of ours, its client gone, its worker killed
FINE = {"answered", "reset", *BY_CODE}
#: virtual seconds in which a healthy model's request is answered, a back-off included
SERVED_S = 90.0
#: virtual seconds after which a request must be over that nothing is in the way of
PATIENCE_S = 60.0
#: virtual seconds in which rows move on, and in which an unload is done
SETTLED_S = 45.0


class Promises:
    """Checked after every transaction: what must hold at every moment."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._pool_size = story.world.configured.settings.server_pool.size

    def check(self, connection: sqlite3.Connection) -> None:
        read = sqlite3.Connection.execute
        gpu_bytes = self._story.machine.gpu_bytes
        promised = read(
            connection,
            "SELECT gpu_uuid, sum(reserved_bytes) FROM assignments WHERE server_id IN"
            f" (SELECT id FROM servers WHERE state IN {LIVE}) GROUP BY gpu_uuid",
        ).fetchall()
        for uuid, size in promised:
            if size > gpu_bytes[uuid]:
                self._wrong(f"{size} bytes are promised of {uuid}, which has {gpu_bytes[uuid]}")
        count = read(connection, f"SELECT count(*) FROM servers WHERE state IN {LIVE}").fetchone()[
            0
        ]
        if count > self._pool_size:
            self._wrong(f"{count} servers live in a pool of {self._pool_size}")
        if self._story.machine.wrongs:
            self._wrong(self._story.machine.wrongs[0])

    def _wrong(self, text: str) -> None:
        scheduler = self._story.scheduler
        scheduler.broken = scheduler.broken or Broken(text)


def requests_end(story: Story, within_s: float) -> None:
    """Every request is over in time, and well."""
    _wait(
        story,
        lambda: all(client.ended or client.left for client in story.clients),
        within_s,
        lambda: (
            "requests wait for ever: "
            + ", ".join(f"{c.number} for {c.model}" for c in story.clients if not c.ended)
        ),
    )
    for client in story.clients:
        if not client.left and client.outcome not in FINE:
            raise Broken(f"request {client.number} ended with {client.outcome!r}")
    for worker in story.workers:
        for complaint in worker.loop.complaints:
            if "callback" in str(complaint.get("message")):
                raise Broken(f"{worker.name}: {complaint}")


def is_served(story: Story, model: str) -> None:
    """A request for a healthy model is answered, at the latest when its back-off is over."""
    scheduler = story.scheduler
    deadline = scheduler.now + SERVED_S
    outcome = None
    while scheduler.now < deadline:
        outcome = _outcome(story, model, PATIENCE_S)
        if outcome == "answered":
            return
        again_at = scheduler.now + 1.0
        scheduler.run(lambda at=again_at: scheduler.now > at)  # type: ignore[misc]
    raise Broken(f"model {model} is healthy, and its requests end with {outcome!r}")


def _outcome(story: Story, model: str, within_s: float) -> str | None:
    client = story.ask(model)
    _wait(
        story,
        lambda: client.ended,
        within_s,
        lambda: f"a request for {model} waits for ever",
    )
    return client.outcome


def nothing_is_left_on_its_way(story: Story) -> None:
    """No lease, no demand, no row between two states, nothing held by a worker's memory."""
    _wait(story, lambda: not left(story), SETTLED_S, lambda: f"left behind: {left(story)}")


def left(story: Story) -> list[str]:
    """Return what is left of requests that are over."""
    assert story.store is not None
    read = story.store.read
    found = [
        f"server {row['id']} ({row['model_id']}) is {row['state']}"
        for row in read("SELECT * FROM servers WHERE state IN ('starting', 'draining', 'stopping')")
    ]
    found += [
        f"lease of {row['worker_id']} on server {row['server_id']}"
        for row in read("SELECT * FROM leases WHERE in_flight = 1")
    ]
    found += [
        f"demand {row['id']} for {row['model_id']}"
        for row in read("SELECT * FROM demands WHERE kind = 'load'")
    ]
    for worker in story.workers:
        if worker.broker is not None and worker.broker.held.leases:
            found.append(f"{worker.name} remembers leases on {sorted(worker.broker.held.leases)}")
    return found


def can_be_unloaded(story: Story) -> None:
    """Every model can be unloaded, and nothing of it is left on the machine."""
    assert story.store is not None
    read = story.store.read
    for model in story.world.model_bytes:
        story.ask_manager("unload", model)
    _wait(
        story,
        lambda: (
            not story.machine.servers and not read(f"SELECT 1 FROM servers WHERE state IN {LIVE}")
        ),
        SETTLED_S,
        lambda: (
            "not unloaded: "
            + ", ".join(
                f"server {row['id']} ({row['model_id']}) is {row['state']}"
                for row in read(f"SELECT * FROM servers WHERE state IN {LIVE}")
            )
            + "; ".join(f"pid {pid}" for pid in story.machine.servers)
        ),
    )


def _wait(
    story: Story, condition: Callable[[], bool], within_s: float, what: Callable[[], str]
) -> None:
    scheduler = story.scheduler
    deadline, look_at = scheduler.now + within_s, scheduler.now

    def reached() -> bool:
        nonlocal look_at
        if scheduler.now < look_at:
            return False
        look_at = scheduler.now + 0.02
        return condition() or scheduler.now > deadline

    scheduler.run(reached)
    if not condition():
        raise Broken(f"not within {within_s:.0f} s: {what()}")
