"""When the memory of a server that ended is back, and what the planner is told until then."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from smartproxy.catalog.catalog import build_catalog
from smartproxy.config.settings import Settings
from smartproxy.llama.binary import Binary
from smartproxy.manager.context import Manager
from smartproxy.manager.lingering import (
    PATIENCE_S,
    note_end,
    note_others,
    still_held,
    visible_bytes,
)
from smartproxy.manager.use import RecentUse
from smartproxy.planner.ledger import open_ledger
from smartproxy.planner.types import RunningServer
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import NewAssignment, assignments
from smartproxy.state.migrate import create
from smartproxy.state.server_row import NewServer
from smartproxy.types import GIB, GpuProcess, GpuSnapshot, ServerState
from tests.support.worlds import gpu, snapshot

ENDED_AT = 1000.0
OURS = 11


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    settings = Settings()
    store, _ = create(tmp_path / "state.db")
    threads = ThreadPoolExecutor(1)
    yield Manager(
        settings=settings,
        catalog=build_catalog(settings),
        store=store,
        binary=Binary(
            path=Path("llama-server"),
            flags=frozenset(),
            build="b1",
            library_dir=None,
            trace_verbosity=None,
            devices=(),
        ),
        threads=threads,
        poke=lambda: None,
        recent=RecentUse(uses={}, counted_at=0.0),
    )
    threads.shutdown()
    store.close()


def seen(at: float, used_gb: float, **processes_gb: float | None) -> GpuSnapshot:
    """Return a look at one 24 GB card. processes_gb: p11=6 is pid 11 with 6 GB; None: not told."""
    processes = tuple(
        GpuProcess(pid=int(name[1:]), used_bytes=None if size is None else int(size * GIB))
        for name, size in processes_gb.items()
    )
    card = replace(gpu(0, 24, used_gb), processes=processes)
    return GpuSnapshot(gpus=(card,), observed_at=at)


def loaded(manager: Manager, model_id: str = "m", *, pid: int = OURS) -> int:
    """Return a server of ours with 6 GB promised that has long been ready."""
    server_id = server_rows.insert_server(
        manager.store,
        new_server(model_id, pid),
        [NewAssignment(gpu_uuid="GPU-0", gpu_index=0, estimated_bytes=6 * GIB)],
        now=ENDED_AT - 510,
        reason="a test",
    )
    server_rows.update_server(manager.store, server_id, ready_at=ENDED_AT - 500)
    return server_id


def new_server(model_id: str, pid: int) -> NewServer:
    return NewServer(
        model_id=model_id,
        port=8000 + pid,
        api_key="",
        command="[]",
        log_path="",
        settings_key="",
        pid=pid,
    )


def look(manager: Manager, seen: GpuSnapshot) -> None:
    """Do what a pass of the manager does with a new look."""
    manager.gpus = seen
    note_others(manager, server_rows.live_servers(manager.store), assignments(manager.store))


def ended(manager: Manager, *looks: GpuSnapshot) -> int:
    """Have a loaded server of ours end after these looks."""
    server_id = loaded(manager)
    for seen in looks:
        look(manager, seen)
    note_end(manager, server_id, ENDED_AT)
    return server_id


def held(manager: Manager, seen: GpuSnapshot | None = None) -> list[RunningServer]:
    if seen is not None:
        look(manager, seen)
    assert manager.gpus is not None
    return list(still_held(manager, set(), max(ENDED_AT, manager.gpus.observed_at)))


def test_until_a_look_after_its_end_a_server_counts_as_stopping(manager: Manager) -> None:
    ended(manager, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    (server,) = held(manager)
    assert (server.state, server.model_id) == (ServerState.STOPPING, "m")
    assert server.holds["GPU-0"].visible_bytes == 6 * GIB
    assert manager.look_wanted.is_set()


def test_memory_that_outlives_its_process_is_still_its_own(manager: Manager) -> None:
    ended(manager, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    # its process has left the list, its memory is used all the same; the other one grew
    after = seen(ENDED_AT + 0.5, 9, p22=3)
    (server,) = held(manager, after)
    assert server.holds["GPU-0"].visible_bytes == 6 * GIB
    ledger = open_ledger(replace(snapshot(after.gpus), servers=(server,)))
    # of 24 GB, 3 are the other's and 6 come back
    assert [ledger.now[0] // GIB, ledger.later[0] // GIB] == [15, 21]


def test_memory_is_back_when_it_is_no_longer_used(manager: Manager) -> None:
    ended(manager, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    assert held(manager, seen(ENDED_AT + 0.5, 3, p22=3)) == []
    assert manager.ended == {}


def test_an_end_that_a_look_saw_before_we_did_is_no_stranger(manager: Manager) -> None:
    server_id = loaded(manager)
    look(manager, seen(ENDED_AT - 2, 7, p11=6, p22=1))
    late = seen(ENDED_AT - 1, 7, p22=1)
    look(manager, late)
    assert visible_bytes(manager, late.gpus[0], OURS, 6 * GIB) == 6 * GIB
    note_end(manager, server_id, ENDED_AT)
    assert len(held(manager, seen(ENDED_AT + 0.2, 7, p22=1))) == 1
    assert held(manager, seen(ENDED_AT + 0.4, 1, p22=1)) == []


def test_one_end_after_another_is_not_taken_for_somebody_else_s_memory(manager: Manager) -> None:
    first, second = loaded(manager, "first"), loaded(manager, "second", pid=33)
    look(manager, seen(ENDED_AT - 1, 12, p11=6, p33=6))
    note_end(manager, first, ENDED_AT)
    assert len(held(manager, seen(ENDED_AT + 0.2, 12, p33=6))) == 1
    note_end(manager, second, ENDED_AT + 0.3)
    # the first one's memory is back, the second one's is not
    assert len(held(manager, seen(ENDED_AT + 0.5, 6))) > 0
    assert held(manager, seen(ENDED_AT + 0.7, 0)) == []


def test_a_row_that_still_says_it_lives_is_not_told_twice(manager: Manager) -> None:
    server_id = ended(manager, seen(ENDED_AT - 1, 7, p11=6, p22=1))
    assert list(still_held(manager, {server_id}, ENDED_AT)) == []
    assert server_id in manager.ended


def test_a_driver_that_tells_no_process_s_memory_is_watched_by_the_sum(manager: Manager) -> None:
    ended(manager, seen(ENDED_AT - 1, 8, p11=None))
    assert len(held(manager, seen(ENDED_AT + 0.2, 8))) == 1
    assert held(manager, seen(ENDED_AT + 0.4, 2)) == []


def test_a_server_that_the_last_look_did_not_see_yet_leaves_nothing_behind(
    manager: Manager,
) -> None:
    ended(manager, seen(ENDED_AT - 600, 1, p22=1))
    assert held(manager, seen(ENDED_AT + 0.2, 1, p22=1)) == []


def test_memory_that_does_not_come_back_is_waited_for_no_longer_than_said(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    ended(manager, seen(ENDED_AT - 1, 6, p11=6))
    assert len(held(manager, seen(ENDED_AT + PATIENCE_S - 1, 6))) == 1
    assert held(manager, seen(ENDED_AT + PATIENCE_S + 1, 6)) == []
    assert "is not back 5 s after its end" in caplog.text


def test_a_server_on_the_cpu_leaves_nothing_to_wait_for(manager: Manager) -> None:
    manager.gpus = seen(ENDED_AT - 1, 0)
    server_id = server_rows.insert_server(
        manager.store,
        new_server("m", OURS),
        [],
        now=ENDED_AT - 510,
        reason="a test",
    )
    note_end(manager, server_id, ENDED_AT)
    assert manager.ended == {}
