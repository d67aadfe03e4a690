"""When the memory of a server that ended is back, and what the planner is told until then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smartproxy.config.settings import ModelSettings, Settings
from smartproxy.gpus.types import GpuProcess, GpuSnapshot
from smartproxy.manager import use
from smartproxy.manager.context import Ahead, Preload
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.lingering import PATIENCE_S, Lingering
from smartproxy.manager.shortage import Shortages
from smartproxy.manager.snapshot import Sources
from smartproxy.manager.snapshot import snapshot as manager_snapshot
from smartproxy.planner.ledger import open_ledger
from smartproxy.planner.types import RunningServer
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import NewAssignment, assignments
from smartproxy.state.migrate import create
from smartproxy.state.store import Store
from smartproxy.types import GIB, ServerState
from tests.support.rows import new_server
from tests.support.worlds import gpu, snapshot

ENDED_AT = 1000.0
OURS = 11


@dataclass(frozen=True, kw_only=True)
class World:
    store: Store
    view: GpuView
    lingering: Lingering


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store, _ = create(tmp_path / "state.db")
    view = GpuView(lambda: None)
    yield World(store=store, view=view, lingering=Lingering(store, view))
    store.close()


def seen(at: float, used_gb: float, **processes_gb: float | None) -> GpuSnapshot:
    """Return a look at one 24 GB card. processes_gb: p11=6 is pid 11 with 6 GB; None: not told."""
    processes = tuple(
        GpuProcess(pid=int(name[1:]), used_bytes=None if size is None else int(size * GIB))
        for name, size in processes_gb.items()
    )
    card = replace(gpu(0, 24, used_gb), processes=processes)
    return GpuSnapshot(gpus=(card,), observed_at=at)


def loaded(world: World, model_id: str = "m", *, pid: int = OURS) -> int:
    """Return a server of ours with 6 GB promised that has long been ready."""
    server_id = server_rows.insert_server(
        world.store,
        new_server(model_id, 8000 + pid, pid=pid),
        [NewAssignment(gpu_uuid="GPU-0", gpu_index=0, estimated_bytes=6 * GIB)],
        now=ENDED_AT - 510,
        reason="a test",
    )
    server_rows.update_server(world.store, server_id, ready_at=ENDED_AT - 500)
    return server_id


def look(world: World, seen: GpuSnapshot) -> None:
    """Do what a pass of the manager does with a new look."""
    world.view.seen = seen
    live = server_rows.live_servers(world.store)
    world.lingering.note_others(live, assignments(world.store), world.view.seen)


def ended(world: World, *looks: GpuSnapshot) -> int:
    """Have a loaded server of ours end after these looks."""
    server_id = loaded(world)
    for seen in looks:
        look(world, seen)
    world.lingering.note_end(server_id, ENDED_AT)
    return server_id


def held(world: World, seen: GpuSnapshot | None = None) -> list[RunningServer]:
    if seen is not None:
        look(world, seen)
    assert world.view.seen is not None
    return world.lingering.still_held(
        set(), world.view.seen, max(ENDED_AT, world.view.seen.observed_at)
    )


def test_until_a_look_after_its_end_a_server_counts_as_stopping(world: World) -> None:
    ended(world, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    (server,) = held(world)
    assert (server.state, server.model_id) == (ServerState.STOPPING, "m")
    assert server.holds["GPU-0"].visible_bytes == 6 * GIB
    assert world.view.take_wanted()
    assert not world.view.take_wanted()


def test_memory_that_outlives_its_process_is_still_its_own(world: World) -> None:
    ended(world, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    # its process has left the list, its memory is used all the same; the other one grew
    after = seen(ENDED_AT + 0.5, 9, p22=3)
    (server,) = held(world, after)
    assert server.holds["GPU-0"].visible_bytes == 6 * GIB
    ledger = open_ledger(replace(snapshot(after.gpus), servers=(server,)))
    # of 24 GB, 3 are the other's and 6 come back
    assert [ledger.now[0] // GIB, ledger.later[0] // GIB] == [15, 21]


def test_memory_is_back_when_it_is_no_longer_used(world: World) -> None:
    server_id = ended(world, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    assert world.lingering.waits_for(server_id)
    assert held(world, seen(ENDED_AT + 0.5, 3, p22=3)) == []
    assert not world.lingering.waits_for(server_id)


def test_an_end_that_a_look_saw_before_we_did_is_no_stranger(world: World) -> None:
    server_id = loaded(world)
    look(world, seen(ENDED_AT - 2, 7, p11=6, p22=1))
    late = seen(ENDED_AT - 1, 7, p22=1)
    look(world, late)
    assert world.lingering.visible_bytes(late.gpus[0], OURS, 6 * GIB) == 6 * GIB
    world.lingering.note_end(server_id, ENDED_AT)
    assert len(held(world, seen(ENDED_AT + 0.2, 7, p22=1))) == 1
    assert held(world, seen(ENDED_AT + 0.4, 1, p22=1)) == []


def test_one_end_after_another_is_not_taken_for_somebody_else_s_memory(world: World) -> None:
    first, second = loaded(world, "first"), loaded(world, "second", pid=33)
    look(world, seen(ENDED_AT - 1, 12, p11=6, p33=6))
    world.lingering.note_end(first, ENDED_AT)
    assert len(held(world, seen(ENDED_AT + 0.2, 12, p33=6))) == 1
    world.lingering.note_end(second, ENDED_AT + 0.3)
    # the first one's memory is back, the second one's is not
    assert len(held(world, seen(ENDED_AT + 0.5, 6))) > 0
    assert held(world, seen(ENDED_AT + 0.7, 0)) == []


def test_a_row_that_still_says_it_lives_is_not_told_twice(world: World) -> None:
    server_id = ended(world, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    assert world.lingering.still_held({server_id}, world.view.seen, ENDED_AT) == []
    assert world.lingering.waits_for(server_id)


def test_a_driver_that_tells_no_process_s_memory_is_watched_by_the_sum(world: World) -> None:
    ended(world, seen(ENDED_AT - 1, 8, p11=None))
    assert len(held(world, seen(ENDED_AT + 0.2, 8))) == 1
    assert held(world, seen(ENDED_AT + 0.4, 2)) == []


def test_a_server_that_the_last_look_did_not_see_yet_leaves_nothing_behind(
    world: World,
) -> None:
    ended(world, seen(ENDED_AT - 600, 1, p22=1))
    assert held(world, seen(ENDED_AT + 0.2, 1, p22=1)) == []


def test_memory_that_does_not_come_back_is_waited_for_no_longer_than_said(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    ended(world, seen(ENDED_AT - 1, 6, p11=6))
    assert len(held(world, seen(ENDED_AT + PATIENCE_S - 1, 6))) == 1
    assert held(world, seen(ENDED_AT + PATIENCE_S + 1, 6)) == []
    assert "is not back 5 s after its end" in caplog.text


def test_a_server_on_the_cpu_leaves_nothing_to_wait_for(world: World) -> None:
    world.view.seen = seen(ENDED_AT - 1, 0)
    server_id = server_rows.insert_server(
        world.store,
        new_server(pid=OURS),
        [],
        now=ENDED_AT - 510,
        reason="a test",
    )
    world.lingering.note_end(server_id, ENDED_AT)
    assert not world.lingering.waits_for(server_id)


class Moving(GpuView):
    """A view whose look changes between two questions, as a look in another thread does."""

    def __init__(self, *looks: GpuSnapshot) -> None:
        self.looks = list(looks)
        super().__init__(lambda: None)

    @property
    def seen(self) -> GpuSnapshot | None:  # type: ignore[override]
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    @seen.setter
    def seen(self, look: GpuSnapshot | None) -> None:
        """It has its own."""


@pytest.mark.parametrize("before", range(1, 5))
def test_a_look_in_the_middle_of_a_pass_does_not_lose_what_comes_back(
    world: World, before: int
) -> None:
    """The old look has its memory as used; by a new one it is back, so nobody would wait for it."""
    old, new = seen(ENDED_AT - 1, 7, p11=6, p22=1), seen(ENDED_AT + 1, 1, p22=1)
    server_id = ended(world, old)
    for states in [("starting", "ready"), ("ready", "draining"), ("draining", "stopping")]:
        step = [ServerState(state) for state in states]
        server_rows.transition(world.store, server_id, *step, now=ENDED_AT, reason="")
    server_rows.transition(
        *(world.store, server_id, ServerState.STOPPING, ServerState.STOPPED),
        now=ENDED_AT,
        reason="",
    )
    settings: Any = Settings(models={"m": ModelSettings(path=Path("m.gguf"))})
    binary: Any = SimpleNamespace(build="1")
    tools: Any = SimpleNamespace(store=world.store, settings=settings, binary=binary)
    view = Moving(*[old] * before, new)
    world.lingering.view = view
    sources = Sources(
        tools=tools,
        view=view,
        lingering=world.lingering,
        shortages=Shortages(Preload([])),
        ahead=Ahead(lambda: None),
        recent=use.load(world.store, ENDED_AT),
    )
    taken = manager_snapshot(sources, [], ENDED_AT + 1)
    assert taken.gpus is not None
    coming = [server for server in taken.servers if server.holds]
    assert (taken.gpus[0].used_bytes == 7 * GIB) == bool(coming)
