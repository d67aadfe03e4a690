"""Read from the state file what earlier loads teach about the next one: lessons and overheads.

What is written there comes from measure.py; how a lesson corrects an estimate is in
memory/correct.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.manager.context import Manager
from smartproxy.manager.served import file_key, options_key
from smartproxy.memory.correct import Learned, Lesson, learn
from smartproxy.memory.estimate import Loaded
from smartproxy.memory.types import Layout
from smartproxy.planner.ledger import default_overhead_bytes
from smartproxy.state import measurements
from smartproxy.state.store import Row


def overheads(manager: Manager) -> dict[str, int]:
    """Return bytes per GPU uuid that a server is expected to take beside its buffers.

    What was measured; until that was after prompts, not less than the safe start value.
    """
    known = measurements.overheads(manager.store, manager.binary.build)
    charged = {}
    for gpu in manager.gpus.gpus if manager.gpus else ():
        row = known.get(gpu.uuid)
        if row is not None:
            least = 0 if row["warm"] else default_overhead_bytes(gpu)
            charged[gpu.uuid] = max(row["overhead_bytes"], least)
    return charged


def learned_of(manager: Manager, spec: ModelSpec, loaded: Loaded) -> Learned:
    """Return what loads of a model's file have taught, for this build."""
    build = manager.binary.build
    rows = measurements.of_file(manager.store, file_key(spec), build)
    return learn(_lessons(rows, options_key(spec, loaded, build))) if rows else Learned()


def _lessons(rows: list[Row], options: str) -> Iterator[Lesson]:
    loads: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        loads.setdefault((row["server_id"], row["settings_key"]), []).append(row)
    for parts in loads.values():
        layout = _layout(json.loads(parts[0]["layout"]))
        # a load of which a device is missing, or was not measured, teaches nothing
        whole = len(parts) == len(layout.tensor_split) + 1 and all(map(_known, parts))
        if whole and any(map(_was_measured, parts)):
            yield Lesson(
                layout=layout,
                predicted=tuple(part["predicted_bytes"] for part in parts),
                measured=tuple(_buffers(part) for part in parts),
                same_options=parts[0]["options_key"] == options,
                asked=parts[0]["server_id"] is None,
            )


def _known(part: Row) -> bool:
    return part["device"] == measurements.HOST or _was_measured(part)


def _was_measured(part: Row) -> bool:
    on_gpu = part["device"] != measurements.HOST and part["process_bytes"] is not None
    return on_gpu or part["buffers_bytes"] is not None


def _layout(values: Mapping[str, Any]) -> Layout:
    return Layout(**{**values, "tensor_split": tuple(values["tensor_split"])})


def _buffers(part: Row) -> int:
    """Return a device's buffers; where no line told them, what the process had beside overhead."""
    if part["buffers_bytes"] is not None:
        return int(part["buffers_bytes"])
    if part["device"] == measurements.HOST:
        return int(part["predicted_bytes"])
    return max(0, int(part["process_bytes"]) - int(part["overhead_bytes"]))
