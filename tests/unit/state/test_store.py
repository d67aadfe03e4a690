"""Who opens connections to the state file, and when they are closed."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
        with pytest.raises(sqlite3.DatabaseError):
            broken.read("SELECT * FROM manager")
        broken.close()
    assert descriptors(broken) == 0


PROCESS = """
import sys, threading
from pathlib import Path
from smartproxy.state.store import Store
store = Store(Path(sys.argv[1]))
store.read("SELECT * FROM manager")
read = threading.Event()
def stay():
    store.read("SELECT * FROM manager")
    read.set()
    threading.Event().wait()
threading.Thread(target=stay, daemon=True).start()
read.wait()
"""


def test_a_process_that_ends_leaves_no_log(store: Store) -> None:
    store.close_all()
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROCESS, str(store.path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert not store.path.with_name("state.db-wal").exists()


FORK = """
import os, sys, threading
from pathlib import Path
from smartproxy.state.store import Store
store = Store(Path(sys.argv[1]))
with store.write() as connection:
    connection.execute("UPDATE manager SET build = 'parent'")
read, go_on = threading.Event(), threading.Event()
def stay():
    store.read("SELECT * FROM manager")
    read.set()
    go_on.wait()
other = threading.Thread(target=stay)
other.start()
read.wait()
opened = sorted(os.listdir("/proc/self/fd"))
child = os.fork()
if child == 0:
    [row] = store.read("SELECT build FROM manager")
    assert row["build"] == "parent"
    store.close()
    store.close_all()
    left = sorted(os.listdir("/proc/self/fd"))
    assert set(opened) <= set(left), (opened, left)
    del store
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert os.path.exists(sys.argv[1] + "-wal")
with store.write() as connection:
    connection.execute("UPDATE manager SET build = 'still'")
go_on.set()
other.join()
[row] = store.read("SELECT build FROM manager")
assert row["build"] == "still"
assert store.one("PRAGMA integrity_check")[0] == "ok"
"""


def test_a_forked_child_leaves_its_parents_connections_alone(store: Store) -> None:
    store.close_all()
    # from 3.12 on Python warns of a fork beside threads: that is what is tried here
    options = ["-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning"]
    command = [sys.executable, *options, "-c", FORK, str(store.path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
