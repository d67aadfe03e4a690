"""Keep what servers were measured to take beside what was expected, and learn from it.

Input: the placement of a load; then the server's own log, NVML's figure for its pid, its resident
memory. Output: the state file's measurements, overheads and promises (`assignments`). What follows
from them for the next estimate is in needs.py. Runs in the threads that start servers and in the
job that looks at the GPUs; starts and stops nothing.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.gpus.types import GpuSnapshot
from smartproxy.llama.buffer_lines import HOST, measured_buffers
from smartproxy.manager import needs
from smartproxy.manager.context import Tools
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.served import file_key, options_key, settings_key
from smartproxy.memory.correct import ROUNDING_BYTES, Vector, buffers_of
from smartproxy.memory.estimate import Loaded, predictor
from smartproxy.planner.types import Placement
from smartproxy.state import events, measurements
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments
from smartproxy.state.measurements import MeasurementRow, Taken
from smartproxy.state.server_row import LiveServer, ServerRow
from smartproxy.types import MIB, ServerState

logger = logging.getLogger(__name__)

#: tokens of prompts after which pools have grown: a whole micro-batch
WARM_TOKENS = 512
#: of a log: all buffer lines stand at its beginning
HEAD_BYTES = 8 << 20
#: changes of resident memory that are worth a write
HOST_STEP = 1.02
#: growth over what was told already that is worth another error
TOLD_STEP = 1.01


def expect(
    tools: Tools,
    server_id: int | None,
    placement: Placement,
    *,
    spec: ModelSpec,
    loaded: Loaded,
    told: Vector | None = None,
) -> None:
    """Write what a server is expected to take, before it starts.

    server_id None: no server will run; `told` is what a tool says of such a load, the host last.
    """
    layout, build = placement.layout, tools.binary.build
    options = options_key(spec, loaded, build)
    predicted = buffers_of(predictor(loaded)(layout))
    host = MeasurementRow(
        at=tools.store.now(),
        model_id=spec.id,
        server_id=server_id,
        build=build,
        file_key=file_key(spec),
        options_key=options,
        settings_key=settings_key(options, layout),
        layout=json.dumps(asdict(layout)),
        device=measurements.HOST,
        device_index=-1,
        predicted_bytes=predicted[-1],
        estimated_bytes=placement.estimate.host.total_bytes,
        overhead_bytes=0,
    )
    devices = [
        replace(
            host,
            device=share.uuid,
            device_index=place,
            predicted_bytes=predicted[place],
            estimated_bytes=share.bytes,
            overhead_bytes=device.overhead_bytes,
        )
        for place, (share, device) in enumerate(
            zip(placement.gpus, placement.estimate.devices, strict=True)
        )
    ]
    rows = [*devices, host]
    sizes = told or (None,) * len(rows)
    measurements.expect(
        tools.store,
        [replace(row, buffers_bytes=size) for row, size in zip(rows, sizes, strict=True)],
    )


def after_load(tools: Tools, view: GpuView, server_id: int) -> None:
    """Write what a server that became ready says of its buffers. Reads its log."""
    row = server_rows.server(tools.store, server_id)
    expected = measurements.of_server(tools.store, server_id)
    if not expected or expected[-1].buffers_bytes is not None:
        return  # its row was lost with the state file, or an earlier manager has read its log
    seen = measured_buffers(_head(Path(row.log_path)).splitlines())
    if not seen:
        # memory of the host is not promised to anybody: no harm in not knowing it
        level = logging.WARNING if len(expected) > 1 else logging.INFO
        logger.log(level, "server %d: its log tells no buffers: nothing learned", server_id)
        return
    names = _device_names(row, [name for name in seen if name != HOST])
    buffers = {
        part.device: seen[name].buffers_bytes
        for part, name in zip(expected, names, strict=False)
        if name in seen and part.device != measurements.HOST
    }
    if HOST in seen:
        buffers[measurements.HOST] = seen[HOST].buffers_bytes
    measurements.fill_buffers(tools.store, server_id, buffers, now=tools.store.now())
    for part in expected:
        _tell_of_buffers(tools, view, row, part, buffers.get(part.device, 0))
    spec = tools.catalog.models.get(row.model_id)
    if spec is not None:
        needs.publish_model(tools, spec)


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _device_names(row: ServerRow, found: list[str]) -> list[str]:
    """Return the server's devices in the order of its GPUs: as it was told, or by their number."""
    argv: list[str] = json.loads(row.command)
    if "--device" in argv:
        return argv[argv.index("--device") + 1].split(",")
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _tell_of_buffers(
    tools: Tools, view: GpuView, row: ServerRow, part: MeasurementRow, buffers_bytes: int
) -> None:
    expected = part.estimated_bytes - part.overhead_bytes
    if buffers_bytes <= expected + ROUNDING_BYTES:
        return
    message = (
        f"server {row.id} model={row.model_id}: its buffers on {_named(view, part)} take"
        f" {_mib(buffers_bytes)}, {_mib(expected)} were estimated; its next estimate is raised"
    )
    on_host = part.device == measurements.HOST
    # memory of the host is not promised to anybody: no harm was done
    _tell(tools, message, row, part, logging.WARNING if on_host else logging.ERROR)


