"""The last one out: ends every llama-server once `serve` is gone and no manager is left to do it.

`serve` holds the write end of our standard input. However it goes, we read its end. The manager,
told by the kernel, then stops the servers itself. We only act if it is dead too, or does not end
in the time that a full stop takes: then it hangs, and we end it first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil

from smartproxy.lifetime import PARENT_VARIABLE, lock_holder, owned_processes, take_lock

LOOK_EVERY_S = 0.1
TERM_GRACE_S = 5.0
#: what `serve` writes when nothing of its own is left to be ended
NOTHING_LEFT = b"."
#: seconds for a manager to stop its servers in order, and a few more
MANAGER_PATIENCE_S = 90.0
PATIENCE_VARIABLE = "SMARTPROXY_GUARD_PATIENCE_S"


def main() -> int:
    """Block until standard input ends, then until nothing of ours is left. argv: state dir."""
    state_dir = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1) == NOTHING_LEFT:
        return 0
    if not _wait_for_manager(state_dir / "manager.lock"):
        return 0
    # the lock is ours: no manager lives, and none can start meanwhile
    servers = owned_processes(str(state_dir))
    for server in servers:
        _send(server, signal.SIGTERM)
    _, left = psutil.wait_procs(servers, timeout=TERM_GRACE_S)
    for server in left:
        _send(server, signal.SIGKILL)
    psutil.wait_procs(left, timeout=TERM_GRACE_S)
    return 0


def _wait_for_manager(lock: Path) -> bool:
    """Block until the lock is ours (held while we live). False: the next `serve` has a manager."""
    ours = int(os.environ[PARENT_VARIABLE])
    patience_s = float(os.environ.get(PATIENCE_VARIABLE, MANAGER_PATIENCE_S))
    deadline = time.monotonic() + patience_s
    while take_lock(lock) is None:
        holder = lock_holder(lock)
        if holder is not None and holder.serve_pid != ours:
            return False  # it adopts the servers; they are not ours to end
        if holder is not None and time.monotonic() > deadline:
            _kill(holder.pid)
            deadline += patience_s
        time.sleep(LOOK_EVERY_S)
    return True


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _send(server: psutil.Process, number: signal.Signals) -> None:
    try:
        server.send_signal(number)
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main())
