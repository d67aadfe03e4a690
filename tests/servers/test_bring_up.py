"""Starting and stopping one server, where the two meet."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smartproxy.catalog.catalog import build_catalog
from smartproxy.config.load import load_settings
from smartproxy.lifetime import owned_processes
from smartproxy.llama import binary
from smartproxy.manager.__main__ import make_manager
from smartproxy.manager.bring_down import take_down
from smartproxy.manager.context import Tools
from smartproxy.manager.tick import Manager, tick
from smartproxy.state import demands as demand_rows
from smartproxy.state import migrate
from smartproxy.state import servers as server_rows
from smartproxy.types import GpuSnapshot, ServerState
from tests.support.running import Proxy, fake_model, wait_until

pytestmark = pytest.mark.servers


def manager_of(folder: Path, threads: ThreadPoolExecutor) -> Manager:
    settings = load_settings(Proxy(folder, {"m": fake_model()}).config_path)
    path, library_dir = binary.find(settings.llama_server, os.environ.get("PATH"))
    state, _ = migrate.create(settings.state_dir / "state.db")
    tools = Tools(
        settings=settings,
        catalog=build_catalog(settings),
        store=state,
        binary=binary.inspect(path, library_dir, os.environ),
        threads=threads,
        poke=lambda: None,
        stopping=threading.Event(),
    )
    manager = make_manager(tools)
    manager.loading.view.seen = GpuSnapshot(gpus=(), observed_at=time.time(), reason="none here")
    return manager


def test_a_server_stopped_before_its_process_began_leaves_none_behind(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        manager, go_on = manager_of(tmp_path, threads), threading.Event()
        threads.submit(go_on.wait)  # the start has to queue
        now = time.time()
        store = manager.tools.store
        demand_rows.ask(store, "load", "m", "worker", now=now)
        tick(manager, now)
        [row] = server_rows.live_servers(store)
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
