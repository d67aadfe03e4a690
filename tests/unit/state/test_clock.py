"""The file's clock: the same for all processes, and the wall clock's only when it was made."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from smartproxy.state import clock, demands, leases, migrate
from smartproxy.state import servers as server_rows
from smartproxy.state.store import Store, connect
from tests.support.rows import put_server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def set_back(path: Path, seconds: float) -> None:
    """Make a file as it would be had the clock been so much earlier when it was made."""
    with closing(connect(path)) as connection:
        connection.execute("UPDATE clock SET offset_s = offset_s - ?", (seconds,))


def test_a_new_file_tells_the_time_of_the_wall_clock(path: Path) -> None:
    store, _ = migrate.create(path)
    assert store.now() == pytest.approx(time.time(), abs=60)


def test_all_stores_of_a_file_agree_whatever_the_wall_clock_says_now(path: Path) -> None:
    migrate.create(path)[0].close_all()
    set_back(path, 3600)
    again, _ = migrate.create(path)
    worker = Store(path)
    assert again.now() == pytest.approx(time.time() - 3600, abs=60)
    assert worker.now() == pytest.approx(again.now(), abs=60)


def test_a_store_without_a_file_tells_the_wall_clocks_time(path: Path) -> None:
    store = Store(path)
    assert store.now() == pytest.approx(time.time(), abs=60)
    migrate.create(path)[0].close_all()
    set_back(path, 3600)
    assert store.now() == pytest.approx(time.time() - 3600, abs=60)


def test_a_store_that_opens_the_file_while_it_is_made_tells_its_time_later(path: Path) -> None:
    migrate.create(path)[0].close_all()
    with closing(connect(path)) as connection:
        connection.execute("DELETE FROM clock")
        store = Store(path)
        assert store.now() == pytest.approx(time.time(), abs=60)
        clock.set_for_this_boot(connection)
    set_back(path, 3600)
    assert store.now() == pytest.approx(time.time() - 3600, abs=60)


def test_after_a_boot_nobody_of_before_holds_or_wants_anything(path: Path) -> None:
    store, _ = migrate.create(path)
    server_id = put_server(store, "ready", pid=1, pid_start_ticks=7)
    demands.ask(store, "load", "m", "1:2", now=store.now())
    assert leases.take_lease(store, "1:2", server_id, now=store.now())
    with store.write() as connection:
        connection.execute("UPDATE clock SET boot_id = 'another', offset_s = 0")
    store.close_all()
    again, _ = migrate.create(path)
    assert again.now() == pytest.approx(time.time(), abs=60)
    assert leases.workers_seen(again) == set()
    [row] = server_rows.live_servers(again)
    assert row.pid_start_ticks is None
    with closing(connect(path)) as connection:
        assert clock.offset_s(connection) is not None


def test_a_file_of_before_there_was_a_clock_gets_one(path: Path) -> None:
    migrate.create(path)[0].close_all()
    with closing(connect(path)) as connection:
        connection.execute("DROP TABLE clock")
        connection.execute("ALTER TABLE servers RENAME COLUMN pid_start_ticks TO pid_started_at")
        connection.execute("DELETE FROM _sqlite_migrations WHERE name = '0003_clock'")
    store, complaint = migrate.create(path)
    assert complaint is None
    assert store.now() == pytest.approx(time.time(), abs=60)
    assert server_rows.live_servers(store) == []
