"""Making the state file: its tables, and what becomes of a file that can't be used."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from smartproxy.errors import StateError
from smartproxy.state.manager_row import manager_row, update_manager
from smartproxy.state.migrate import create, statements

#: the migration's record and a table of a file that was made before the first release
BEFORE_RELEASE = """
CREATE TABLE _sqlite_migrations (migration_set TEXT, name TEXT, applied_at TEXT);
INSERT INTO _sqlite_migrations VALUES ('smartproxy', '0001_first', '2026-01-01');
CREATE TABLE manager (id INTEGER PRIMARY KEY, generation INTEGER NOT NULL DEFAULT 0);
INSERT INTO manager (id) VALUES (1);
"""


def aside(folder: Path) -> list[Path]:
    return list(folder.glob("state.db.unreadable-*"))


def test_a_file_is_made_once_and_opened_from_then_on(tmp_path: Path) -> None:
    store, complaint = create(tmp_path / "state.db")
    update_manager(store, build="b1")
    store.close()
    again, second = create(tmp_path / "state.db")
    assert (complaint, second, aside(tmp_path)) == (None, None, [])
    assert manager_row(again).build == "b1"
    again.close()


def test_a_file_of_before_the_first_release_is_set_aside(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as old:
        old.executescript(BEFORE_RELEASE)
    store, complaint = create(tmp_path / "state.db")
    assert complaint is not None
    assert "set aside" in complaint
    assert len(aside(tmp_path)) == 1
    assert manager_row(store).generation == 0
    store.close()


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database" * 1000)
    store, complaint = create(tmp_path / "state.db")
    assert complaint is not None
    assert len(aside(tmp_path)) == 1
    assert not manager_row(store).stopping
    store.close()


def test_a_trigger_is_one_statement() -> None:
    trigger = "CREATE TRIGGER t AFTER UPDATE ON a\nBEGIN\n    DELETE FROM b;\nEND;\n"
    script = f"-- of a; and b\nCREATE TABLE a (x);\n\n{trigger}"
    assert [part.strip() for part in statements(script)] == [
        "-- of a; and b\nCREATE TABLE a (x);",
        trigger.strip(),
    ]


@pytest.mark.parametrize("broken", ["SELECT nothing FROM nowhere", "no SQL"])
def test_what_sqlite_refuses_is_our_own_error(tmp_path: Path, broken: str) -> None:
    store, _ = create(tmp_path / "state.db")
    with pytest.raises(StateError):
        store.read(broken)
    with pytest.raises(StateError), store.write() as connection:
        connection.execute(broken)
    store.close()


def test_a_file_that_another_process_has_locked_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("CREATE TABLE theirs (x)")
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(create, path)
            wait([made], timeout=0.3)
            assert not made.done()
            other.execute("ROLLBACK")
            other.close()
            store, complaint = made.result(60)
    assert complaint is None
    assert store.read("SELECT 1 FROM manager")


def test_a_full_disk_is_no_reason_to_set_a_file_aside(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StateError):
            create(tmp_path / "state.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert aside(tmp_path) == []
    create(tmp_path / "state.db")[0].close_all()
