"""Who closes connections to the state file when a process ends or forks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smartproxy.state.migrate import create
from smartproxy.state.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made, _ = create(tmp_path / "state.db")
    yield made
    made.close_all()


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
