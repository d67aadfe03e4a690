"""What becomes of servers that nobody carries on: adopt what lives, settle the rest.

A new manager finds those that an earlier one left, a pass those whose thread has ended.

When the state file was lost, servers are found by the mark in their environment.
"""

from __future__ import annotations

import json
import logging
import os
from functools import partial

import psutil

from smartproxy.errors import SmartProxyError, StateRefused, UpstreamError
from smartproxy.lifetime import OWNER_VARIABLE, owned_processes, start_ticks
from smartproxy.llama import process
from smartproxy.llama.command import Said, gpus_of, read_command
from smartproxy.llama.listeners import listens
from smartproxy.llama.process import Child
from smartproxy.manager import measure, shortage
from smartproxy.manager.bring_down import (
    Draining,
    Ending,
    begin_drain,
    drain,
    on_server,
    take_down,
)
from smartproxy.manager.bring_up import Loading, resume
from smartproxy.manager.context import Tools, in_thread
from smartproxy.memory.types import Estimate, Layout
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import UNKNOWN_INDEX, NewAssignment
from smartproxy.state.server_row import LiveServer, NewServer, ServerColumns
from smartproxy.types import ServerState

logger = logging.getLogger(__name__)

#: a start waits so long to hear what the server of a lost row takes
FILE_PATIENCE_S = 5.0


def adopt_all(loading: Loading) -> None:
    """Bring rows and processes together again."""
    tools = loading.tools
    for row in server_rows.live_servers(tools.store):
        child = process.adopt(row.pid, row.pid_start_ticks)
        if child is None:
            _settle_dead(tools, row, "it ended while no manager was running")
        else:
            loading.children.add(row.id, child)
            logger.info(
                "adopted server %d pid=%d state=%s model=%s",
                *(row.id, row.pid, row.state, row.model_id),
            )
            _go_on(loading, row) if _has_its_port(row, child) else _disown(loading, row)
    ours = loading.children.pids()
    for found in owned_processes(str(tools.settings.state_dir)):
        if found.pid not in ours:
            _adopt_unknown(loading, found)


def _has_its_port(row: LiveServer, child: Child) -> bool:
    """Return whether what listens on a server's port is the server; one that starts is asked
    when it is ready."""
    return row.state != ServerState.READY or listens(child.pid, row.port)


def _disown(loading: Loading, row: LiveServer) -> None:
    """End a server whose port somebody else has: no request must go there."""
    reason = f"a process that is not its llama-server listens on its port {row.port}"
    now = loading.tools.store.now()
    begin_drain(loading, row.id, reason, Draining(only_if_idle=False), now=now)


def carry_on(loading: Loading) -> None:
    """Give each server on its way from state to state that no thread carries a new thread.

    The thread ended with an error: the state file could not be written for a while, say.
    """
    live = server_rows.live_servers(loading.tools.store)
    for row in live:
        if row.state == ServerState.READY or loading.children.is_carried(row.id):
            continue
        logger.warning("server %d (%s) is %s: carrying it on", row.id, row.model_id, row.state)
        child = loading.children.get(row.id)
        if child is not None and child.alive():
            if row.pid != child.pid:
                server_rows.update_server(
                    loading.tools.store, row.id, pid=child.pid, pid_start_ticks=child.start_ticks
                )
            _go_on(loading, row)
        else:
            loading.children.take(row.id)
            loading.lingering.note_end(row.id, loading.tools.store.now())
            _settle_dead(loading.tools, row, "it ended, and the state file could not be written")
    _end_rowless(loading, {row.id for row in live})


def _end_rowless(loading: Loading, live_ids: set[int]) -> None:
    """End processes whose row has ended: it was stopped while the process was being started."""
    for server_id, child in loading.children.snapshot().items():
        if server_id not in live_ids and not loading.children.is_carried(server_id):
            logger.warning(
                "server %d has ended, its process %d not: ending it", server_id, child.pid
            )
            on_server(loading, server_id, _end_process)


def _end_process(ending: Ending, server_id: int) -> None:
    child = ending.children.get(server_id)
    if child is not None:
        process.stop(child)
        ending.children.take(server_id)


