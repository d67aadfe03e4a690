"""What the data path's bench runs and reads: the C programs, CPU and memory of process trees."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

NATIVE = Path(__file__).parent / "native"
LOAD_DEADLINE_S = 300.0
QUIET_LOOK_S = 0.3
QUIET_IDLE = 0.85


def build(folder: Path) -> dict[str, Path]:
    """Compile the backend and the client; returns them by name."""
    built = {}
    for name in ("upstream", "load"):
        built[name] = folder / name
        source = NATIVE / f"{name}.c"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", built[name], source], check=True)
    return built


@dataclass(slots=True, kw_only=True)
class Stack:
    """One way to a server: where to send requests, and the processes that are its cost."""

    name: str
    address: str
    model: str
    #: roots of the process trees that carry bytes, or decide where they go
    pids: list[int]
    #: how a server in such a tree is known: it is the same for all, and not the proxy's cost
    is_server: Callable[[psutil.Process], bool] = field(default=lambda _: False)
    #: how much of the others' work it gets, so that a slow one does not take all the time
    share: float = 1.0
    #: it writes answers anew and leaves out what tells them apart: framing and end are checked
    rewrites: bool = False

    def processes(self) -> list[psutil.Process]:
        roots = [psutil.Process(pid) for pid in self.pids]
        trees = [process for root in roots for process in (root, *root.children(recursive=True))]
        return [process for process in trees if not self.is_server(process)]

    def cpu_s(self) -> float:
        """Return seconds of CPU used so far, user and system, of the threads that ended too."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def pss_mb(self, only: Callable[[psutil.Process], bool] = lambda _: True) -> float:
        """Return proportional memory in MB (2^20 bytes)."""
        return sum(_pss_bytes(process.pid) for process in filter(only, self.processes())) / 2**20


def _pss_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:")


def load(program: Path, stack: Stack, *options: object, meanwhile: float = 0.0) -> dict[str, Any]:
    """Run the client against a stack; returns its JSON and `cpu_s`, what the stack used.

    meanwhile: seconds after the start at which memory is read too (`pss_mb`).
    """
    before_s = stack.cpu_s()
    argv = [program, stack.address, "--model", stack.model, *map(str, options)]
    if stack.rewrites:
        argv.append("--foreign")
    client = subprocess.Popen(argv, stdout=subprocess.PIPE)
    memory: dict[str, float] = {}
    if meanwhile:
        try:
            client.wait(meanwhile)
        except subprocess.TimeoutExpired:
            memory = {"pss_mb": stack.pss_mb(), "data_pss_mb": stack.pss_mb(carries_bytes)}
    out, _ = client.communicate(timeout=LOAD_DEADLINE_S)
    return {**json.loads(out), **memory, "cpu_s": stack.cpu_s() - before_s}


def wait_for_quiet(patience_s: float) -> float:
    """Wait until next to nothing else runs on the machine; returns how idle it was at last, 0-1.

    With more to run than cores, times say who shares, not what a proxy costs.
    """
    give_up_at = time.monotonic() + patience_s
    while True:
        idle = psutil.cpu_times_percent(QUIET_LOOK_S).idle / 100
        if idle >= QUIET_IDLE or time.monotonic() > give_up_at:
            return float(idle)


def carries_bytes(process: psutil.Process) -> bool:
    """Return whether a process is of the data path: not the manager, serve or its guard."""
    words: Iterable[str] = process.cmdline()
    return not any(word.startswith(("smartproxy.", "smartproxy/")) for word in words) or any(
        "gunicorn" in word for word in words
    )
