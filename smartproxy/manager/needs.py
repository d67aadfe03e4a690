"""What each model of the catalogue needs and where it may go: for the planner, and to be listed."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.errors import LoadFailed, MetadataError
from smartproxy.manager import lessons
from smartproxy.manager.context import Manager
from smartproxy.manager.served import loaded_of, metadata_of
from smartproxy.memory.correct import at_least, corrected, overridden
from smartproxy.memory.estimate import make_need
from smartproxy.memory.types import Layout, ModelMetadata, Need
from smartproxy.planner.types import PlacePolicy
from smartproxy.state import models
from smartproxy.state.models import ModelRow

logger = logging.getLogger(__name__)


def need_of(manager: Manager, spec: ModelSpec) -> Need:
    """Return what a model needs. Raises LoadFailed or MetadataError: why it can't be known."""
    loaded = loaded_of(manager.store, spec)
    learned = lessons.learned_of(manager, spec, loaded)
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


def policy_of(manager: Manager, spec: ModelSpec) -> PlacePolicy:
    """Return where a model may go; configured GPU numbers become uuids."""
    return PlacePolicy(
        strategy=spec.strategy,
        max_gpus=spec.max_gpus,
        allowed_uuids=_allowed_uuids(manager, spec),
        gpu_layers=spec.gpu_layers,
        partial_offload=spec.partial_offload,
        cpu_fallback=spec.cpu_fallback,
        force_cpu=spec.force_cpu,
    )


def _allowed_uuids(manager: Manager, spec: ModelSpec) -> frozenset[str] | None:
    if spec.gpus is None:
        return None
    seen = manager.gpus.gpus if manager.gpus else ()
    by_index = {gpu.index: gpu.uuid for gpu in seen}
    # a number that names no GPU stays as it is, so that the planner says it is not there
    return frozenset(
        by_index.get(gpu, f"gpu {gpu}") if isinstance(gpu, int) else gpu for gpu in spec.gpus
    )


def publish_models(manager: Manager) -> None:
    """Write the catalogue with what is known of each model, for /v1/models. May take seconds."""
    for spec in manager.catalog.models.values():
        publish_model(manager, spec)
    models.keep_models(manager.store, manager.catalog.models)


def publish_model(manager: Manager, spec: ModelSpec) -> None:
    """Write what is known of one model: again when a load has taught something about it."""
    models.write_model(manager.store, _model_row(manager, spec))


def _model_row(manager: Manager, spec: ModelSpec) -> ModelRow:
    row = ModelRow(
        id=spec.id,
        path=str(spec.path) if spec.path else None,
        problem=spec.problem,
        updated_at=time.time(),
    )
    if spec.problem is not None or spec.path is None:
        return row
    try:
        known = metadata_of(manager.store, spec.path)
        need = need_of(manager, spec)
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
