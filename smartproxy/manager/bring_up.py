"""Start one server and see it become ready, or say why not. Runs in a thread of its own.

Input: a row in state starting, written by the tick. Output: the row in ready or failed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.config.settings import SPARE_PORTS, Settings, span
from smartproxy.errors import LoadFailed, LoadTimeout, SmartProxyError
from smartproxy.llama import log, out_of_memory, process
from smartproxy.llama.command import command, environment
from smartproxy.llama.devices import device_names
from smartproxy.llama.http import healthy
from smartproxy.llama.listeners import listens
from smartproxy.llama.out_of_memory import Lacking
from smartproxy.llama.process import Child
from smartproxy.manager import measure, shortage
from smartproxy.manager.bring_down import Ending
from smartproxy.manager.context import Ahead, Tools
from smartproxy.manager.failures import Failures
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.served import loaded_of
from smartproxy.manager.shortage import Death, Facts, OutOfGpuMemory, Shortages
from smartproxy.memory.estimate import Loaded
from smartproxy.planner.reasons import gb
from smartproxy.planner.types import Placement
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import assignments
from smartproxy.state.server_row import ServerRow
from smartproxy.state.store import Store
from smartproxy.types import ServerState

logger = logging.getLogger(__name__)

#: how often a starting server is asked; readiness is answered on its HTTP thread in microseconds
FIRST_PROBE_EVERY_S = 0.002
LAST_PROBE_EVERY_S = 0.02
#: and in between this part of the time it has taken: noticed late by as little, at little cost
PROBE_SHARE = 0.02
#: how often its progress is looked at
PROGRESS_EVERY_S = 0.5
PORT_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading(Ending):
    """What it takes to start servers: all that ending one takes, and what is learned of a load."""

    view: GpuView
    failures: Failures
    shortages: Shortages
    #: what files say, for the main loop
    ahead: Ahead[Facts]


def bring_up(loading: Loading, server_id: int, spec: ModelSpec, placement: Placement) -> None:
    """Start the server of a row in state starting and carry it to ready or failed."""
    try:
        loaded = loaded_of(loading.tools.store, spec)
        measure.expect(loading.tools, server_id, placement, spec=spec, loaded=loaded)
        begun = Begun(spec=spec, placement=placement, loaded=loaded)
        _start_and_wait(loading, server_id, begun)
    except OutOfGpuMemory as error:
        _out_of_memory(loading, server_id, spec, error)
    except SmartProxyError as error:
        _failed(loading, server_id, spec.id, error)
    except OSError as error:
        _failed(loading, server_id, spec.id, LoadFailed(f"model '{spec.id}': {error}"))
    else:
        measure.after_load(loading.tools, loading.view, server_id)
    finally:
        loading.tools.poke()


def resume(loading: Loading, server_id: int, spec: ModelSpec) -> None:
    """Go on waiting for a server that an earlier manager started."""
    try:
        _await_ready(loading, server_id, spec)
    except OutOfGpuMemory as error:
        _out_of_memory(loading, server_id, spec, error)
    except SmartProxyError as error:
        _failed(loading, server_id, spec.id, error)
    else:
        measure.after_load(loading.tools, loading.view, server_id)
    finally:
        loading.tools.poke()


def argv_of(
    tools: Tools,
    view: GpuView,
    spec: ModelSpec,
    placement: Placement,
    *,
    port: int,
    loaded: Loaded,
) -> list[str]:
    """Return a server's command line. Raises LoadFailed: why there is none."""
    return command(
        tools.binary,
        spec,
        placement,
        port=port,
        loaded=loaded,
        devices=_devices(tools, view, placement),
    )


