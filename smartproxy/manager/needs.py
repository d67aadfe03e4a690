"""What each model of the catalogue needs: its header read once, its estimate, for the planner.

Headers are cached in the state file by path, size and mtime.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from smartproxy.catalog import ModelSpec
from smartproxy.errors import LoadFailed, MetadataError
from smartproxy.manager import metadata as gguf_metadata
from smartproxy.manager.core import Manager
from smartproxy.manager.estimate import make_need
from smartproxy.manager.launch import BATCH_SIZE, UBATCH_SIZE
from smartproxy.state.store import Store
from smartproxy.types import EstimateOptions, Layout, ModelMetadata, Need, PlacePolicy

logger = logging.getLogger(__name__)


def need_of(manager: Manager, spec: ModelSpec) -> Need:
    """Return what a model needs. Raises LoadFailed or MetadataError: why it can't be known."""
    if spec.problem is not None or spec.path is None:
        raise LoadFailed(f"model '{spec.id}': {spec.problem or 'it has no file'}")
    known = metadata_of(manager.store, spec.path)
    return make_need(known, options_of(manager.store, spec), context_size=context_size(spec, known))


def context_size(spec: ModelSpec, known: ModelMetadata) -> int | None:
    """Return tokens of the server: the configured ones, at most the model's own; None = auto."""
    if spec.context_size is None:
        return None
    return min(spec.context_size, known.trained_context or spec.context_size)


def options_of(store: Store, spec: ModelSpec) -> EstimateOptions:
    """Return the settings of a model that its memory depends on, as the launcher passes them."""
    extra = sum(path.stat().st_size for path in (spec.mmproj, spec.draft_model) if path)
    return EstimateOptions(
        parallel=spec.parallel,
        kv_unified=spec.kv_unified,
        cache_type_k=spec.cache_type_k,
        cache_type_v=spec.cache_type_v,
        batch=BATCH_SIZE,
        ubatch=UBATCH_SIZE,
        embeddings=spec.embeddings,
        projector_bytes=extra,
    )


def metadata_of(store: Store, path: Path) -> ModelMetadata:
    """Return a file's header, from the cache if the file has not changed. Raises MetadataError."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise MetadataError(f"{path}: {error.strerror}") from None
    row = store.one("SELECT * FROM files WHERE path = ?", (str(path),))
    if row and (row["size_bytes"], row["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        try:
            return gguf_metadata.from_json(row["metadata"])
        except (TypeError, ValueError, KeyError):
            logger.info("cached header of %s is of another version: reading it again", path)
    known = gguf_metadata.read_metadata(path)
    with store.write() as connection:
        connection.execute(
            "INSERT OR REPLACE INTO files (path, size_bytes, mtime_ns, metadata, read_at)"
            " VALUES (?, ?, ?, ?, ?)",
            (
                str(path),
                stat.st_size,
                stat.st_mtime_ns,
                gguf_metadata.to_json(known),
                time.time(),
            ),
        )
    return known


def settings_key(manager: Manager, spec: ModelSpec, layout: Layout) -> str:
    """Return what measurements are kept under: file, build, and everything memory depends on."""
    assert spec.path is not None
    stat = os.stat(spec.path)
    facts = [
        str(spec.path),
        stat.st_size,
        stat.st_mtime_ns,
        manager.binary.build,
        spec.parallel,
        spec.kv_unified,
        spec.cache_type_k,
        spec.cache_type_v,
        spec.embeddings,
        str(spec.mmproj),
        str(spec.draft_model),
        list(spec.args),
        layout.context_size,
        layout.gpu_layers,
        layout.cpu_moe_layers,
        [round(share, 6) for share in layout.tensor_split],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


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
        row = _model_row(manager, spec)
        names = ", ".join(row)
        with manager.store.write() as connection:
            connection.execute(
                f"INSERT OR REPLACE INTO models ({names})"
                f" VALUES ({', '.join(f':{name}' for name in row)})",
                row,
            )
    ids = list(manager.catalog.models)
    with manager.store.write() as connection:
        connection.execute(f"DELETE FROM models WHERE id NOT IN ({','.join('?' * len(ids))})", ids)


def _model_row(manager: Manager, spec: ModelSpec) -> dict[str, object]:
    row: dict[str, object] = {
        "id": spec.id,
        "path": str(spec.path) if spec.path else None,
        "problem": spec.problem,
        "updated_at": time.time(),
    }
    if spec.problem is not None or spec.path is None:
        return row
    try:
        known = metadata_of(manager.store, spec.path)
        need = need_of(manager, spec)
        context = need.context_size or need.max_context_size
        estimate = need.estimate(
            Layout(tensor_split=(1.0,), gpu_layers=need.layer_count, context_size=context)
        )
    except (MetadataError, LoadFailed) as error:
        logger.warning("model '%s' can't be loaded: %s", spec.id, error)
        return {**row, "problem": str(error)}
    return {
        **row,
        "architecture": known.architecture,
        "parameters": known.parameters,
        "quantization": known.quantization,
        "file_bytes": known.file_bytes,
        "trained_context": known.trained_context,
        "context_size": context,
        "estimated_bytes": spec.estimated_vram_bytes or estimate.total_bytes,
        "host_estimated_bytes": estimate.host.total_bytes,
        "confident": int(estimate.confident),
    }
