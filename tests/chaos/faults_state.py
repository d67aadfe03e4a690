"""The state file: locked, full, lost, damaged in place, replaced."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.fault import SERVER_DIED, Faulty, Scene, fault

#: what needs the manager while there is no file to meet it in
NO_FILE = frozenset({"manager_unavailable"})
FILLING_BYTES = 1 << 16


def _path(scene: Scene) -> Path:
    return scene.machine.state_dir / "state.db"


@contextlib.contextmanager
def _connection(scene: Scene) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(_path(scene), timeout=5, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@fault("the state file is locked for a while", hold_s=(1.0, 4.0), weight=2)
def locked(scene: Scene) -> Faulty:
    with _connection(scene) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@fault(
    "the state file is locked longer than writers wait",
    NO_FILE,
    hold_s=(12.0, 14.0),
    weight=0.3,
)
def locked_long(scene: Scene) -> Faulty:
    with _connection(scene) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@fault("the state file is locked again and again", hold_s=(0.0, 0.1))
def locked_often(scene: Scene) -> Faulty:
    with _connection(scene) as connection:
        for _ in range(10):
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(scene.chooser.uniform(0.05, 0.3))
            connection.execute("ROLLBACK")
    yield


@fault("somebody reads the state file for a long time", hold_s=(2.0, 4.0))
def long_reader(scene: Scene) -> Faulty:
    with _connection(scene) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM events").fetchone()
        yield
        connection.execute("ROLLBACK")


@fault(
    "the disk of the state file is full",
    NO_FILE,
    "model_load_failed",
    hold_s=(0.5, 3.0),
    weight=2,
)
def full(scene: Scene) -> Faulty:
    if not scene.machine.state_is_small:
        scene.skipped = "the state folder is no file system of its own here"
        yield
        return
    filler = scene.machine.state_dir / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * FILLING_BYTES)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    yield
    filler.unlink()


@fault("the state file is removed", NO_FILE, weight=2)
def removed(scene: Scene) -> Faulty:
    _path(scene).unlink()
    yield


@fault("the state file and its log are removed", NO_FILE)
def all_removed(scene: Scene) -> Faulty:
    for entry in scene.machine.state_dir.glob("state.db*"):
        entry.unlink(missing_ok=True)
    yield


@fault("the state file is removed and the manager killed", NO_FILE)
def removed_and_killed(scene: Scene) -> Faulty:
    _path(scene).unlink()
    os.kill(scene.tree.manager[0], 9)
    yield


@fault("the write-ahead log is removed", NO_FILE)
def log_removed(scene: Scene) -> Faulty:
    (scene.machine.state_dir / "state.db-wal").unlink(missing_ok=True)
    yield


@fault("the write-ahead log's index is removed", NO_FILE)
def index_removed(scene: Scene) -> Faulty:
    (scene.machine.state_dir / "state.db-shm").unlink(missing_ok=True)
    yield


def _damage(scene: Scene, at: int, size: int) -> None:
    with _path(scene).open("r+b") as file:
        file.seek(at)
        file.write(scene.chooser.randbytes(size))


@fault("the state file's head is damaged in place", NO_FILE, SERVER_DIED)
def head_damaged(scene: Scene) -> Faulty:
    _damage(scene, 0, 100)
    yield


@fault("pages of the state file are damaged in place", NO_FILE, SERVER_DIED)
def pages_damaged(scene: Scene) -> Faulty:
    pages = _path(scene).stat().st_size // 4096
    for _ in range(max(1, pages // 3)):
        _damage(scene, 4096 * scene.chooser.randrange(pages), 4096)
    yield


@fault("the state file is cut short", NO_FILE, SERVER_DIED)
def truncated(scene: Scene) -> Faulty:
    os.truncate(_path(scene), scene.chooser.choice((0, 4096, 3 * 4096 + 100)))
    yield


@fault("the write-ahead log is damaged in place", NO_FILE, SERVER_DIED)
def log_damaged(scene: Scene) -> Faulty:
    log = scene.machine.state_dir / "state.db-wal"
    size = log.stat().st_size if log.exists() else 0
    if size:
        with log.open("r+b") as file:
            file.seek(scene.chooser.randrange(size))
            file.write(scene.chooser.randbytes(3000))
    yield


@fault("the state file is replaced by an older copy", NO_FILE, SERVER_DIED)
def replaced(scene: Scene) -> Faulty:
    copy = scene.machine.folder / "copy.db"
    copy.unlink(missing_ok=True)
    with _connection(scene) as connection, contextlib.closing(sqlite3.connect(copy)) as target:
        connection.backup(target)
    time.sleep(1.0)
    shutil.copy(copy, scene.machine.state_dir / "new.db")
    os.replace(scene.machine.state_dir / "new.db", _path(scene))
    yield


@fault("the manager's socket is removed")
def socket_removed(scene: Scene) -> Faulty:
    (scene.machine.state_dir / "manager.sock").unlink(missing_ok=True)
    yield


@fault("the servers' logs are removed")
def logs_removed(scene: Scene) -> Faulty:
    for entry in scene.machine.state_dir.rglob("*.log"):
        entry.unlink(missing_ok=True)
    yield


@fault(
    "the state folder can't be written",
    NO_FILE,
    "model_load_failed",
    hold_s=(0.5, 2.0),
)
def read_only(scene: Scene) -> Faulty:
    """root may write in spite of the mode bits: so nothing new can be made, by its attribute."""
    folder = scene.machine.state_dir
    chattr = shutil.which("chattr")
    if chattr is None or os.spawnv(os.P_WAIT, chattr, [chattr, "-f", "+i", str(folder)]):
        scene.skipped = "this file system has no attribute against writing"
        yield
        return
    try:
        yield
    finally:
        os.spawnv(os.P_WAIT, chattr, [chattr, "-f", "-i", str(folder)])
