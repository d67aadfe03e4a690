"""What each model of the catalogue needs and where it may go: for the planner, and to be listed.

Earlier loads teach about the next one: what they were measured to take comes from measure.py; how
that corrects an estimate is in memory/correct.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.errors import LoadFailed, MetadataError
from smartproxy.gpus.cuda import default_overhead_bytes
from smartproxy.gpus.types import Gpu
from smartproxy.manager.context import Tools
from smartproxy.manager.served import file_key, loaded_of, metadata_of, options_key
from smartproxy.memory.correct import Learned, Lesson, at_least, corrected, learn, overridden
from smartproxy.memory.estimate import Loaded, make_need
from smartproxy.memory.types import Layout, Need
from smartproxy.model_file.types import ModelMetadata
from smartproxy.planner.types import PlacePolicy
from smartproxy.state import measurements, models
from smartproxy.state.measurements import MeasurementRow
from smartproxy.state.models import ModelRow

logger = logging.getLogger(__name__)


def need_of(tools: Tools, spec: ModelSpec) -> Need:
    """Return what a model needs. Raises LoadFailed or MetadataError: why it can't be known."""
    loaded = loaded_of(tools.store, spec)
    learned = learned_of(tools, spec, loaded)
    plain = make_need(loaded, context_size=context_size(spec, loaded.metadata))
    if spec.estimated_vram_bytes is None:
        return replace(plain, estimate=lambda layout: corrected(plain.estimate(layout), learned))
    whole = _whole(plain)
    override = partial(
        overridden,
        wanted_bytes=spec.estimated_vram_bytes,
        whole_bytes=plain.estimate(whole).total_bytes,
    )
    # what a person says is not lowered, but a server that took more proved it wrong
    return replace(
        plain, estimate=lambda layout: at_least(override(plain.estimate(layout)), learned)
    )


def _whole(need: Need) -> Layout:
    """Return the layout of the whole model on one GPU."""
    context = need.context_size or need.max_context_size
    return Layout(tensor_split=(1.0,), gpu_layers=need.layer_count, context_size=context)


def context_size(spec: ModelSpec, known: ModelMetadata) -> int | None:
    """Return tokens of the server: the configured ones, at most the model's own; None = auto."""
    if spec.context_size is None:
        return None
    return min(spec.context_size, known.trained_context or spec.context_size)


def policy_of(gpus: Iterable[Gpu], spec: ModelSpec) -> PlacePolicy:
    """Return where a model may go; configured GPU numbers become uuids."""
    return PlacePolicy(
        strategy=spec.strategy,
        max_gpus=spec.max_gpus,
        allowed_uuids=_allowed_uuids(gpus, spec),
        gpu_layers=spec.gpu_layers,
        partial_offload=spec.partial_offload,
        cpu_fallback=spec.cpu_fallback,
        force_cpu=spec.force_cpu,
    )


def _allowed_uuids(gpus: Iterable[Gpu], spec: ModelSpec) -> frozenset[str] | None:
    if spec.gpus is None:
        return None
    by_index = {gpu.index: gpu.uuid for gpu in gpus}
    # a number that names no GPU stays as it is, so that the planner says it is not there
    return frozenset(
        by_index.get(gpu, f"gpu {gpu}") if isinstance(gpu, int) else gpu for gpu in spec.gpus
    )


def overheads(tools: Tools, gpus: Iterable[Gpu]) -> dict[str, int]:
    """Return bytes per GPU uuid that a server is expected to take beside its buffers.

    What was measured; until that was after prompts, not less than the safe start value.
    """
    known = measurements.overheads(tools.store, tools.binary.build)
    charged = {}
    for gpu in gpus:
        row = known.get(gpu.uuid)
        if row is not None:
            least = 0 if row.warm else default_overhead_bytes(gpu.total_bytes)
            charged[gpu.uuid] = max(row.overhead_bytes, least)
    return charged


def learned_of(tools: Tools, spec: ModelSpec, loaded: Loaded) -> Learned:
    """Return what loads of a model's file have taught, for this build."""
    build = tools.binary.build
    rows = measurements.of_file(tools.store, file_key(spec), build)
    return learn(_lessons(rows, options_key(spec, loaded, build))) if rows else Learned()


def _lessons(rows: list[MeasurementRow], options: str) -> Iterator[Lesson]:
    loads: dict[tuple[int | None, str], list[MeasurementRow]] = {}
    for row in rows:
        loads.setdefault((row.server_id, row.settings_key), []).append(row)
    for parts in loads.values():
        layout = _layout(json.loads(parts[0].layout))
        # a load of which a device is missing, or was not measured, teaches nothing
        whole = len(parts) == len(layout.tensor_split) + 1 and all(map(_known, parts))
        if whole and any(map(_was_measured, parts)):
            yield Lesson(
                layout=layout,
                predicted=tuple(part.predicted_bytes for part in parts),
                measured=tuple(_buffers(part) for part in parts),
                same_options=parts[0].options_key == options,
                asked=parts[0].server_id is None,
            )


def _known(part: MeasurementRow) -> bool:
    return part.device == measurements.HOST or _was_measured(part)


def _was_measured(part: MeasurementRow) -> bool:
    on_gpu = part.device != measurements.HOST and part.process_bytes is not None
    return on_gpu or part.buffers_bytes is not None


def _layout(values: Mapping[str, Any]) -> Layout:
    return Layout(**{**values, "tensor_split": tuple(values["tensor_split"])})


def _buffers(part: MeasurementRow) -> int:
    """Return a device's buffers; where no line told them, what the process had beside overhead."""
    if part.buffers_bytes is not None:
        return part.buffers_bytes
    if part.device == measurements.HOST:
        return part.predicted_bytes
    return max(0, (part.process_bytes or 0) - part.overhead_bytes)


def publish_models(tools: Tools) -> None:
    """Write the catalogue with what is known of each model, for /v1/models. May take seconds."""
    for spec in tools.catalog.models.values():
        publish_model(tools, spec)
    models.keep_models(tools.store, tools.catalog.models)


def publish_model(tools: Tools, spec: ModelSpec) -> None:
    """Write what is known of one model: again when a load has taught something about it."""
    models.write_model(tools.store, _model_row(tools, spec))


def _model_row(tools: Tools, spec: ModelSpec) -> ModelRow:
    row = ModelRow(
        id=spec.id,
        path=str(spec.path) if spec.path else None,
        problem=spec.problem,
        updated_at=time.time(),
    )
    if spec.problem is not None or spec.path is None:
        return row
    try:
        known = metadata_of(tools.store, spec.path)
        need = need_of(tools, spec)
        layout = _whole(need)
        estimate = need.estimate(layout)
    except (MetadataError, LoadFailed) as error:
        logger.warning("model '%s' can't be loaded: %s", spec.id, error)
        return replace(row, problem=str(error))
    return replace(
        row,
        architecture=known.architecture,
        parameters=known.parameters,
        quantization=known.quantization,
        file_bytes=known.file_bytes,
        trained_context=known.trained_context,
        context_size=layout.context_size,
        estimated_bytes=estimate.total_bytes,
        host_estimated_bytes=estimate.host.total_bytes,
        confident=estimate.confident,
    )