def _go_on(loading: Loading, row: LiveServer) -> None:
    tools, state = loading.tools, row.state
    spec = tools.catalog.models.get(row.model_id)
    if state == ServerState.STARTING and spec is not None:
        on_server(loading, row.id, resume, spec)
    elif state == ServerState.STARTING:
        reason = f"no model '{row.model_id}' is configured any more"
        if server_rows.transition(
            tools.store, row.id, state, ServerState.STOPPING, now=tools.store.now(), reason=reason
        ):
            on_server(loading, row.id, take_down)
    elif state == ServerState.READY:
        in_thread(tools, measure.after_load, tools, loading.view, row.id)
    elif state == ServerState.DRAINING:
        on_server(loading, row.id, drain)
    elif state == ServerState.STOPPING:
        on_server(loading, row.id, take_down)


def _settle_dead(tools: Tools, row: LiveServer, reason: str) -> None:
    """A process that ended while nobody watched: its row ends too."""
    state, now = row.state, tools.store.now()
    if state == ServerState.STARTING:
        # no failure of the model: who waits for it gets a new start
        for before, after in (
            (ServerState.STARTING, ServerState.STOPPING),
            (ServerState.STOPPING, ServerState.STOPPED),
        ):
            server_rows.transition(tools.store, row.id, before, after, now=now, reason=reason)
        return
    after = ServerState.STOPPED if state == ServerState.STOPPING else ServerState.FAILED
    error: ServerColumns = {}
    if after == ServerState.FAILED:
        message = f"model '{row.model_id}': {reason}"
        error = {"error_code": UpstreamError.code, "error_message": message}
    server_rows.transition(tools.store, row.id, state, after, now=now, reason=reason, **error)


def _adopt_unknown(loading: Loading, found: psutil.Process) -> None:
    """A server of ours without a row: the state file was lost. Take it in, or end it."""
    tools = loading.tools
    try:
        new, parts = _new_server(loading, found)
    except (psutil.Error, KeyError, ValueError, IndexError, OSError):
        new, parts = None, []
    child = process.adopt(found.pid, start_ticks(found.pid))
    if child is None:
        return
    if new is None or new.model_id not in tools.catalog.models:
        logger.warning("ending pid %d: a server of ours that can't be adopted", found.pid)
        process.stop(child)
        return
    try:
        server_id = server_rows.insert_server(
            tools.store, new, parts, now=tools.store.now(), reason="adopted: its row was lost"
        )
    except StateRefused:
        process.stop(child)
        return
    loading.children.add(server_id, child)
    spec = tools.catalog.models[new.model_id]
    on_server(loading, server_id, resume, spec)


def _new_server(loading: Loading, found: psutil.Process) -> tuple[NewServer, list[NewAssignment]]:
    """Read what a row needs from a server's command line and environment, and what it was promised.

    What NVML shows of it corrects that at the first look.
    """
    argv, env = found.cmdline(), found.environ()
    said = read_command(argv)
    assert env[OWNER_VARIABLE] == str(loading.tools.settings.state_dir)
    estimate = _expected(loading, said)
    sizes = [device.total_bytes for device in estimate.devices] if estimate else []
    uuids = gpus_of(env)
    parts = [
        NewAssignment(gpu_uuid=uuid, gpu_index=UNKNOWN_INDEX, estimated_bytes=size)
        for uuid, size in zip(uuids, [*sizes, *[0] * len(uuids)], strict=False)
    ]
    new = NewServer(
        model_id=said.model_id,
        port=said.port,
        api_key=env["LLAMA_API_KEY"],
        command=json.dumps(argv),
        log_path=os.readlink(f"/proc/{found.pid}/fd/1"),
        settings_key="",
        pid=found.pid,
        pid_start_ticks=start_ticks(found.pid),
        context_size=said.context_size,
        parallel=said.parallel,
        gpu_layers=said.gpu_layers,
        tensor_split=",".join(f"{share:g}" for share in said.tensor_split),
        estimated_bytes=sum(part.estimated_bytes for part in parts),
        host_estimated_bytes=estimate.host.total_bytes if estimate else None,
    )
    return new, parts


def _expected(loading: Loading, said: Said) -> Estimate | None:
    """Return what a server with this command line is expected to take; None: it can't be told."""
    spec = loading.tools.catalog.models.get(said.model_id)
    if spec is None:
        return None
    layout = Layout(
        tensor_split=said.tensor_split,
        gpu_layers=said.gpu_layers,
        context_size=said.context_size,
        cpu_moe_layers=said.cpu_moe_layers,
    )
    try:
        facts = loading.ahead.wait(
            spec.id,
            spec,
            partial(shortage.facts_of, loading.tools, spec),
            within_s=FILE_PATIENCE_S,
        )
        return loading.shortages.raised(spec.id, facts).need.estimate(layout)
    except SmartProxyError as error:
        logger.warning("model '%s': what its server takes is not known: %s", spec.id, error)
        return None
