"""Unix seconds that all processes share and that no setting of the clock moves.

Rows of several processes carry times that are compared: a lease's expiry, a heartbeat. The wall
clock jumps (NTP, a person, a virtual machine that goes on). So the file keeps what the wall clock
said at monotonic second 0, as of when the file was made; all add to it the monotonic seconds that
the machine has counted since. After a boot these begin anew, and no process of ours lives.
"""

from __future__ import annotations

import sqlite3
import time
from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Return what names this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def offset_s(connection: sqlite3.Connection) -> float | None:
    """Return what the file adds to monotonic seconds; None before the manager has set it."""
    try:
        row = connection.execute(
            "SELECT offset_s FROM clock WHERE id = 1 AND boot_id = ?", (boot_id(),)
        ).fetchone()
    except sqlite3.Error:
        return None  # whoever reads next is told
    return None if row is None else float(row[0])


def set_for_this_boot(connection: sqlite3.Connection) -> None:
    """Begin anew after a boot: set the clock, and forget what names processes of before.

    Their servers' rows stay; without ticks the manager finds that they have ended.
    """
    if offset_s(connection) is not None:
        return
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM clock")
    connection.execute(
        "INSERT INTO clock (id, boot_id, offset_s) VALUES (1, ?, ?)",
        (boot_id(), time.time() - time.monotonic()),
    )
    connection.execute("UPDATE servers SET pid_start_ticks = NULL")
    connection.execute("UPDATE manager SET pid = NULL, heartbeat_at = NULL")
    connection.execute("DELETE FROM leases")
    connection.execute("DELETE FROM demands")
    connection.execute("COMMIT")
