"""What a worker writes for a request that has to wait for its model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from smartproxy.config.load import load_settings
from smartproxy.proxy.ensure import Broker
from smartproxy.state.migrate import create
from smartproxy.state.store import Store
from tests.support.running import fake_model


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made, _ = create(tmp_path / "state" / "state.db")
    yield made
    made.close()


def test_a_client_that_goes_while_its_wish_is_written_leaves_none(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    broker = Broker(store, load_settings(path))

    async def story() -> None:
        with contextlib.closing(sqlite3.connect(store.path)) as other:
            other.execute("BEGIN IMMEDIATE")  # its write has to wait
            asking = asyncio.create_task(broker.acquire("m"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            other.rollback()
        async with asyncio.timeout(30):
            while not written(store) or left(store):
                await asyncio.sleep(0.005)

    asyncio.run(story())


def test_a_state_file_that_is_not_there_yet_is_awaited_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    early = Store(tmp_path / "state" / "state.db")
    broker = Broker(early, load_settings(path))

    async def story() -> None:
        waiting = [asyncio.create_task(broker.acquire("m")) for _ in range(30)]
        await asyncio.sleep(0)  # each has looked for a route
        made, _ = create(early.path)
        async with asyncio.timeout(30):
            while not left(made):
                await asyncio.sleep(0.005)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        async with asyncio.timeout(30):
            while left(made):
                await asyncio.sleep(0.005)
        made.close_all()

    asyncio.run(story())
    early.close_all()
    assert caplog.messages == []


def written(store: Store) -> bool:
    return store.one("SELECT 1 AS yes FROM sqlite_sequence WHERE name = 'demands'") is not None


def left(store: Store) -> bool:
    return store.one("SELECT 1 AS yes FROM demands") is not None
