"""`smartproxy serve`: manager and gunicorn under one parent; one Ctrl-C stops all.

It holds the listening socket, so that a half that died is started again without a refused
connection, and the end of a pipe that the guard waits on.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smartproxy.config.settings import Settings
from smartproxy.errors import ConfigError
from smartproxy.lifetime import PARENT_VARIABLE
from smartproxy.serving.guard import NOTHING_LEFT
from smartproxy.serving.listen import UNIX, close, listen

logger = logging.getLogger(__name__)

#: a half that lived shorter than this is started again only after a pause
SHORT_LIFE_S = 3.0
#: a full stop: streams in flight may finish this long, then servers get TERM, TERM, KILL
GUNICORN_STOP_S = 40.0
MANAGER_STOP_S = 80.0
#: exit codes that a restart can't mend: bad configuration; an application that does not boot
HOPELESS = {"manager": {2, 3}, "gunicorn": {3, 4}}
#: another `serve`, or another manager, has this state directory
EXIT_LOCKED = 3


@dataclass(slots=True, kw_only=True)
class Half:
    """One of the children, started again whenever it ends."""

    name: str
    argv: list[str]
    pass_fds: tuple[int, ...] = ()
    stdin: int = subprocess.DEVNULL
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    not_before: float = 0.0

    def start(self, env: Mapping[str, str]) -> None:
        """Start it in a session of its own: the terminal's Ctrl-C is ours to pass on."""
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            self.argv,
            env={**env, PARENT_VARIABLE: str(os.getpid())},
            pass_fds=self.pass_fds,
            stdin=self.stdin,
            start_new_session=True,
        )

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def await_end(self, patience_s: float) -> None:
        """Kill it if it does not end in time."""
        if self.process is None:
            return
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s did not end within %g s: killed", self.name, patience_s)
            self.process.kill()
            self.process.wait()


def serve(settings: Settings, host: str, port: int) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code. Raises ConfigError."""
    problem = settings.port_problem(port)
    if problem and not host.startswith(UNIX):
        raise ConfigError(f"--port: {problem}")
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _lock(settings.state_dir)
    if lock is None:
        logger.error("another `smartproxy serve` runs on %s: not started", settings.state_dir)
        return EXIT_LOCKED
    listener, name = listen(host, port)
    env = {
        **os.environ,
        "SMARTPROXY_CONFIG": str(settings.config_path),
        "SMARTPROXY_STATE_DIR": str(settings.state_dir),
    }
    guard_end, our_end = os.pipe()
    python = [sys.executable, "-m"]
    guard = Half(
        name="guard",
        argv=[*python, "smartproxy.serving.guard", str(settings.state_dir)],
        stdin=guard_end,
    )
    manager = Half(name="manager", argv=[*python, "smartproxy.manager"])
    gunicorn = Half(
        name="gunicorn",
        argv=[
            *(*python, "gunicorn", "-c", "python:smartproxy.proxy.gunicorn_conf"),
            *("--bind", f"fd://{listener.fileno()}", "smartproxy.proxy.wsgi:app"),
        ],
        pass_fds=(listener.fileno(),),
    )
    stop = _Stop()
    logger.info("serving on %s", name)
    code = _keep_running([guard, manager, gunicorn], env, stop)
    # both at once: the manager refuses who waits, and lets servers finish what gunicorn relays
    manager.ask_to_stop()
    gunicorn.ask_to_stop()
    gunicorn.await_end(GUNICORN_STOP_S)
    close(listener)
    manager.await_end(MANAGER_STOP_S)
    if code == EXIT_LOCKED:  # a manager that is not ours has servers that are not ours
        os.write(our_end, NOTHING_LEFT)
    os.close(our_end)
    if guard.process is not None:
        guard.process.wait()
    os.close(lock)
    return code


def _lock(state_dir: Path) -> int | None:
    """Return the held lock, which goes with this process however it ends; None: it is taken."""
    lock = os.open(state_dir / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


class _Stop:
    """Set by SIGTERM, SIGINT and SIGHUP; a second one ends us on the spot (the guard cleans up)."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._want)

    def _want(self, _number: int, _frame: object) -> None:
        if self.wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        self.wanted = True


def _keep_running(halves: list[Half], env: Mapping[str, str], stop: _Stop) -> int:
    """Start what is not running until told to stop, or a restart is hopeless. Returns the code."""
    for half in halves:
        half.start(env)
    while not stop.wanted:
        for half in halves:
            assert half.process is not None
            code = half.process.poll()
            if code is None:
                continue
            if code in HOPELESS.get(half.name, ()):
                logger.error("%s ended with code %d: giving up", half.name, code)
                return code
            _restart(half, env, code)
        time.sleep(0.05)
    return 0


def _restart(half: Half, env: Mapping[str, str], code: int) -> None:
    now = time.monotonic()
    if half.not_before <= half.started_at:  # its end is news
        short = now - half.started_at < SHORT_LIFE_S
        half.not_before = now + (1.0 if short else 0.0)
        logger.warning("%s ended with code %d: starting it again", half.name, code)
    if now >= half.not_before:
        half.start(env)


__all__ = ["serve"]
