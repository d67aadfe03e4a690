"""Who lives as long as whom: ending with the parent, and knowing a process for sure.

A pid alone names nobody for long; with the process's start time it names one process for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import psutil

PR_SET_PDEATHSIG = 1
#: set by `serve` for what it starts: the pid it must not outlive
PARENT_VARIABLE = "SMARTPROXY_PARENT_PID"
#: marks every llama-server with the state directory it belongs to, so that one whose row is lost
#: can still be found and adopted or ended
OWNER_VARIABLE = "SMARTPROXY_OWNER"


def die_with_parent() -> None:
    """Have the kernel send us SIGTERM when the process that started us goes, however it goes.

    Does nothing where nobody asked for it (a half run by itself, under systemd).
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it went before we could ask
        os.kill(os.getpid(), signal.SIGTERM)


#: a Python program: die with the process that the first argument names, become the others
_TETHERED = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def tethered(argv: Sequence[str]) -> list[str]:
    """Return a command line that runs another one, which the kernel kills when we go.

    More exactly: when the thread goes that starts it.
    """
    return [sys.executable, "-S", "-E", "-c", _TETHERED, str(os.getpid()), *argv]


def started_at(pid: int) -> float | None:
    """Return a process's start time in Unix seconds; None when it is gone (zombies are)."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        created: float = process.create_time()
    except psutil.Error:
        return None
    return created


def same_process(pid: int | None, process_started_at: float | None) -> bool:
    """Return whether this very process still lives."""
    if pid is None or process_started_at is None:
        return False
    now = started_at(pid)
    return now is not None and abs(now - process_started_at) < 0.05


def worker_id() -> str:
    """Return this process's name in the state file: pid and start time."""
    return f"{os.getpid()}:{started_at(os.getpid()):.2f}"


def worker_alive(name: str) -> bool:
    """Return whether the process a worker id names still lives."""
    pid, _, created = name.partition(":")
    return same_process(int(pid), float(created))


def owned_processes(owner: str) -> list[psutil.Process]:
    """Return the live processes marked as belonging to a state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get(OWNER_VARIABLE) == owner
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:  # another user's, or gone
            continue
    return found
