"""What must hold after every fault, once no request is in flight.

Each check returns what is wrong, or nothing; what needs a moment to settle is looked at until a
deadline.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from smartproxy.lifetime import owned_processes
from tests.chaos.client import ask, request
from tests.chaos.judge import OK, judge
from tests.chaos.machine import Machine

SETTLE_S = 60.0
LOOK_EVERY_S = 0.05
#: a process may have so many more than at its first audit: pools and caches that fill
MORE_DESCRIPTORS, MORE_THREADS = 60, 140


@dataclass(slots=True)
class Audit:
    """Remembers what each process had first, to see what it does not give back."""

    machine: Machine
    _first: dict[int, tuple[int, int]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Return what is wrong and stays wrong."""
        checks: list[Callable[[], list[str]]] = [
            self._processes,
            self._rows,
            self._orphans,
            self._promises,
            self._sockets,
            self._descriptors,
            self._file,
            self._health,
        ]
        found: list[str] = []
        end = time.monotonic() + SETTLE_S
        for check in checks:
            while problems := _tried(check):
                if time.monotonic() > end:
                    found += problems
                    break
                time.sleep(LOOK_EVERY_S)
        return found

    def _processes(self) -> list[str]:
        tree = self.machine.tree()
        counts = {
            "guard": len(tree.guard),
            "manager": len(tree.manager),
            "gunicorn": len(tree.gunicorn),
        }
        wrong = [f"{count} of {role} run" for role, count in counts.items() if count != 1]
        return wrong + ([] if len(tree.worker) >= 2 else [f"{len(tree.worker)} workers run"])

    def _rows(self) -> list[str]:
        rows = self.machine.proxy.rows
        leased = rows("SELECT * FROM leases WHERE in_flight > 0")
        open_demands = rows("SELECT kind, model_id FROM demands WHERE answered_at IS NULL")
        moving = self.machine.servers("starting", "draining", "stopping")
        return [
            *(f"a lease is left: {row}" for row in leased),
            *(f"a demand is left: {row}" for row in open_demands),
            *(f"server {row['id']} of {row['model_id']} is {row['state']}" for row in moving),
        ]

    def _orphans(self) -> list[str]:
        rows = {row["pid"]: row["model_id"] for row in self.machine.servers()}
        found = {process.pid for process in owned_processes(str(self.machine.state_dir))}
        return [
            *(f"an orphan: llama-server {pid}" for pid in sorted(found - rows.keys())),
            *(f"the server of {rows[pid]} ({pid}) is gone" for pid in rows.keys() - found),
        ]

    def _promises(self) -> list[str]:
        return oversubscribed(self.machine)

    def _sockets(self) -> list[str]:
        """Connections of the proxy that the other side, client or server, has closed."""
        left = [
            f"{ours} of {theirs}"
            for ours, theirs in half_closed()
            if ours == self.machine.port or theirs in self.machine.ports
        ]
        return [f"{len(left)} connections in CLOSE_WAIT: {left[:3]}"] if left else []

    def _descriptors(self) -> list[str]:
        found = []
        for role, pid in self.machine.tree().items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                now = process.num_fds(), process.num_threads()
                first = self._first.setdefault(pid, now)
                if now[0] - first[0] > MORE_DESCRIPTORS:
                    found.append(f"{role} {pid} has {now[0]} descriptors, {first[0]} at first")
                if now[1] - first[1] > MORE_THREADS:
                    found.append(f"{role} {pid} has {now[1]} threads, {first[1]} at first")
        return found

    def _file(self) -> list[str]:
        path = self.machine.state_dir / "state.db"
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
            said = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        return [] if said == ["ok"] else [f"integrity_check: {said[:3]}"]

    def _health(self) -> list[str]:
        return health_problems(self.machine.port)


def health_problems(port: int) -> list[str]:
    """Return why /health is not well; a model that failed to load is no reason."""
    answer = ask(port, request("/health"), deadline_s=5)
    verdict = judge("page", answer)
    if verdict.word != OK:
        return [f"/health: {verdict.word} {verdict.detail}"]
    body = answer.json()
    failed = {server["reason"] for server in body["servers"] if server["state"] == "failed"}
    return [f"/health: {why}" for why in body.get("reasons", []) if why not in failed]


def _tried(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except (sqlite3.Error, psutil.Error, OSError) as error:
        return [f"{check.__name__} failed: {type(error).__name__}: {error}"]


def oversubscribed(machine: Machine) -> list[str]:
    """Return the GPUs of which more is promised than there is."""
    rows = machine.proxy.rows(
        "SELECT gpu_uuid, sum(reserved_bytes) AS bytes FROM assignments JOIN servers ON"
        " servers.id = server_id WHERE state IN ('starting', 'ready', 'draining', 'stopping')"
        " GROUP BY gpu_uuid"
    )
    full = machine.full_bytes()
    return [
        f"{row['gpu_uuid']}: {row['bytes']} promised of {full.get(row['gpu_uuid'])}"
        for row in rows
        if row["bytes"] > full.get(row["gpu_uuid"], 0)
    ]


def half_closed() -> list[tuple[int, int]]:
    """Return own and other port of every connection in CLOSE_WAIT on this machine."""
    found = []
    with open("/proc/net/tcp") as lines:
        next(lines)
        for line in lines:
            _, own, other, state, *_rest = line.split()
            if state == "08":
                found.append((int(own.rpartition(":")[2], 16), int(other.rpartition(":")[2], 16)))
    return found
