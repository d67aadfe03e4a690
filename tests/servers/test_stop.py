"""A full stop ends every server and then itself, whatever state anything is in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from smartproxy.lifetime import owned_processes, worker_id
from smartproxy.manager.bring_down import on_server
from smartproxy.manager.stop import stop_all
from smartproxy.manager.tick import Manager, tick
from smartproxy.state import leases
from smartproxy.state import servers as server_rows
from smartproxy.types import ServerState
from tests.servers.test_unknown_models import brand_new, build_with_tool
from tests.support.gpu_running import Card, gpu_machine, world_of
from tests.support.managers import begun, loaded, manager_of
from tests.support.running import wait_until

#: no stop of these tests may take so long: they would otherwise wait for it
FOREVER_S = 3600.0


@contextmanager
def stopping(manager: Manager, *, grace_s: float = FOREVER_S) -> Iterator[None]:
    """Do what the block says while a full stop runs; fails if the stop does not end."""
    done = threading.Event()

    def stop() -> None:
        stop_all(manager.loading, grace_s=grace_s, deadline_s=FOREVER_S)
        done.set()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    yield
    assert done.wait(60), server_rows.live_servers(manager.tools.store)


def nothing_is_left(manager: Manager) -> None:
    assert server_rows.live_servers(manager.tools.store) == []
    assert manager.loading.children.snapshot() == {}
    assert not owned_processes(str(manager.tools.settings.state_dir))


def starting(manager: Manager) -> int:
    """Return the server of a model that has just begun to load."""
    return begun(manager).id


def drain_without_thread(manager: Manager) -> None:
    row = loaded(manager)
    now = time.time()
    store = manager.tools.store
    server_rows.transition(
        store, row.id, ServerState.READY, ServerState.DRAINING, now=now, reason="a test's"
    )


def stop_without_thread(manager: Manager) -> None:
    drain_without_thread(manager)
    store = manager.tools.store
    [row] = server_rows.live_servers(store)
    server_rows.transition(
        store, row.id, ServerState.DRAINING, ServerState.STOPPING, now=time.time(), reason="so"
    )


def killed(manager: Manager) -> None:
    loaded(manager)
    for process in owned_processes(str(manager.tools.settings.state_dir)):
        process.kill()


@pytest.mark.parametrize("case", [drain_without_thread, stop_without_thread, killed, loaded])
def test_a_stop_carries_on_what_no_thread_carries(
    case: Callable[[Manager], object], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        case(manager)
        with stopping(manager):
            pass
        nothing_is_left(manager)


def test_a_server_kept_by_its_drain_while_the_stop_runs_is_ended_too(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        row, store = loaded(manager), manager.tools.store
        on_hold, go_on = threading.Event(), threading.Event()
        server_rows.transition(
            store, row.id, ServerState.READY, ServerState.DRAINING, now=time.time(), reason="room"
        )

        def keep(*_: object) -> None:
            on_hold.set()
            go_on.wait()
            server_rows.transition(
                store, row.id, ServerState.DRAINING, ServerState.READY, now=time.time(), reason="?"
            )

        on_server(manager.loading, row.id, keep)
        on_hold.wait()
        with stopping(manager):
            go_on.set()
        nothing_is_left(manager)


def test_a_stop_ends_what_is_still_leased_after_its_grace(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        row = loaded(manager)
        assert leases.take_lease(manager.tools.store, worker_id(), row.id, now=time.time())
        with stopping(manager, grace_s=0.3):
            pass
        nothing_is_left(manager)


def test_a_start_that_waits_for_a_thread_starts_nothing_once_a_stop_has_begun(
    tmp_path: Path,
) -> None:
    with ThreadPoolExecutor(1) as threads:
        manager, go_on = manager_of(tmp_path, threads), threading.Event()
        threads.submit(go_on.wait)
        starting(manager)
        with stopping(manager):
            wait_until(manager.loading.children.is_closed)
            go_on.set()
        nothing_is_left(manager)


def test_a_stop_goes_on_once_the_state_file_can_be_written(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        loaded(manager)
        store = manager.tools.store
        with store.write() as connection:  # as on a full disk
            connection.execute(
                "CREATE TRIGGER full BEFORE UPDATE OF state ON servers"
                " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )
        with stopping(manager):
            wait_until(manager.loading.children.is_closed)
            with store.write() as connection:
                connection.execute("DROP TRIGGER full")
        nothing_is_left(manager)


def test_a_stop_without_a_state_file_kills_what_there_is_after_its_grace(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        loaded(manager)
        path = manager.tools.store.path
        manager.tools.store.close_all()
        for part in path.parent.glob("state.db*"):
            part.unlink()
        path.mkdir()
        with stopping(manager, grace_s=0.2):
            pass
        owner = str(manager.tools.settings.state_dir)
        wait_until(lambda: not owned_processes(owner), what="killed")


def test_a_process_whose_row_has_ended_is_ended(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        stop_without_thread(manager)
        store = manager.tools.store
        [row] = server_rows.live_servers(store)
        server_rows.transition(
            store, row.id, ServerState.STOPPING, ServerState.STOPPED, now=time.time(), reason="so"
        )

        def passed() -> bool:
            tick(manager, time.time())  # one may find that a thread still carries it
            return not manager.loading.children.snapshot()

        wait_until(passed, what="no process")
        nothing_is_left(manager)


def test_the_end_waits_for_no_tool_that_hangs(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep {FOREVER_S:.0f}"
    server = build_with_tool(tmp_path / "bin", body)
    models = {"new": brand_new(tmp_path)}
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models, llama_server=str(server)) as (
        proxy,
        _,
    ):
        wait_until(pid.exists, what="the tool runs")
        proxy.stop()
        wait_until(lambda: not psutil.pid_exists(int(pid.read_text())), what="the tool has ended")
