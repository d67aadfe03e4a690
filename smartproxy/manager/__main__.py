"""The manager process: settings, single-instance lock, signals, scheduler jobs, the main loop.

`python -m smartproxy.manager`, or `smartproxy manager`. Exit codes: 0 stopped on request, 2 bad
configuration, 3 another manager has this state directory, 4 the state file vanished under us.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from apscheduler.schedulers.background import BackgroundScheduler

from smartproxy.catalog.live import Live
from smartproxy.config.load import load_settings
from smartproxy.config.settings import Settings
from smartproxy.errors import ConfigError, ShuttingDown
from smartproxy.lifetime import die_with_parent, worker_alive
from smartproxy.llama import binary
from smartproxy.log import setup_logging
from smartproxy.manager import measure, needs, unknown_models
from smartproxy.manager import use as recent_use
from smartproxy.manager.act import stop_all
from smartproxy.manager.adopt import adopt_all
from smartproxy.manager.bring_up import Loading
from smartproxy.manager.children import Children
from smartproxy.manager.context import Preload, Tools
from smartproxy.manager.doorbell import Doorbell
from smartproxy.manager.failures import Failures
from smartproxy.manager.gpu_watch import GpuView, Watcher
from smartproxy.manager.lingering import Lingering
from smartproxy.manager.server_watch import trim_logs, watch
from smartproxy.manager.shortage import Shortages
from smartproxy.manager.snapshot import Sources
from smartproxy.manager.tick import Manager, Pass, tick
from smartproxy.state import demands as demand_rows
from smartproxy.state import events, leases, measurements, migrate
from smartproxy.state import servers as server_rows
from smartproxy.state.manager_row import update_manager
from smartproxy.state.store import Store

logger = logging.getLogger("smartproxy.manager")  # __name__ is __main__ here

EXIT_CONFIG, EXIT_LOCKED, EXIT_STATE_LOST = 2, 3, 4
LOCK_PATIENCE_S = 15.0
HEARTBEAT_S = 1.0
#: pause between passes while models wait for room
WAITING_TICK_S = 0.02
IDLE_TICK_S = 1.0
#: how long requests in flight may go on in a full stop: as gunicorn's graceful_timeout
STOP_GRACE_S = 30.0
#: TERM, TERM and KILL of every server at once, with room to spare
STOP_DEADLINE_S = 45.0


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    die_with_parent()
    setup_logging()
    try:
        settings = load_settings()
        lock = _lock(settings.state_dir)
        if lock is None:
            logger.error("another manager runs on %s", settings.state_dir)
            return EXIT_LOCKED
        return _run(settings)
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG


def _lock(state_dir: Path) -> int | None:
    """Return the held lock (kept open until we end), or None. Waits for one that is just ending."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(state_dir / "manager.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # for the guard, which ends a manager that hangs
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)


def _run(settings: Settings) -> int:
    for warning in settings.warnings:
        logger.warning("%s", warning)
    live = Live(settings)
    for warning in live.catalog.warnings:
        logger.warning("%s", warning)
    path, library_dir = binary.find(settings.llama_server, os.environ.get("PATH"))
    state, complaint = migrate.create(settings.state_dir / "state.db")
    if complaint:
        logger.warning("%s", complaint)
    doorbell = Doorbell(settings.state_dir / "manager.sock")
    tools = Tools(
        live=live,
        store=state,
        binary=binary.inspect(path, library_dir, os.environ),
        threads=ThreadPoolExecutor(max_workers=128, thread_name_prefix="server"),
        poke=doorbell.poke,
        stopping=threading.Event(),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopper(tools))
    return _serve(make_manager(tools), doorbell)


def make_manager(tools: Tools) -> Manager:
    """Return a manager that knows only what the state file says."""
    view = GpuView(tools.poke)
    lingering = Lingering(tools.store, view)
    preload = Preload(spec.id for spec in tools.catalog.models.values() if spec.preload)
    shortages = Shortages(preload)
    loading = Loading(
        tools=tools,
        children=Children(),
        lingering=lingering,
        view=view,
        failures=Failures(),
        shortages=shortages,
    )
    sources = Sources(
        tools=tools,
        view=view,
        lingering=lingering,
        shortages=shortages,
        recent=recent_use.load(tools.store, time.time()),
    )
    return Manager(tools=tools, loading=loading, sources=sources)


