"""What becomes of a server whose process ended before it was ready."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from smartproxy.llama.process import Child
from smartproxy.manager.bring_up import Loading, resume
from smartproxy.manager.children import Children
from smartproxy.manager.context import Ahead
from smartproxy.manager.failures import Failure, Failures
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.lingering import Lingering
from smartproxy.manager.shortage import Shortages
from smartproxy.state import servers as server_rows
from smartproxy.state.migrate import create
from smartproxy.state.store import Store
from smartproxy.types import ServerState
from tests.support.ports import free_port
from tests.support.rows import put_server

#: of a process that is no more: start ticks are never 0
GONE = Child(pid=1, start_ticks=0)


class Seen(Failures):
    """Failures that also know what they were ever told, however shortly."""

    def __init__(self) -> None:
        super().__init__(lambda: 10.0)
        self.added: list[str] = []

    def add(self, model_id: str, code: str, message: str) -> Failure | None:
        self.added.append(code)
        return super().add(model_id, code, message)


@dataclass
class Scene:
    store: Store
    failures: Seen = field(default_factory=Seen)
    children: Children = field(default_factory=Children)

    def server(self, *states: ServerState) -> int:
        """Return a server whose process ended, moved through these states."""
        server_id = put_server(self.store, *states, port=free_port(), log_path="/nonexistent")
        self.children.add(server_id, GONE)
        return server_id

    def resume(self, server_id: int) -> ServerState:
        view = GpuView(lambda: None)
        tools: Any = SimpleNamespace(store=self.store, poke=lambda: None)
        loading = Loading(
            tools=tools,
            children=self.children,
            lingering=Lingering(self.store, view),
            view=view,
            failures=self.failures,
            shortages=cast(Shortages, threading.Event()),
            ahead=Ahead(lambda: None),
        )
        spec: Any = SimpleNamespace(id="m", load_timeout_s=60.0)
        resume(loading, server_id, spec)
        return server_rows.server(self.store, server_id).state


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    store, _ = create(tmp_path / "state.db")
    yield Scene(store)
    store.close()


def test_a_server_that_ended_while_loading_has_failed(scene: Scene) -> None:
    assert scene.resume(scene.server()) == ServerState.FAILED
    assert scene.failures.added == ["model_load_failed"]


@pytest.mark.parametrize("states", [[ServerState.STOPPING], [ServerState.STOPPING, "stopped"]])
def test_a_server_that_was_stopped_while_loading_has_not_failed_even_for_a_moment(
    scene: Scene, states: list[ServerState]
) -> None:
    server_id = scene.server(*(ServerState(state) for state in states))
    assert scene.resume(server_id) == states[-1]
    assert scene.failures.added == []
