"""`smartproxy serve`: manager and gunicorn under one parent; one Ctrl-C stops all.

It holds the listening socket, so that a half that died is started again without a refused
connection, and the end of a pipe that the guard waits on.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from smartproxy.config import state_dir
from smartproxy.config.settings import Settings
from smartproxy.errors import ConfigError
from smartproxy.lifetime import HELD_SIGNALS, take_lock
from smartproxy.serving.farewell import Farewell
from smartproxy.serving.guard import NOTHING_LEFT, SERVE_LOCK
from smartproxy.serving.half import Half
from smartproxy.serving.listen import UNIX, close, listen
from smartproxy.serving.stall import Stall
from smartproxy.signs import LEAVING, UP, Signs

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
#: a full stop: streams in flight may finish this long, then servers get TERM, TERM, KILL
STOP_S = {"gunicorn": 40.0, "manager": 80.0}
#: a manager that starts looks at every model file first: it gets so many times its patience
START_PATIENCE = 5
#: after a second signal: for each to end what it started
QUIT_S = 5.0
#: for the workers of a `serve` that was killed to close its socket
BIND_PATIENCE_S = 5.0
#: how often the log says what a stop waits for
TELL_EVERY_S = 5.0
#: exit codes that a restart can't mend: bad configuration; an application that does not boot
HOPELESS = {"manager": {2, 3}, "gunicorn": {3, 4}}
#: another `serve`, or another manager, has this state directory
EXIT_LOCKED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What `serve` starts, and what it hears from it."""

    guard: Half
    manager: Half
    gunicorn: Half
    env: Mapping[str, str]
    signs: Signs
    #: where it listens, for people
    name: str
    #: seconds without a finished pass after which the manager is replaced
    stall_s: float

    @property
    def halves(self) -> tuple[Half, ...]:
        return self.guard, self.manager, self.gunicorn


