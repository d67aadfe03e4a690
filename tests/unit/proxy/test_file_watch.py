"""Waiting for the state file to move: every waiter is woken by a write of another process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from smartproxy.proxy.file_watch import Moves
from smartproxy.state import demands as demand_rows
from smartproxy.state.migrate import create
from smartproxy.state.store import Store

LONG_S = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store, _ = create(tmp_path / "state.db")
    store.close()
    return store.path


def write(path: Path) -> None:
    """Commit something as another process would: through a connection of its own."""
    other = Store(path)
    demand_rows.ask(other, "load", "m", "worker", now=time.time())
    other.close()


def run(path: Path, story: Callable[[Moves], Awaitable[None]]) -> None:
    store = Store(path)

    async def told() -> None:
        await story(Moves(store))

    asyncio.run(told())
    store.close()


def test_one_write_wakes_all_who_wait(path: Path) -> None:
    async def story(moves: Moves) -> None:
        version = moves.version()
        waiting = [asyncio.create_task(moves.after(version, within_s=LONG_S)) for _ in range(50)]
        await asyncio.sleep(0)
        write(path)
        async with asyncio.timeout(LONG_S / 2):
            await asyncio.gather(*waiting)
        assert moves.version() != version

    run(path, story)


def test_a_write_between_looking_and_waiting_is_not_missed(path: Path) -> None:
    async def story(moves: Moves) -> None:
        for others_wait in (False, True):
            version = moves.version()
            first = asyncio.create_task(moves.after(version, within_s=LONG_S))
            if others_wait:
                await asyncio.sleep(0)
            write(path)
            async with asyncio.timeout(LONG_S / 2):
                await moves.after(version, within_s=LONG_S)
                await first

    run(path, story)


def test_without_a_write_it_returns_after_a_while(path: Path) -> None:
    async def story(moves: Moves) -> None:
        version = moves.version()
        await moves.after(version, within_s=0.01)
        assert moves.version() == version

    run(path, story)


def test_who_stops_waiting_leaves_the_others_waiting(path: Path) -> None:
    async def story(moves: Moves) -> None:
        version = moves.version()
        gone, stays = (asyncio.create_task(moves.after(version, within_s=LONG_S)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        write(path)
        async with asyncio.timeout(LONG_S / 2):
            await stays

    run(path, story)


def test_a_client_that_goes_as_the_file_moves_is_not_forgotten(path: Path) -> None:
    async def story(moves: Moves) -> None:
        waiting = asyncio.create_task(moves.after(moves.version(), within_s=LONG_S))
        await asyncio.sleep(0)
        (waiter,) = moves._waiters
        waiter.set_result(None)  # the file moved, and in the same turn of the loop
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(path, story)