def _devices(tools: Tools, view: GpuView, placement: Placement) -> tuple[str, ...]:
    return device_names(tools.binary.devices, view.gpus, placement.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What is being started: a model, where, and what of it."""

    spec: ModelSpec
    placement: Placement
    loaded: Loaded


def _start_and_wait(loading: Loading, server_id: int, begun: Begun) -> None:
    spec, placement, loaded = begun.spec, begun.placement, begun.loaded
    tools, view = loading.tools, loading.view
    killed = False
    for left in reversed(range(PORT_TRIES)):
        row = server_rows.server(tools.store, server_id)
        if row.state != ServerState.STARTING:
            return  # it was stopped while it waited for its turn
        argv = argv_of(tools, view, spec, placement, port=row.port, loaded=loaded)
        env = environment(
            tools.binary,
            spec,
            placement,
            environ=os.environ,
            api_key=row.api_key,
            state_dir=tools.settings.state_dir,
            devices=_devices(tools, view, placement),
        )
        with loading.children.spawning():
            child = process.spawn(argv, env, Path(row.log_path))
            loading.children.add(server_id, child)
        server_rows.update_server(
            tools.store, server_id, pid=child.pid, pid_start_ticks=child.start_ticks
        )
        # whoever stopped it before the process was there had nothing to end
        if server_rows.server(tools.store, server_id).state != ServerState.STARTING:
            process.stop(child)
            loading.children.take(server_id)
            return
        try:
            _await_ready(loading, server_id, spec)
            return
        except Killed as error:
            if killed or left == 0:
                raise
            killed = True
            logger.warning("server %d: %s; it is started once more", server_id, error)
        except PortTaken as error:
            process.stop(child, grace_s=1.0)  # it may wait for its port
            if left == 0:
                raise
            logger.warning("server %d: %s", server_id, error)
            port = free_port(tools, after=row.port)
            logger.warning("server %d: trying port %d", server_id, port)
            server_rows.update_server(tools.store, server_id, port=port)


class PortTaken(LoadFailed):
    """Somebody else listens on the port we chose."""


class Killed(LoadFailed):
    """It was killed by a signal before it was ready: by the kernel, by a person, by a fault."""


def _await_ready(loading: Loading, server_id: int, spec: ModelSpec) -> None:
    tools = loading.tools
    row = server_rows.server(tools.store, server_id)
    child, log_path = loading.children.get(server_id), Path(row.log_path)
    assert child is not None  # started, or adopted, by whoever calls this
    began = time.monotonic()
    progress = Progress(child=child, log_path=log_path, at=began)
    while not healthy(row.port):
        if not child.alive():
            raise _why_ended(tools.store, row, spec.id, child.exit_code())
        now = time.monotonic()
        _check_deadlines(tools.settings, spec, waited_s=now - began, idle_s=progress.idle_s(now))
        every_s = max(FIRST_PROBE_EVERY_S, (now - began) * PROBE_SHARE)
        time.sleep(min(every_s, LAST_PROBE_EVERY_S))
    if child.alive() and not listens(child.pid, row.port):
        raise PortTaken(
            f"model '{spec.id}' did not load: on port {row.port} answers a process that is not"
            f" its llama-server (pid {child.pid})"
        )
    ready_at = tools.store.now()
    load_s = ready_at - row.created_at
    server_rows.transition(
        tools.store,
        server_id,
        ServerState.STARTING,
        ServerState.READY,
        now=ready_at,
        reason=f"ready after {load_s:.2f} s",
        ready_at=ready_at,
        load_s=load_s,
        last_used_at=ready_at,
    )
    loading.failures.put_back(spec.id, None)
    loading.shortages.settled(spec.id)


def _why_ended(store: Store, row: ServerRow, model_id: str, exit_code: int | None) -> LoadFailed:
    """Return the error of a server that ended before it was ready."""
    text = log.tail(Path(row.log_path))
    why = log.explain_exit(exit_code, text)
    message = f"model '{model_id}' did not load: its llama-server {why} (log: {row.log_path})"
    if log.PORT_TAKEN.search(text):
        return PortTaken(message)
    lacking = out_of_memory.lacking(text)
    if lacking is Lacking.GPU and assignments(store).get(row.id):
        return OutOfGpuMemory(message, text)
    if lacking is Lacking.HOST:
        needed, free = row.host_estimated_bytes or 0, psutil.virtual_memory().available
        message += f"; main memory: {gb(needed)} estimated, {gb(free)} available now"
    if exit_code is not None and exit_code < 0 and -exit_code != signal.SIGILL:
        return Killed(message)
    return LoadFailed(message)


def _check_deadlines(
    settings: Settings, spec: ModelSpec, *, waited_s: float, idle_s: float
) -> None:
    stall_s = settings.load_stall_timeout
    if idle_s > stall_s:
        raise LoadTimeout(
            f"model '{spec.id}' made no progress for {idle_s:.0f} s while loading"
            f" (load_stall_timeout is {stall_s:g} s)"
        )
    if waited_s > spec.load_timeout_s:
        raise LoadTimeout(
            f"model '{spec.id}' was not ready after {waited_s:.0f} s"
            f" (load_timeout is {spec.load_timeout_s:g} s)"
        )


@dataclass(slots=True, kw_only=True)
class Progress:
    """Signs of a load that goes on: log, memory and disk reads grow. CPU time is none: a hung
    process may spin."""

    child: Child
    log_path: Path
    at: float
    seen: tuple[int, ...] = ()
    looked_at: float = 0.0

    def idle_s(self, now: float) -> float:
        """Return seconds since something last moved."""
        if now - self.looked_at >= PROGRESS_EVERY_S:
            self.looked_at = now
            signs = self._signs()
            if signs != self.seen:
                self.seen, self.at = signs, now
        return now - self.at

    def _signs(self) -> tuple[int, ...]:
        try:
            log_bytes = self.log_path.stat().st_size
            child = psutil.Process(self.child.pid)
            return log_bytes, child.memory_info().rss >> 20, child.io_counters().read_chars >> 20
        except (OSError, psutil.Error):
            return ()


def free_port(tools: Tools, *, after: int | None = None) -> int:
    """Return a port of the pool's that no live server has and nobody listens on.

    after: the port tried last: those above it come first, then those below. Raises
    LoadFailed where all are taken.
    """
    pool = tools.settings.server_pool
    ours = {row.port for row in server_rows.live_servers(tools.store)}
    above = [port for port in pool.ports if after is not None and port > after]
    below = [port for port in pool.ports if after is None or port < after]
    for port in (*above, *below):
        if port not in ours and _bindable(port):
            return port
    our_count = len(ours.intersection(pool.ports))
    raise LoadFailed(
        f"no free port for its server among {span(pool.ports)} (size {pool.size} and"
        f" {SPARE_PORTS} more from server_pool.port_start on): {our_count} have servers of ours,"
        f" {len(pool.ports) - our_count} are in use by others; end those, or change port_start"
    )


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _out_of_memory(
    loading: Loading, server_id: int, spec: ModelSpec, error: OutOfGpuMemory
) -> None:
    """Have the load tried once more, or carry it to failed with the numbers."""
    loading.children.take(server_id)
    loading.lingering.note_end(server_id, loading.tools.store.now())
    tools, death = loading.tools, Death(server_id=server_id, spec=spec, error=error)
    if not shortage.try_again(tools, loading.shortages, loading.lingering, death):
        numbers = shortage.numbers(tools.store, loading.view, server_id)
        text = f"{error}; {numbers}; it was the second try"
        _failed(loading, server_id, spec.id, LoadFailed(text))


def _failed(loading: Loading, server_id: int, model_id: str, error: SmartProxyError) -> None:
    """Carry a server that would not start to failed; its process, if any, is ended first."""
    child = loading.children.get(server_id)  # kept until it has ended: a full stop waits for it
    if child is not None:
        process.stop(child, grace_s=1.0)
        loading.lingering.note_end(server_id, loading.tools.store.now())
        loading.children.take(server_id)
    if server_rows.server(loading.tools.store, server_id).state != ServerState.STARTING:
        return  # stopped on purpose: nothing failed, and whoever waits for the model waits on
    # first, for once the row is no live one the next pass looks here for why not to start another
    before = loading.failures.add(model_id, error.code, str(error))
    moved = server_rows.transition(
        loading.tools.store,
        server_id,
        ServerState.STARTING,
        ServerState.FAILED,
        now=loading.tools.store.now(),
        reason=str(error),
        error_code=error.code,
        error_message=str(error),
        exit_code=child.exit_code() if child else None,
    )
    if not moved:  # it was being stopped on purpose: no failure
        loading.failures.put_back(model_id, before)
