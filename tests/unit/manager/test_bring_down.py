"""Who ends a server, and when: a drain waits for what it can't see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smartproxy.manager import bring_down
from smartproxy.manager.bring_down import Ending, drain, on_server
from smartproxy.manager.children import Children
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.lingering import Lingering
from smartproxy.state import servers as server_rows
from smartproxy.state.migrate import create
from smartproxy.state.store import Store
from smartproxy.types import ServerState
from tests.support.rows import put_server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made, _ = create(tmp_path / "state.db")
    yield made
    made.close()


def ending(store: Store, threads: Any = None) -> Ending:
    tools: Any = SimpleNamespace(store=store, poke=lambda: None, threads=threads)
    return Ending(
        tools=tools,
        children=Children(),
        lingering=Lingering(store, GpuView(lambda: None)),
    )


def answers(monkeypatch: pytest.MonkeyPatch, *slots: int | None) -> list[int | None]:
    """Have the server say so of its slots, the last for ever; returns what was asked."""
    asked: list[int | None] = []

    def slots_busy(port: int, api_key: str) -> int | None:
        asked.append(slots[min(len(asked), len(slots) - 1)])
        return asked[-1]

    monkeypatch.setattr(bring_down, "slots_busy", slots_busy)
    return asked


@pytest.mark.parametrize("only_if_idle", [False, True])
def test_a_drain_waits_for_a_server_that_does_not_answer(
    store: Store, monkeypatch: pytest.MonkeyPatch, only_if_idle: bool
) -> None:
    asked = answers(monkeypatch, None, None, None, 0)
    server_id = put_server(store, "ready", "draining")
    drain(ending(store), server_id, only_if_idle=only_if_idle)
    assert asked == [None, None, None, 0]
    assert server_rows.server(store, server_id).state == ServerState.STOPPED


def test_a_server_that_is_silent_for_long_is_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bring_down, "SILENT_S", 0.1)
    answers(monkeypatch, None)
    server_id = put_server(store, "ready", "draining")
    drain(ending(store), server_id)
    assert server_rows.server(store, server_id).state == ServerState.STOPPED


def test_a_server_that_was_silent_and_is_in_use_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, None, 2)
    server_id = put_server(store, "ready", "draining")
    drain(ending(store), server_id, only_if_idle=True)
    assert asked == [None, 2]
    assert server_rows.server(store, server_id).state == ServerState.READY


class Full:
    """A pool that can't start a thread. queues: it keeps the work, as Python's pools do."""

    def __init__(self, *, queues: bool) -> None:
        self.queue: list[Callable[[], None]] = []
        self._queues = queues

    def submit(self, work: Callable[[], None]) -> None:
        if self._queues:
            self.queue.append(work)
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("queues", [False, True])
def test_a_server_that_gets_no_thread_is_free_for_the_next_pass(
    store: Store, queues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartproxy.manager.children.REST_S", 0.0)
    full, ran = Full(queues=queues), []
    scene = ending(store, full)
    on_server(scene, 1, lambda _ending, server_id: ran.append(server_id))
    assert not scene.children.is_carried(1)
    with ThreadPoolExecutor(1) as threads:
        on_server(ending_with(scene, threads), 1, lambda _ending, server_id: ran.append(server_id))
    for late in full.queue:  # a thread of the pool was free after all
        late()
    assert ran == [1]
    assert not scene.children.is_carried(1)


def ending_with(scene: Ending, threads: ThreadPoolExecutor) -> Ending:
    tools: Any = SimpleNamespace(store=scene.tools.store, poke=lambda: None, threads=threads)
    return Ending(tools=tools, children=scene.children, lingering=scene.lingering)
