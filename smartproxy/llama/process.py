"""One child process: start it, find it again, see it end, stop it.

Children live in a session of their own: they survive the manager, for its successor to adopt.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smartproxy.lifetime import same_process, start_ticks

#: TERM, this long, TERM again, this long, KILL. A stream in flight makes llama-server ignore the
#: first TERM for up to its ping interval; the second always ends it.
TERM_GRACE_S = 5.0
SECOND_TERM_GRACE_S = 2.0
KILL_GRACE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A llama-server process, ours by birth (popen) or adopted."""

    pid: int
    start_ticks: int
    popen: subprocess.Popen[bytes] | None = field(default=None, compare=False)

    def alive(self) -> bool:
        """Return whether it still runs; reaps it if it is ours and has ended."""
        if self.popen is not None:
            return self.popen.poll() is None
        return same_process(self.pid, self.start_ticks)

    def exit_code(self) -> int | None:
        """Return its exit code (negative: the signal); None while it runs or if adopted."""
        return self.popen.poll() if self.popen is not None else None

    def wait(self, timeout_s: float) -> bool:
        """Block until it has ended, at most timeout_s. True = it has."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self.popen is not None:
                try:
                    self.popen.wait(left)
                except subprocess.TimeoutExpired:
                    return False
            else:
                time.sleep(min(0.02, left))
        return True


def spawn(argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> Child:
    """Start a process in its own session, both outputs appended to its log. Raises OSError."""
    log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        popen = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    # 0: it has ended already
    return Child(pid=popen.pid, start_ticks=start_ticks(popen.pid) or 0, popen=popen)


def adopt(pid: int | None, ticks: int | None) -> Child | None:
    """Return the child of an earlier manager if that very process still lives."""
    if pid is None or ticks is None or not same_process(pid, ticks):
        return None
    return Child(pid=pid, start_ticks=ticks)


def stop(child: Child, *, grace_s: float = TERM_GRACE_S) -> str:
    """End a child: TERM, TERM, KILL with deadlines, and wait for its exit. Says what it took."""
    steps = (
        (signal.SIGTERM, grace_s, "ended at the first TERM"),
        (signal.SIGTERM, SECOND_TERM_GRACE_S, "ended at the second TERM"),
        (signal.SIGKILL, KILL_GRACE_S, "had to be killed"),
    )
    for number, patience_s, said in steps:
        _signal_group(child, number)
        if child.wait(patience_s):
            return said
    return "did not end even when killed"


def kill(child: Child, *, patience_s: float = 5.0) -> bool:
    """End a child at once. Returns whether it has ended."""
    _signal_group(child, signal.SIGKILL)
    return child.wait(patience_s)


def _signal_group(child: Child, number: int) -> None:
    if not child.alive():
        return
    try:
        # its own session, so its group id is its pid: grandchildren get the signal too
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return
