"""The manager process: settings, single-instance lock, signals, scheduler jobs, the main loop.

`python -m smartproxy.manager`, or `smartproxy manager`. SIGINT (Ctrl-C, the end of `serve`) is the
full stop: requests finish, then every llama-server ends; a second one ends them at once. SIGTERM
leaves and keeps the llama-servers for the next manager, which adopts them. SIGHUP means reload.

Exit codes: 0 stopped on request, 1 something failed (the log says what), 2 bad configuration,
3 another manager has this state directory, 4 the state file vanished under us.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from apscheduler.schedulers.background import BackgroundScheduler

from smartproxy.catalog.live import Live
from smartproxy.config import state_dir
from smartproxy.config.known_holes import build_problems
from smartproxy.config.load import load_settings
from smartproxy.config.settings import Settings
from smartproxy.doorbell import Doorbell
from smartproxy.errors import ConfigError, StateError
from smartproxy.lifetime import PARENT_VARIABLE, die_with_parent, take_manager_lock, worker_alive
from smartproxy.llama import binary
from smartproxy.log import setup_logging
from smartproxy.manager import measure, needs, stop, unknown_models
from smartproxy.manager import use as recent_use
from smartproxy.manager.adopt import adopt_all
from smartproxy.manager.bring_up import Loading
from smartproxy.manager.children import Children
from smartproxy.manager.context import Ahead, Preload, Tools
from smartproxy.manager.failures import Failures
from smartproxy.manager.gpu_watch import GpuView, Watcher
from smartproxy.manager.lingering import Lingering
from smartproxy.manager.server_watch import trim_logs, watch
from smartproxy.manager.shortage import Facts, Shortages
from smartproxy.manager.snapshot import Sources
from smartproxy.manager.tick import Manager, Pass, tick
from smartproxy.orders import Orders
from smartproxy.signs import Beat
from smartproxy.state import events, leases, measurements, migrate
from smartproxy.state import servers as server_rows
from smartproxy.state.manager_row import update_manager
from smartproxy.state.store import Store

logger = logging.getLogger("smartproxy.manager")  # __name__ is __main__ here

EXIT_FAILED, EXIT_CONFIG, EXIT_LOCKED, EXIT_STATE_LOST = 1, 2, 3, 4
HEARTBEAT_S = 1.0
#: how often the whole state file is read to see whether it is damaged
CHECK_S = 10
#: pause between passes while models wait for room
WAITING_TICK_S = 0.02
IDLE_TICK_S = 1.0
#: a clock that is off by more was set, not read late
CLOCK_JUMP_S = 2.0


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code where it did not start."""
    orders = Orders()
    serve_pid = int(os.environ.get(PARENT_VARIABLE, "0"))
    die_with_parent(signal.SIGINT)
    setup_logging()
    try:
        settings = load_settings()
        state_dir.prepare(settings.state_dir)
        lock = take_manager_lock(settings.state_dir, serve_pid)
        if lock is None:
            logger.error("another manager runs on %s", settings.state_dir)
            return EXIT_LOCKED
        _run(settings, orders)
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    except StateError as error:
        logger.error("the state file can't be used: %s", error)
    except Exception:  # the process boundary
        logger.exception("the manager failed")
    _exit(EXIT_FAILED)


def _run(settings: Settings, orders: Orders) -> NoReturn:
    for warning in (*settings.warnings, *settings.dangers()):
        logger.warning("%s", warning)
    live = Live(settings)
    for warning in live.catalog.warnings:
        logger.warning("%s", warning)
    path, library_dir = binary.find(settings.llama_server, os.environ.get("PATH"))
    state, complaint = migrate.create(settings.state_dir / "state.db")
    if complaint:
        logger.warning("%s", complaint)
    doorbell = Doorbell(settings.state_dir)
    tools = Tools(
        live=live,
        store=state,
        binary=binary.inspect(path, library_dir, os.environ),
        threads=ThreadPoolExecutor(max_workers=128, thread_name_prefix="server"),
        poke=doorbell.poke,
        stopping=orders.stopping,
    )
    for problem in build_problems(tools.binary.build):
        logger.warning("%s", problem)
    orders.poke = doorbell.poke
    _serve(make_manager(tools), doorbell, orders)


def make_manager(tools: Tools) -> Manager:
    """Return a manager that knows only what the state file says."""
    view = GpuView(tools.poke)
    lingering = Lingering(tools.store, view)
    preload = Preload(spec.id for spec in tools.catalog.models.values() if spec.preload)
    shortages = Shortages(preload)
    ahead: Ahead[Facts] = Ahead(tools.poke)
    loading = Loading(
        tools=tools,
        children=Children(),
        lingering=lingering,
        view=view,
        failures=Failures(tools.store.now),
        shortages=shortages,
        ahead=ahead,
    )
    sources = Sources(
        tools=tools,
        view=view,
        lingering=lingering,
        shortages=shortages,
        ahead=ahead,
        recent=recent_use.load(tools.store, tools.store.now()),
    )
    return Manager(tools=tools, loading=loading, sources=sources)