def sample(tools: Tools, view: GpuView) -> None:
    """Compare what live servers hold with what is known of them. Called after every look."""
    live = [row for row in server_rows.live_servers(tools.store) if _settled(row, view.seen)]
    for row in live:
        _sample_host(tools, row)
    if view.gpus:
        promised = assignments(tools.store)
        for row in live:
            _sample_gpus(tools, view, row, promised.get(row.id, []))
        measurements.show_overheads(tools.store, needs.overheads(tools, view.gpus))


def _settled(row: ServerRow, seen: GpuSnapshot | None) -> bool:
    """Return whether a server was ready when the GPUs were looked at."""
    states = (ServerState.READY, ServerState.DRAINING)
    return bool(row.state in states and seen and (row.ready_at or 0) <= seen.observed_at)


def _sample_host(tools: Tools, row: ServerRow) -> None:
    try:
        resident = psutil.Process(row.pid).memory_info().rss
    except psutil.Error:
        return  # it just ended
    if resident > HOST_STEP * (row.host_measured_bytes or 0):
        measurements.fill_host(tools.store, row.id, resident)


def _sample_gpus(tools: Tools, view: GpuView, row: LiveServer, parts: list[AssignmentRow]) -> None:
    now, warm = tools.store.now(), (row.prompt_tokens_total or 0) >= WARM_TOKENS
    shown = {
        gpu.uuid: process.used_bytes
        for gpu in view.gpus
        for process in gpu.processes
        if process.pid == row.pid and gpu.error is None
    }
    expected = {part.device: part for part in measurements.of_server(tools.store, row.id)}
    changes = []
    for part in parts:
        uuid, before = part.gpu_uuid, part.measured_bytes
        held = max(before or 0, shown.get(uuid) or 0) or None
        taken = Taken(
            server_id=row.id,
            gpu_uuid=uuid,
            measured_bytes=held,
            reserved_bytes=reservation(part, expected.get(uuid), held, warm=warm),
        )
        if (held, taken.reserved_bytes) != (before, part.reserved_bytes):
            changes.append(taken)
        if held is not None and uuid in expected:
            _learn_overhead(tools, view, row, expected[uuid], held, warm=warm)
            if held > max(part.estimated_bytes, TOLD_STEP * (before or 0)):
                _tell_of_process(tools, view, row, expected[uuid], held)
    if changes:
        measurements.fill_taken(tools.store, changes, now=now)


def reservation(
    part: AssignmentRow, expected: MeasurementRow | None, held: int | None, *, warm: bool
) -> int:
    """Return what stays withheld of a GPU for a server; bytes.

    Until prompts made its pools grow, the most of estimate, own buffers and what NVML shows; from
    then on what NVML was seen to show, the most of it.
    """
    if held is not None and warm:
        return held
    buffers = 0
    if expected is not None and expected.buffers_bytes is not None:
        buffers = expected.buffers_bytes + expected.overhead_bytes
    return max(part.estimated_bytes, buffers, held or 0)


def _learn_overhead(
    tools: Tools, view: GpuView, row: ServerRow, part: MeasurementRow, held: int, *, warm: bool
) -> None:
    if part.buffers_bytes is None:
        return
    store, build = tools.store, part.build
    # what the log rounds away must not make it too small
    overhead = max(0, held - part.buffers_bytes + ROUNDING_BYTES)
    known = measurements.overheads(store, build).get(part.device)
    if known and known.overhead_bytes >= overhead and known.warm >= warm:
        return
    measurements.learn_overhead(
        store, part.device, build, overhead_bytes=overhead, warm=warm, now=tools.store.now()
    )
    if known and known.overhead_bytes >= overhead:
        return  # only believed more now
    message = (
        f"server {row.id} takes {_mib(overhead)} of {_named(view, part)} beside its buffers"
        f" ({_mib(part.overhead_bytes)} were assumed)"
    )
    _tell(tools, message, row, part, logging.INFO)


def _tell_of_process(
    tools: Tools, view: GpuView, row: ServerRow, part: MeasurementRow, held: int
) -> None:
    message = (
        f"server {row.id} model={row.model_id}: NVML shows {_mib(held)} on"
        f" {_named(view, part)}, {_mib(part.estimated_bytes)} were estimated;"
        " its next estimate is raised"
    )
    _tell(tools, message, row, part, logging.ERROR)


def _tell(tools: Tools, message: str, row: ServerRow, part: MeasurementRow, level: int) -> None:
    gpu_uuid = None if part.device == measurements.HOST else part.device
    where: dict[str, Any] = {"model_id": row.model_id, "server_id": row.id}
    events.event(
        tools.store, tools.store.now(), "estimate", message, gpu_uuid=gpu_uuid, level=level, **where
    )


def _named(view: GpuView, part: MeasurementRow) -> str:
    for gpu in view.gpus:
        if gpu.uuid == part.device:
            return f"GPU {gpu.index}"
    return "the host" if part.device == measurements.HOST else str(part.device)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MB"
