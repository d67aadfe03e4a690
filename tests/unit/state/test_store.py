"""Who opens connections to the state file, and when they are closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smartproxy.errors import StateError
from smartproxy.state.migrate import create
from smartproxy.state.store import Store

SHORT_LIVED_THREADS = 200


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made, _ = create(tmp_path / "state.db")
    yield made
    made.close_all()


def descriptors(store: Store) -> int:
    """Return how many descriptors this process has open on the state file and its log."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # the one that lists
            continue
        count += target.startswith(str(store.path))
    return count


def test_threads_that_end_leave_no_descriptor(store: Store) -> None:
    store.read("SELECT * FROM manager")
    before = descriptors(store)
    for _ in range(SHORT_LIVED_THREADS):
        thread = threading.Thread(target=store.read, args=["SELECT * FROM manager"])
        thread.start()
        thread.join()
    assert descriptors(store) <= before + 1


def test_connections_of_threads_that_live_on_are_closed_together(store: Store) -> None:
    read, go_on = threading.Barrier(4), threading.Event()

    def work() -> None:
        store.read("SELECT * FROM manager")
        read.wait()
        go_on.wait()

    with ThreadPoolExecutor(3) as threads:
        working = [threads.submit(work) for _ in range(3)]
        read.wait()
        assert descriptors(store)
        store.close_all()
        assert descriptors(store) == 0
        go_on.set()
        for thread in working:
            thread.result()
    assert store.read("SELECT id FROM manager")[0]["id"] == 1


def test_the_end_of_a_store_closes_its_connections(tmp_path: Path) -> None:
    made, _ = create(tmp_path / "state.db")
    with ThreadPoolExecutor(1) as threads:
        threads.submit(made.read, "SELECT * FROM manager").result()
        made.read("SELECT * FROM manager")
        wal = tmp_path / "state.db-wal"
        assert wal.exists()
        del made
        assert not wal.exists()  # SQLite removes it with the last connection


def test_a_file_that_is_none_of_ours_is_not_kept_open(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("no database" * 1000)
    broken = Store(path)
    for _ in range(3):
        with pytest.raises(StateError):
            broken.read("SELECT * FROM manager")
        broken.close()
    assert descriptors(broken) == 0


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_log_that_is_removed_while_in_use_is_damage(store: Store, suffix: str) -> None:
    """Found by chaos: who opened the file afterwards got "disk I/O error" for good."""
    with store.write() as connection:
        connection.execute("UPDATE manager SET pid = 1")
    store.look_beside()
    assert store.damage is None
    store.path.with_name(store.path.name + suffix).unlink()
    store.look_beside()
    assert store.damage == f"state.db{suffix} was removed while in use"
