"""Starting and stopping one server, where the two meet."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from smartproxy.lifetime import owned_processes
from smartproxy.manager.bring_down import take_down, unload
from smartproxy.manager.bring_up import free_port as free_port_of
from smartproxy.manager.stop import stop_all
from smartproxy.manager.tick import tick
from smartproxy.state import demands as demand_rows
from smartproxy.state import servers as server_rows
from smartproxy.types import ServerState
from tests.support.managers import begun, manager_of
from tests.support.running import free_port, wait_until


def test_a_server_stopped_before_its_process_began_leaves_none_behind(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        manager, go_on = manager_of(tmp_path, threads), threading.Event()
        threads.submit(go_on.wait)  # the start has to queue
        now = time.time()
        store = manager.tools.store
        row = begun(manager)
        assert server_rows.transition(
            store,
            row.id,
            ServerState.STARTING,
            ServerState.STOPPING,
            now=now,
            reason="a full stop",
        )
        take_down(manager.loading, row.id)
        go_on.set()
    wait_until(
        lambda: not owned_processes(str(manager.tools.settings.state_dir)), what="no process left"
    )
    assert manager.loading.children.snapshot() == {}
    assert server_rows.server(store, row.id).state == ServerState.STOPPED


@pytest.mark.parametrize("state", ["ready", "stopping", "stopped"])
def test_a_state_that_could_not_be_written_is_reached_once_it_can(
    state: str, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as threads:
        manager = manager_of(tmp_path, threads)
        store, carried = manager.tools.store, manager.loading.children.is_carried
        with store.write() as connection:  # as on a full disk
            connection.execute(
                f"CREATE TRIGGER full BEFORE UPDATE OF state ON servers WHEN NEW.state = '{state}'"
                " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )
        row = begun(manager)
        if state != "ready":
            wait_until(lambda: server_rows.server(store, row.id).state == ServerState.READY)
            unload(manager.loading, "m", "a test's", time.time())
        wait_until(lambda: not carried(row.id), what="the thread has ended")
        assert server_rows.live_servers(store)
        with store.write() as connection:
            connection.execute("DROP TRIGGER full")
        tick(manager, time.time())
        end = ServerState.READY if state == "ready" else ServerState.STOPPED
        wait_until(lambda: server_rows.server(store, row.id).state == end, what=end)
        stop_all(manager.loading, grace_s=5, deadline_s=30)
    assert not owned_processes(str(manager.tools.settings.state_dir))


@contextmanager
def taken_ports(count: int) -> Iterator[list[socket.socket]]:
    """Listen on this many ports in a row, one socket each."""
    while True:
        with ExitStack() as stack:
            first = free_port()
            try:
                sockets = [
                    stack.enter_context(socket.create_server(("127.0.0.1", first + number)))
                    for number in range(count)
                ]
            except OSError:
                continue  # somebody else's is among them
            yield sockets
            return


def test_server_gets_a_port_of_the_range_also_below_one_that_was_taken(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads, taken_ports(18) as sockets:
        ports = [one.getsockname()[1] for one in sockets]
        pool = {"size": 2, "port_start": ports[0]}
        manager = manager_of(tmp_path, threads, server_pool=pool)
        sockets[3].close()
        assert free_port_of(manager.tools) == ports[3]
        assert free_port_of(manager.tools, after=ports[-1]) == ports[3]


def test_load_without_a_port_fails_with_the_range_and_who_has_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads, taken_ports(18) as sockets:
        ports = [one.getsockname()[1] for one in sockets]
        pool = {"size": 2, "port_start": ports[0]}
        manager = manager_of(tmp_path, threads, server_pool=pool)
        now = time.time()
        demand_rows.ask(manager.tools.store, "load", "m", "worker", now=now)

        def failed() -> bool:
            tick(manager, now)
            return manager.loading.failures.get("m") is not None

        wait_until(failed, what="the load has failed")
        assert server_rows.live_servers(manager.tools.store) == []
    failure = manager.loading.failures.get("m")
    assert failure is not None
    assert failure.message == (
        f"model 'm': no free port for its server among {ports[0]}-{ports[-1]} (size 2 and 16 more"
        " from server_pool.port_start on): 0 have servers of ours, 18 are in use by others; end"
        " those, or change port_start"
    )
