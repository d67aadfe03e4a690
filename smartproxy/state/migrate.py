"""Make state.db, or bring an older one up to date. What its tables hold is in tables.sql.

The manager's part: workers never import this, nor what it takes.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from sqlite_utils import Database, Migrations

from smartproxy.errors import StateError
from smartproxy.state import clock
from smartproxy.state.store import DAMAGED, LOCKED, Store, code_of, connect

migrations = Migrations("smartproxy")

#: seconds that a start waits for a process which holds the lock: workers that come up at the same
#: moment hold it for milliseconds, a person's shell for longer
LOCKED_PATIENCE_S = 60.0
LOCKED_EVERY_S = 0.05
#: the file is at fault: damaged, of another program (no such table), or found so by us (0)
UNUSABLE = DAMAGED | {sqlite3.SQLITE_ERROR, 0}


def create(path: Path) -> tuple[Store, str | None]:
    """Open the state file, making or migrating it; only the manager calls this.

    Returns the store, and a sentence for the log when an unreadable file was set aside. Waits while
    another process holds the lock: up to LOCKED_PATIENCE_S. Raises StateError then, and where the
    disk is at fault and not the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    complaint = None
    deadline = time.monotonic() + LOCKED_PATIENCE_S
    while True:
        try:
            _prepare(path)
            return Store(path), complaint
        except sqlite3.DatabaseError as error:
            if code_of(error) in LOCKED and time.monotonic() < deadline:
                time.sleep(LOCKED_EVERY_S)
                continue
            if complaint or code_of(error) not in UNUSABLE:
                raise StateError(f"{path}: {error}") from error
            aside = set_aside(path)
            complaint = (
                f"state file {path} can't be used ({error}): set aside as {aside}, made anew"
            )


def _prepare(path: Path) -> None:
    if path.is_symlink():  # what it points to would be made ours alone
        raise StateError(f"{path} is a symbolic link: `rm {path}`; it is made anew")
    # owner only from the first byte on, whatever the umask
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
    os.chmod(path, 0o600)
    connection = connect(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        broken = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if broken != "ok":
            raise sqlite3.DatabaseError(broken)
        migrations.apply(Database(connection))
        clock.set_for_this_boot(connection)
        # a file of ours from another age, or somebody else's: not usable
        connection.execute("SELECT generation FROM manager WHERE id = 1").fetchone()[0]
    finally:
        connection.close()


def set_aside(path: Path) -> str:
    """Move the file out of the way, and what SQLite keeps beside it; returns its new name."""
    aside = path.with_name(f"{path.name}.unreadable-{int(time.time())}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside.name


@migrations(name="0001_tables")
def tables(db: Database) -> None:
    """Create tables, triggers and views.

    Fails in a file of before the first release, whose migrations had other names: it is made anew.
    """
    script = resources.files(__package__).joinpath("tables.sql").read_text(encoding="utf-8")
    for statement in statements(script):
        db.execute(statement)
    # a worker that waits knows from its demand's number whether the file was made anew
    first = time.time_ns() // 1000
    db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('demands', ?)", (first,))


@migrations(name="0002_pass_age")
def pass_age(db: Database) -> None:
    """How long the manager's loop stands."""
    db.execute("ALTER TABLE manager ADD COLUMN pass_age_s REAL")


@migrations(name="0003_clock")
def clock_table(db: Database) -> None:
    """Bring a file up to date whose tables were made before there was a clock."""
    if "clock" in db.table_names():
        return
    db.execute(
        "CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), boot_id TEXT NOT NULL,"
        " offset_s REAL NOT NULL)"
    )
    db.execute("ALTER TABLE servers RENAME COLUMN pid_started_at TO pid_start_ticks")


@migrations(name="0004_pause")
def pause(db: Database) -> None:
    """Since when requests queue on purpose."""
    db.execute("ALTER TABLE manager ADD COLUMN paused_at REAL")


def statements(script: str) -> Iterator[str]:
    """Yield the statements of a script one by one; executescript would commit the transaction."""
    lines: list[str] = []
    for line in script.splitlines(keepends=True):
        lines.append(line)
        text = "".join(lines)
        # a trigger's inner statements end with a semicolon too
        if line.rstrip().endswith(";") and sqlite3.complete_statement(text):
            yield text
            lines = []