def _stopper(tools: Tools) -> Callable[[int, FrameType | None], None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        tools.stopping.set()
        tools.poke()

    return stop


def _serve(manager: Manager, doorbell: Doorbell) -> int:
    tools = manager.tools
    update_manager(
        tools.store,
        pid=os.getpid(),
        started_at=time.time(),
        heartbeat_at=time.time(),
        stopping=False,
        llama_server=str(tools.binary.path),
        build=tools.binary.build,
    )
    logger.info(
        "manager up pid=%d models=%d llama-server=%s (%s)",
        *(os.getpid(), len(tools.catalog.models)),
        *(tools.binary.path, tools.binary.build),
    )
    adopt_all(manager.loading)
    watcher = Watcher(tools, manager.loading.view)
    scheduler = _schedule(manager, watcher)
    try:
        code = _loop(manager, doorbell, scheduler)
    finally:
        scheduler.shutdown(wait=False)
        closed = watcher.close()
    if not closed:
        logger.warning("a call to NVML hangs: leaving without waiting for it")
    logging.shutdown()
    # Python would wait for every thread: one that hangs in a driver or a file system, or that
    # waits for what comes no more
    os._exit(code)


def _schedule(manager: Manager, watcher: Watcher) -> BackgroundScheduler:
    scheduler = BackgroundScheduler(
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
    )
    tools, view = manager.tools, manager.loading.view
    poll_s = tools.settings.gpu_poll_interval
    scheduler.add_job(
        _look,
        "interval",
        [tools, view, watcher],
        seconds=poll_s,
        id="look",
        next_run_time=_now(),
    )
    scheduler.add_job(_heartbeat, "interval", [tools.store], seconds=HEARTBEAT_S)
    scheduler.add_job(watch, "interval", [tools], seconds=2)
    scheduler.add_job(_tidy, "interval", [tools], seconds=60)
    scheduler.add_job(needs.publish_models, args=[tools])
    asked: set[str] = set()
    scheduler.add_job(
        unknown_models.ask_about_unknown, "interval", [tools, view, asked], seconds=10
    )
    # it warns of every look that a slow driver makes it skip
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    scheduler.start()
    return scheduler


def _look(tools: Tools, view: GpuView, watcher: Watcher) -> None:
    watcher.look()
    measure.sample(tools, view)


def _now() -> datetime:
    return datetime.now(UTC)


def _loop(manager: Manager, doorbell: Doorbell, scheduler: BackgroundScheduler) -> int:
    tools, view = manager.tools, manager.loading.view
    done = Pass(waiting=False, decision_s=0.0)
    while not tools.stopping.is_set():
        # servers live on; the next manager makes the file anew and finds them
        if not tools.store.path.exists() or tools.store.moved():
            logger.error("state file %s vanished: starting anew", tools.store.path)
            return EXIT_STATE_LOST
        try:
            done = tick(manager, time.time())
        except Exception:  # the tick boundary: one bad pass must not take the servers down
            logger.exception("tick failed")
            done = Pass(waiting=False, decision_s=0.0)
        doorbell.watch(manager.loading.children.snapshot())
        # many waiting models make decisions long: they get a part of the time, not all of it
        pause_s = max(WAITING_TICK_S, 4 * done.decision_s) if done.waiting else IDLE_TICK_S
        said = doorbell.wait(min(pause_s, IDLE_TICK_S))
        if b"look" in said:
            view.want_look()
        if view.take_wanted():
            scheduler.modify_job("look", next_run_time=_now())
    logger.info("stopping")
    update_manager(tools.store, stopping=True)
    _refuse_all(tools.store)
    stop_all(manager.loading, grace_s=STOP_GRACE_S, deadline_s=STOP_DEADLINE_S)
    update_manager(tools.store, pid=None, heartbeat_at=None)
    logger.info("stopped")
    return 0


def _refuse_all(store: Store) -> None:
    ids = [demand.id for demand in demand_rows.open_demands(store)]
    demand_rows.answer(
        store,
        ids,
        now=time.time(),
        error_code=ShuttingDown.code,
        message="the proxy is being stopped",
    )


def _heartbeat(store: Store) -> None:
    now = time.time()
    update_manager(store, heartbeat_at=now)
    dead = [name for name in leases.workers_seen(store) if not worker_alive(name)]
    leases.clear_expired(store, now=now, dead_workers=dead)


def _tidy(tools: Tools) -> None:
    server_rows.prune(tools.store, now=time.time())
    events.prune(tools.store)
    measurements.prune(tools.store)
    trim_logs(tools)


if __name__ == "__main__":
    sys.exit(main())
