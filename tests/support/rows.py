"""Rows of servers for tests that have a state file and no process."""

from __future__ import annotations

from typing import Any

from smartproxy.state import servers as server_rows
from smartproxy.state.server_row import NewServer
from smartproxy.state.store import Store
from smartproxy.types import ServerState


def new_server(model_id: str = "m", port: int = 9000, **more: Any) -> NewServer:
    """Return what a new server's row says. more: other columns."""
    columns = {"api_key": "key", "command": "[]", "log_path": "m.log", "settings_key": "k", **more}
    return NewServer(model_id=model_id, port=port, **columns)


def put_server(store: Store, *states: str, **columns: Any) -> int:
    """Write a server of model m that went from starting through these states; returns its id."""
    new = new_server(**columns)
    server_id = server_rows.insert_server(store, new, [], now=1.0, reason="a test's")
    before = ServerState.STARTING
    for state in map(ServerState, states):
        assert server_rows.transition(store, server_id, before, state, now=2.0, reason="a test's")
        before = state
    return server_id