def serve(settings: Settings, host: str, port: int) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code. Raises ConfigError."""
    if problem := settings.host_problem(host):
        raise ConfigError(f"--host: {problem}")
    problem = settings.port_problem(port)
    if problem and not host.startswith(UNIX):
        raise ConfigError(f"--port: {problem}")
    state_dir.prepare(settings.state_dir)
    lock = take_lock(settings.state_dir / SERVE_LOCK)
    if lock is None:
        logger.error("another `smartproxy serve` runs on %s: not started", settings.state_dir)
        return EXIT_LOCKED
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    words = Words()
    listener, name = listen(host, port, patience_s=BIND_PATIENCE_S)
    guard_end, our_end = os.pipe()
    family = _family(settings, listener, guard_end, name)
    logger.info("starting, to serve on %s", name)
    code = _keep_running(family, words)
    farewell = Farewell(listener)
    _stop(family, words)
    farewell.end()
    close(listener)
    if code == EXIT_LOCKED:  # a manager that is not ours has servers that are not ours
        os.write(our_end, NOTHING_LEFT)
    family.signs.close()  # the guard waits for who holds it
    os.close(our_end)
    if family.guard.process is not None:
        family.guard.process.wait()
    os.close(lock)
    return code


def _family(settings: Settings, listener: socket.socket, guard_end: int, name: str) -> Family:
    python, signs = [sys.executable, "-m"], Signs()
    env = {
        **os.environ,
        "SMARTPROXY_CONFIG": str(settings.config_path),
        "SMARTPROXY_STATE_DIR": str(settings.state_dir),
        **signs.environment(),
    }
    guard = Half(
        name="guard",
        argv=[*python, "smartproxy.serving.guard", str(settings.state_dir), str(signs.ear)],
        pass_fds=(signs.ear,),
        stdin=guard_end,
    )
    manager = Half(
        name="manager",
        argv=[*python, "smartproxy.manager"],
        pass_fds=(signs.beat,),
        # its SIGTERM would keep the llama-servers, for the next manager
        stop_signal=signal.SIGINT,
        held_signals=HELD_SIGNALS,
        quit_signal=signal.SIGINT,
    )
    gunicorn = Half(
        name="gunicorn",
        argv=[
            *(*python, "gunicorn", "-c", "python:smartproxy.proxy.gunicorn_conf"),
            *("--bind", f"fd://{listener.fileno()}", "smartproxy.proxy.wsgi:app"),
        ],
        pass_fds=(listener.fileno(), signs.pipe),
        quit_signal=signal.SIGQUIT,
    )
    return Family(
        guard=guard,
        manager=manager,
        gunicorn=gunicorn,
        env=env,
        signs=signs,
        name=name,
        stall_s=settings.manager_stall_timeout,
    )


class Words:
    """What signals ask for. SIGTERM and SIGINT: stop, and at once the second time. SIGHUP: reload.

    Written by the handlers, read by the main loop.
    """

    def __init__(self) -> None:
        self.stop = False
        self.quit = False
        self.reload = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self.reload = True
        else:
            self.quit = self.stop
            self.stop = True


def _keep_running(family: Family, words: Words) -> int:
    """Start what is not running until told to stop, or a restart is hopeless. Returns the code."""
    for half in family.halves:
        half.start(family.env)
    up, told, stall = False, False, Stall()
    while not words.stop:
        heard = family.signs.heard()
        up = up or UP in heard
        if LEAVING in heard:
            family.gunicorn.relieve(family.env)
        for half in family.halves:
            half.reap_leaving()
            assert half.process is not None
            code = half.process.poll()
            if code is None:
                continue
            if code in HOPELESS.get(half.name, ()):
                logger.error("%s ended with code %d: giving up", half.name, code)
                return code
            half.start_again(family.env, code)
        _replace_standing(family, stall)
        if up and not told and _manager_runs(family):
            logger.info("serving on %s", family.name)
            told = True
        if words.reload:
            words.reload = False
            _reload(family)
        time.sleep(LOOK_EVERY_S)
    return 0


def _manager_runs(family: Family) -> bool:
    """Return whether it has finished a pass."""
    process = family.manager.process
    return process is not None and family.signs.last_pass(process.pid) is not None


def _replace_standing(family: Family, stall: Stall) -> None:
    """Kill a manager whose loop stands; the next one adopts its servers."""
    process = family.manager.process
    if process is None or process.poll() is not None:
        return
    last_pass = family.signs.last_pass(process.pid)
    patience_s = family.stall_s * (START_PATIENCE if last_pass is None else 1)
    stood_s = stall.look(process.pid, last_pass, time.monotonic())
    if stood_s > patience_s:
        logger.error(
            "the manager (pid %d) has finished no pass for %.0f s (manager_stall_timeout: %g):"
            " killing it; its llama-servers stay, and the next manager adopts them",
            *(process.pid, stood_s, family.stall_s),
        )
        family.manager.kill()
        stall.begin_anew()  # one that a device or a disk holds can't even be killed: say so again


def _reload(family: Family) -> None:
    """Pass SIGHUP on to the manager. Not to gunicorn, which would end its workers' streams."""
    logger.info("SIGHUP: passed on to the manager")
    family.manager.send(signal.SIGHUP)


def _stop(family: Family, words: Words) -> None:
    """End both halves in order, saying what is waited for; a second signal ends them at once."""
    logger.info(
        "stopping: new requests are answered `shutting_down`, those in flight may finish;"
        " a second signal ends everything at once"
    )
    # both at once: the manager refuses who waits, and lets servers finish what gunicorn relays
    halves = [family.manager, family.gunicorn]
    for half in halves:
        half.send(half.stop_signal)
    began = time.monotonic()
    tell_at = began + TELL_EVERY_S
    while not words.quit and any(half.living() for half in halves):
        now = time.monotonic()
        left_s = {half.name: STOP_S[half.name] - (now - began) for half in halves if half.living()}
        if now > tell_at:
            tell_at += TELL_EVERY_S
            waits = ", ".join(f"{name} (at most {s:.0f} s more)" for name, s in left_s.items())
            logger.info("stopping: waiting for %s", waits)
        for half in [half for half in halves if left_s.get(half.name, 1.0) < 0]:
            logger.warning("%s did not end within %g s: killed", half.name, STOP_S[half.name])
            half.kill()
            halves.remove(half)
        time.sleep(LOOK_EVERY_S)
    if words.quit:
        _quit(halves)


def _quit(halves: list[Half]) -> None:
    logger.warning("a second signal: ending everything at once")
    for half in halves:
        half.send(half.quit_signal)
    deadline = time.monotonic() + QUIT_S
    while any(half.living() for half in halves) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    for half in halves:
        half.kill()


__all__ = ["serve"]
