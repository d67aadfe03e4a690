"""The write-ahead log under load: it is moved back into the file and stays small."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smartproxy.state import demands as demand_rows
from smartproxy.state import leases
from smartproxy.state.migrate import create
from smartproxy.state.store import WAL_LIMIT_BYTES, Store

PAGE_BYTES = 4096
WRITERS, WRITES = 3, 4000


def test_the_log_stays_small_while_workers_write_and_read(tmp_path: Path) -> None:
    store, _ = create(tmp_path / "state.db")
    wal = tmp_path / "state.db-wal"
    largest = 0
    done = threading.Event()

    def write(number: int) -> int:
        """Ask and withdraw as a worker does; returns the bytes the log had at most."""
        own, seen = Store(store.path), 0
        for _ in range(WRITES):
            id_ = demand_rows.ask(own, "load", "m" * 200, f"worker-{number}", now=time.time())
            demand_rows.withdraw(own, [id_])
            seen = max(seen, wal.stat().st_size)
        own.close()
        return seen

    def read() -> None:
        own = Store(store.path)
        while not done.is_set():
            demand_rows.open_demands(own)
            leases.routes(own)
        own.close()

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reader = pool.submit(read)
        try:
            largest = max(pool.map(write, range(WRITERS)))
        finally:
            done.set()
        reader.result()
    store.close()
    # each transaction writes a page at the least; the reader never rests, so it may be passed
    assert 2 * WRITERS * WRITES * PAGE_BYTES > 10 * WAL_LIMIT_BYTES
    assert 0 < largest < 6 * WAL_LIMIT_BYTES


def test_a_reader_that_holds_on_stops_no_writer(tmp_path: Path) -> None:
    store, _ = create(tmp_path / "state.db")
    holding = sqlite3.connect(store.path, isolation_level=None)
    holding.execute("BEGIN")
    holding.execute("SELECT * FROM manager").fetchall()
    own = Store(store.path)
    filler = "m" * 100_000
    for _ in range(3 * WAL_LIMIT_BYTES // len(filler)):
        demand_rows.withdraw(own, [demand_rows.ask(own, "load", filler, "worker", now=time.time())])
    assert (tmp_path / "state.db-wal").stat().st_size > 2 * WAL_LIMIT_BYTES
    holding.close()
    for _ in range(WAL_LIMIT_BYTES // len(filler) + 1):
        demand_rows.withdraw(own, [demand_rows.ask(own, "load", filler, "worker", now=time.time())])
    assert (tmp_path / "state.db-wal").stat().st_size <= WAL_LIMIT_BYTES
    own.close()
    store.close()