def _serve(manager: Manager, doorbell: Doorbell, orders: Orders) -> NoReturn:
    tools = manager.tools
    update_manager(
        tools.store,
        pid=os.getpid(),
        started_at=tools.store.now(),
        heartbeat_at=tools.store.now(),
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
    orders.kill_servers = lambda: stop.kill_all(manager.loading)
    beat, watcher = Beat(), Watcher(tools, manager.loading.view)
    scheduler = _schedule(manager, watcher, beat)
    try:
        code = _loop(manager, doorbell, scheduler, Says(orders=orders, beat=beat))
        if orders.full_stop:
            stop.end_all(manager.loading, scheduler)
    finally:
        scheduler.shutdown(wait=False)
        closed = watcher.close()
    if not closed:
        logger.warning("a call to NVML hangs: leaving without waiting for it")
    if code == 0:
        _sign_off(tools.store)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End without waiting for threads, as Python would: one may watch a load for half an hour.

    What a thread had begun, the next manager carries on, as after a crash.
    """
    logging.shutdown()
    os._exit(code)


def _sign_off(store: Store) -> None:
    try:
        update_manager(store, pid=None, heartbeat_at=None)
    except StateError as error:
        logger.error("stopped, but the state file could not be told: %s", error)
    else:
        logger.info("stopped")


def _schedule(manager: Manager, watcher: Watcher, beat: Beat) -> BackgroundScheduler:
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
    scheduler.add_job(_heartbeat, "interval", [tools.store, beat], seconds=HEARTBEAT_S)
    scheduler.add_job(watch, "interval", [tools], seconds=2)
    scheduler.add_job(_tidy, "interval", [tools], seconds=60)
    scheduler.add_job(_check, "interval", [tools.store], seconds=CHECK_S)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Says:
    """What the loop is told, and what it tells."""

    orders: Orders
    beat: Beat


def _loop(manager: Manager, doorbell: Doorbell, scheduler: BackgroundScheduler, says: Says) -> int:
    tools, view, orders = manager.tools, manager.loading.view, says.orders
    done = Pass(waiting=False, decision_s=0.0)
    clock_s = _clock_ahead_s()
    while not tools.stopping.is_set():
        # servers live on; the next manager makes the file anew and finds them
        if why := _lost(tools.store):
            logger.error("state file %s %s: starting anew", tools.store.path, why)
            return EXIT_STATE_LOST
        try:
            done = tick(manager, tools.store.now())
        except StateError as error:
            logger.error("this pass was not made, the state file can't be used: %s", error)
            done = Pass(waiting=False, decision_s=0.0)
        except Exception:  # the tick boundary: one bad pass must not take the servers down
            logger.exception("tick failed")
            done = Pass(waiting=False, decision_s=0.0)
        says.beat.passed()
        doorbell.watch(manager.loading.children.pids())
        # many waiting models make decisions long: they get a part of the time, not all of it
        pause_s = max(WAITING_TICK_S, 4 * done.decision_s) if done.waiting else IDLE_TICK_S
        words = doorbell.wait(min(pause_s, IDLE_TICK_S))
        if b"look" in words:
            view.want_look()
        if abs(_clock_ahead_s() - clock_s) > CLOCK_JUMP_S:
            clock_s = _clock_ahead_s()
            _run_all_now(scheduler)
        if view.take_wanted():
            scheduler.modify_job("look", next_run_time=_now())
        if orders.reload:
            orders.reload = False
            logger.warning("SIGHUP: the configuration is not read again yet; restart to use it")
    says.beat.rests()
    if not orders.full_stop:
        logger.info("leaving: the llama-servers stay for the next manager")
    return 0


def _lost(store: Store) -> str | None:
    """Return why the state file must be made anew; one that is damaged is moved out of the way."""
    store.look_beside()
    if store.damage:
        return f"is damaged ({store.damage}) and was set aside as {migrate.set_aside(store.path)}"
    try:
        gone = not store.path.exists() or store.moved()
    except StateError:
        return None  # the pass says so
    return "vanished" if gone else None


def _clock_ahead_s() -> float:
    """Return what the wall clock is ahead of monotonic seconds: the same until somebody sets it."""
    return time.time() - time.monotonic()


def _run_all_now(scheduler: BackgroundScheduler) -> None:
    """Set jobs to now: a clock set back by an hour would have them wait for an hour."""
    logger.warning("the clock was set")
    for job in scheduler.get_jobs():
        job.modify(next_run_time=_now())


def _heartbeat(store: Store, beat: Beat) -> None:
    now = store.now()
    update_manager(store, heartbeat_at=now, pass_age_s=time.monotonic() - beat.at)
    dead = [name for name in leases.workers_seen(store) if not worker_alive(name)]
    leases.clear_expired(store, now=now, dead_workers=dead)


def _check(store: Store) -> None:
    with contextlib.suppress(StateError):  # can't be told now
        store.check()


def _tidy(tools: Tools) -> None:
    server_rows.prune(tools.store, now=tools.store.now())
    events.prune(tools.store)
    measurements.prune(tools.store)
    trim_logs(tools)
    give_back_memory()


def give_back_memory() -> None:
    """Give the system what was freed: glibc keeps it, in a heap for every few threads.

    Without this the manager grows by megabytes an hour while models come and go, though it holds no
    more than before. Costs about a millisecond. Other C libraries need it not, and have it not.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    sys.exit(main())
