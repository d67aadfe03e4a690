"""Who lives as long as whom: ending with the parent, and knowing a process for sure.

A pid alone names nobody for long; with the ticks of its start it names one process for ever.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
#: for another manager to end; for one whose `serve` is gone, so that it ends soon
LOCK_PATIENCE_S = 15.0
ENDING_PATIENCE_S = 120.0
#: set by `serve` for what it starts: the pid it must not outlive
PARENT_VARIABLE = "SMARTPROXY_PARENT_PID"
#: marks every llama-server with the state directory it belongs to, so that one whose row is lost
#: can still be found and adopted or ended
OWNER_VARIABLE = "SMARTPROXY_OWNER"


#: words to the manager: `serve` has the kernel hold them back until it has handlers for them
HELD_SIGNALS = frozenset({signal.SIGINT, signal.SIGHUP})


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send us a signal when the process that started us goes, however it goes.

    Does nothing where nobody asked for it (a half run by itself, under systemd).
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != int(parent):  # it went before we could ask
        os.kill(os.getpid(), number)


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


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot; None when it is gone (zombies are).

    Setting the clock changes nothing about it, unlike about Unix seconds, which are computed from
    the clock as it stands. Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        return _ticks(pid)
    except OSError:
        return None


def _ticks(pid: int) -> int | None:
    """As start_ticks. Raises OSError where it can't be looked at: no descriptors are left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name in parentheses may hold anything, parentheses too
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def same_process(pid: int | None, ticks: int | None) -> bool:
    """Return whether this very process still lives; of one that can't be looked at, whether its pid
    does: taken for dead, a server would stay for ever with its memory, and nobody's."""
    if pid is None or ticks is None:
        return False
    try:
        return _ticks(pid) == ticks
    except OSError:
        return _exists(pid)


def _exists(pid: int) -> bool:
    """Return whether a process has this pid; needs no descriptor, unlike psutil's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def worker_id() -> str:
    """Return this process's name in the state file: pid and start ticks."""
    return f"{os.getpid()}:{start_ticks(os.getpid())}"


def worker_alive(name: str) -> bool:
    """Return whether the process a worker id names still lives."""
    pid, _, ticks = name.partition(":")
    # an earlier version wrote Unix seconds: none of its workers lives
    return pid.isdecimal() and ticks.isdecimal() and same_process(int(pid), int(ticks))


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


def take_lock(path: Path) -> int | None:
    """Return a held lock, which goes with this process however it ends; None: it is taken."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Which manager has the state directory."""

    pid: int
    #: of the `serve` that started it; 0: it was started by itself
    serve_pid: int

    def serve_gone(self) -> bool:
        """Return whether its `serve` has ended, so that it ends soon too."""
        return self.serve_pid != 0 and not Path(f"/proc/{self.serve_pid}").exists()


def lock_holder(path: Path) -> LockHolder | None:
    """Return what a manager wrote into its lock's file; None: nothing, or nothing yet."""
    try:
        words = path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return None
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return LockHolder(int(words[0]), int(words[1]))


def take_manager_lock(state_dir: Path, serve_pid: int) -> int | None:
    """Return the one manager's held lock (kept open until it ends), or None: there is another.

    Waits for a manager that is just ending. serve_pid: of the `serve` that we belong to, 0 without
    one. By what stands in the file the guard ends a manager that hangs.
    """
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path, began, told = state_dir / "manager.lock", time.monotonic(), False
    while True:
        lock = take_lock(path)
        if lock is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} {serve_pid}\n".encode(), 0)
            return lock
        holder = lock_holder(path)
        ending = holder is not None and holder.serve_gone()
        if time.monotonic() - began > (ENDING_PATIENCE_S if ending else LOCK_PATIENCE_S):
            return None
        if ending and not told:
            told = True
            logger.info("waiting for the manager of an earlier `serve` to end (%s)", path)
        time.sleep(0.05)
