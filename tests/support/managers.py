"""A manager in the test's own process: real settings, state file and servers, no main loop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smartproxy.catalog.live import Live
from smartproxy.config.load import load_settings
from smartproxy.gpus.types import GpuSnapshot
from smartproxy.llama import binary
from smartproxy.manager.__main__ import make_manager
from smartproxy.manager.context import Tools
from smartproxy.manager.tick import Manager, tick
from smartproxy.state import demands as demand_rows
from smartproxy.state import migrate
from smartproxy.state import servers as server_rows
from smartproxy.state.server_row import LiveServer
from smartproxy.state.store import Store
from tests.support.running import Proxy, fake_model, wait_until


def manager_of(
    folder: Path,
    threads: ThreadPoolExecutor,
    *,
    models: Mapping[str, Any] | None = None,
    store: Callable[[Path], Store] = Store,
    **settings_: Any,
) -> Manager:
    """Return a manager of these models; without, of one that is called m.

    store: opens the state file, once it is made.
    """
    models = models or {"m": fake_model()}
    settings = load_settings(Proxy(folder, models, **settings_).config_path)
    path, library_dir = binary.find(settings.llama_server, os.environ.get("PATH"))
    state, _ = migrate.create(settings.state_dir / "state.db")
    tools = Tools(
        live=Live(settings),
        store=store(state.path),
        binary=binary.inspect(path, library_dir, os.environ),
        threads=threads,
        poke=lambda: None,
        stopping=threading.Event(),
    )
    return without_look(tools)


def without_look(tools: Tools) -> Manager:
    """Return a manager that begins anew, on a machine without GPUs."""
    manager = make_manager(tools)
    manager.loading.view.seen = GpuSnapshot(gpus=(), observed_at=time.time(), reason="none here")
    return manager


def loaded(manager: Manager, model_id: str = "m") -> LiveServer:
    """Have a model loaded and return its row."""
    store = manager.tools.store
    demand_id = demand_rows.ask(store, "load", model_id, "worker", now=time.time())

    def ready() -> LiveServer | None:
        tick(manager, time.time())
        rows = {row.model_id: row for row in server_rows.live_servers(store)}
        row = rows.get(model_id)
        return row if row is not None and row.state == "ready" else None

    row = wait_until(ready, what=f"{model_id} ready")
    assert row is not None
    demand_rows.withdraw(store, [demand_id])
    return row


def begun(manager: Manager) -> LiveServer:
    """Ask for model m and make passes until its server has a row."""
    store = manager.tools.store
    demand_rows.ask(store, "load", "m", "worker", now=time.time())

    def live() -> list[LiveServer]:
        tick(manager, time.time())  # the first has the model's file read
        return server_rows.live_servers(store)

    [row] = wait_until(live, what="a server has begun")
    return row
