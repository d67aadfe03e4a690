"""End servers whose GPU failed; their models are placed anew on the next request.

A GPU that is lost (fell off the bus, wants a reset) takes its servers with it: they are ended at
once, requests and all, which costs nothing that was not lost already, and a request that has no
byte of its answer yet is tried again elsewhere. One that merely can't be read may well go on
computing: it gets nothing new, and after UNREADABLE_S its servers finish what they have.
"""

from __future__ import annotations

from smartproxy.gpus.types import Gpu
from smartproxy.manager.bring_down import Ending, on_server, stop_now, take_down, unload
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import assignments
from smartproxy.state.server_row import LiveServer
from smartproxy.types import ServerState

#: a driver that has a bad moment unloads nothing: failing looks must be so far apart
UNREADABLE_S = 5.0
#: a process on a lost GPU has nothing to finish
GRACE_S = 0.5


def leave_failed_gpus(ending: Ending, view: GpuView, now: float) -> None:
    """End or drain every server that has a part on a GPU in error."""
    failed = _failed(view)
    if not failed:
        return
    parts = assignments(ending.tools.store)
    for row in server_rows.live_servers(ending.tools.store):
        gpus = [failed[part.gpu_uuid] for part in parts.get(row.id, ()) if part.gpu_uuid in failed]
        if not gpus or row.state == ServerState.STOPPING:
            continue
        reason = f"gpu {gpus[0].index} failed: {gpus[0].error}"
        if any(gpu.lost for gpu in gpus):
            _end(ending, row, reason, now)
        else:
            unload(ending, row.model_id, reason, now)


def _failed(view: GpuView) -> dict[str, Gpu]:
    """Return by uuid the GPUs that are lost, or could not be read for a while."""
    seen = view.seen
    if seen is None:
        return {}
    since = view.failing_since
    in_error = {gpu.uuid: gpu for gpu in seen.gpus if gpu.error}
    for uuid in since.keys() - in_error.keys():
        del since[uuid]
    return {
        uuid: gpu
        for uuid, gpu in in_error.items()
        if seen.observed_at - since.setdefault(uuid, seen.observed_at) >= UNREADABLE_S or gpu.lost
    }


def _end(ending: Ending, row: LiveServer, reason: str, now: float) -> None:
    """Stop a server without waiting for its requests."""
    state = row.state
    if state is ServerState.STARTING:
        stop_now(ending, row.id, row.state, reason, now=now)
        return
    store, server_id = ending.tools.store, row.id
    if state is ServerState.READY:
        server_rows.transition(
            store, server_id, state, ServerState.DRAINING, now=now, reason=reason
        )
    if server_rows.transition(
        store, server_id, ServerState.DRAINING, ServerState.STOPPING, now=store.now(), reason=reason
    ):
        on_server(ending, server_id, take_down, GRACE_S)
