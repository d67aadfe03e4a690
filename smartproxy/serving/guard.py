"""The last one out: ends every llama-server once `serve` is gone and no manager is left to do it.

`serve` holds the write end of our standard input. However it goes, we read its end. The manager,
told by the kernel, then stops the servers itself. We only act if it is dead too, or does not end
in the time that a full stop takes: then it hangs, and we end it first. Where it is dead, workers
may still pass streams on: they get the time that they have in a stop. A manager of the next `serve`
that starts meanwhile adopts the servers, and we leave them to it.
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
#: held by `serve`; its pid stands in it
SERVE_LOCK = "serve.lock"
#: what gunicorn's workers have for their streams when it ends, and a little more
STREAMS_S = 35.0
PATIENCE_VARIABLE = "SMARTPROXY_GUARD_PATIENCE_S"


def main() -> int:
    """Block until standard input ends, then until nothing of ours is left.

    argv: state dir; the read end of a pipe that `serve` and all of gunicorn hold open.
    """
    state_dir, relays = Path(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1) == NOTHING_LEFT:
        return 0
    if not _wait_for_manager(state_dir / "manager.lock", relays):
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


def _wait_for_manager(path: Path, relays: int) -> bool:
    """Block until the lock is ours (held while we live) and nothing is relayed any more.

    False: the next `serve` has a manager.
    """
    ours = int(os.environ[PARENT_VARIABLE])
    patience_s = float(os.environ.get(PATIENCE_VARIABLE, MANAGER_PATIENCE_S))
    began = time.monotonic()
    deadline = began + patience_s
    while True:
        lock = take_lock(path)
        if lock is not None:
            if _another_serve(path.with_name(SERVE_LOCK), ours):
                return False  # its manager is about to come
            if time.monotonic() - began > STREAMS_S or not _relaying(relays):
                return True
            os.close(lock)
            time.sleep(LOOK_EVERY_S)
            continue
        holder = lock_holder(path)
        if holder is not None and holder.serve_pid != ours:
            return False  # it adopts the servers; they are not ours to end
        if holder is not None and time.monotonic() > deadline:
            _kill(holder.pid)
            deadline += patience_s
        time.sleep(LOOK_EVERY_S)


def _another_serve(path: Path, ours: int) -> bool:
    """Return whether a `serve` other than ours has the state directory, by what stands in its lock.

    Not by trying the lock: a `serve` that starts in that moment would take us for another one.
    """
    try:
        pid = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return False
    return pid.isdigit() and int(pid) != ours and Path(f"/proc/{pid}").exists()


def _relaying(relays: int) -> bool:
    """Return whether a process of gunicorn lives. Only once `serve` is gone: it reads here too."""
    try:
        while os.read(relays, 4096):
            pass
    except BlockingIOError:
        return True
    return False


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
