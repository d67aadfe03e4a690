"""What a worker writes for a request that has to wait for its model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from smartproxy.catalog.live import Live
from smartproxy.config.load import load_settings
from smartproxy.proxy.ensure import Broker
from smartproxy.state.migrate import create
from smartproxy.state.store import Store
from tests.support.rows import put_server
from tests.support.running import fake_model


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made, _ = create(tmp_path / "state" / "state.db")
    yield made
    made.close()


def test_a_client_that_goes_while_its_demand_is_written_leaves_none(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    broker = Broker(store, Live(load_settings(path)))

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


def test_a_client_that_goes_when_its_lease_is_written_leaves_none(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    server_id = put_server(store, "ready")
    broker = Broker(store, Live(load_settings(path)))

    async def story() -> None:
        for waits in range(6):  # it goes at each moment around the end of the write
            asking = asyncio.create_task(broker.acquire("m"))
            async with asyncio.timeout(30):
                while not any(writing.done() for writing in broker.held.leases.values()):
                    await asyncio.sleep(0)
            for _ in range(waits):
                await asyncio.sleep(0)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                broker.release(await asking)
            async with asyncio.timeout(30):
                while in_flight(store, server_id) or broker.held.leases:
                    await asyncio.sleep(0.005)

    asyncio.run(story())


def test_a_ready_server_is_used_also_when_no_lease_can_be_written(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    server_id = put_server(store, "ready")
    broker = Broker(store, Live(load_settings(path)))

    async def story() -> None:
        with contextlib.closing(sqlite3.connect(store.path)) as other:
            # as on a full disk: no row can be written
            other.execute(
                "CREATE TRIGGER full BEFORE INSERT ON leases"
                " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )
            other.commit()
        lease = await broker.acquire("m")
        assert lease.server_id == server_id
        broker.release(lease)

    asyncio.run(story())


def test_what_could_not_be_given_back_is_given_back_later(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    server_id = put_server(store, "ready")
    broker = Broker(store, Live(load_settings(path)))

    async def story() -> None:
        lease = await broker.acquire("m")
        waiting = asyncio.create_task(broker.acquire("unknown"))
        with contextlib.closing(sqlite3.connect(store.path)) as other:
            async with asyncio.timeout(30):
                while not left(store):
                    await asyncio.sleep(0.005)
            for name, event in (("a", "UPDATE ON leases"), ("b", "DELETE ON demands")):
                other.execute(
                    f"CREATE TRIGGER {name} BEFORE {event}"
                    " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
                )
            other.commit()
            waiting.cancel()
            broker.release(lease)
            async with asyncio.timeout(30):  # both were tried
                while broker.writer.unwritten < 2:
                    await asyncio.sleep(0.005)
            other.execute("DROP TRIGGER a")
            other.execute("DROP TRIGGER b")
            other.commit()
        async with asyncio.timeout(30):
            while in_flight(store, server_id) or left(store):
                await asyncio.sleep(0.005)

    asyncio.run(story())


def in_flight(store: Store, server_id: int) -> bool:
    rows = store.read("SELECT 1 FROM leases WHERE server_id = ? AND in_flight = 1", (server_id,))
    return bool(rows)


def test_a_state_file_that_is_not_there_yet_is_awaited_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {"m": fake_model()}}))
    early = Store(tmp_path / "state" / "state.db")
    broker = Broker(early, Live(load_settings(path)))

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
