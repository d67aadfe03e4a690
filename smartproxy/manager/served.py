"""From a model of the catalogue to what its server loads: files, and settings that cost memory.

The launcher and the estimate both read `loaded_of`, so that they speak of the same server. Headers
are cached in the state file by path, size and mtime.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.config.server_args import ExtraArgs, read_args
from smartproxy.errors import LoadFailed, MetadataError
from smartproxy.memory.estimate import Loaded, with_flash_attn_resolved
from smartproxy.memory.projector import projector
from smartproxy.memory.types import EstimateOptions, FlashAttention, Layout
from smartproxy.model_file import metadata as gguf_metadata
from smartproxy.model_file.types import ModelMetadata
from smartproxy.state import models
from smartproxy.state.models import FileRow
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)

#: llama-server's own defaults
BATCH_SIZE = 2048
UBATCH_SIZE = 512


def loaded_of(store: Store, spec: ModelSpec) -> Loaded:
    """Return what a model's server loads.

    Whether flash attention is on is settled, save for unknown architectures. Raises LoadFailed or
    MetadataError: why it can't be known.
    """
    if spec.problem is not None or spec.path is None:
        raise LoadFailed(f"model '{spec.id}': {spec.problem or 'it has no file'}")
    extra = read_args(spec.args)
    known = metadata_of(store, spec.path)
    options = _with_projector(with_flash_attn_resolved(known, _options(spec, extra)), spec, extra)
    if spec.draft_model is None:
        return Loaded(metadata=known, options=options)
    return Loaded(
        metadata=known,
        options=options,
        draft=metadata_of(store, spec.draft_model),
        draft_options=_draft_options(spec, extra),
    )


def _options(spec: ModelSpec, extra: ExtraArgs) -> EstimateOptions:
    return EstimateOptions(
        parallel=spec.parallel,
        kv_unified=spec.kv_unified,
        cache_type_k=spec.cache_type_k,
        cache_type_v=spec.cache_type_v,
        batch=extra.batch or BATCH_SIZE,
        ubatch=extra.ubatch or UBATCH_SIZE,
        flash_attn=extra.flash_attn or FlashAttention.AUTO,
        swa_full=extra.swa_full,
        embeddings=spec.embeddings or extra.ranks,
        kv_offload=extra.kv_offload,
        projector_offload=extra.projector_offload,
        adapter_bytes=sum(_size_bytes(spec, name) for name in extra.adapters),
        draft_tokens=extra.draft_tokens if spec.draft_model else 0,
        unmodelled=extra.unmodelled,
    )


def _draft_options(spec: ModelSpec, extra: ExtraArgs) -> EstimateOptions:
    """The draft model's server side has the context and the slots of the model it drafts for."""
    return EstimateOptions(
        parallel=spec.parallel,
        kv_unified=spec.kv_unified,
        cache_type_k=extra.cache_type_k_draft or "f16",
        cache_type_v=extra.cache_type_v_draft or "f16",
        batch=extra.batch or BATCH_SIZE,
        ubatch=extra.ubatch or UBATCH_SIZE,
        flash_attn=extra.flash_attn or FlashAttention.AUTO,
        kv_offload=extra.kv_offload,
    )


def _with_projector(options: EstimateOptions, spec: ModelSpec, extra: ExtraArgs) -> EstimateOptions:
    if spec.mmproj is None or not extra.projector:
        return options
    try:
        flash = options.flash_attn is FlashAttention.ON
        takes = projector(*gguf_metadata.projector_header(spec.mmproj), flash=flash)
    except OSError as error:
        raise LoadFailed(f"model '{spec.id}': {spec.mmproj}: {error.strerror}") from None
    return replace(
        options,
        projector_bytes=takes.weights_bytes,
        projector_compute_bytes=takes.compute_bytes,
    )


def _size_bytes(spec: ModelSpec, name: str) -> int:
    try:
        return os.stat(name).st_size
    except OSError as error:
        raise LoadFailed(f"model '{spec.id}': args: {name}: {error.strerror}") from None


def metadata_of(store: Store, path: Path) -> ModelMetadata:
    """Return a file's header, from the cache if the file has not changed. Raises MetadataError."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise MetadataError(f"{path}: {error.strerror}") from None
    row = models.file_of(store, str(path))
    if row and (row.size_bytes, row.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        try:
            return gguf_metadata.from_json(row.metadata)
        except MetadataError:
            logger.info("cached header of %s is of another version: reading it again", path)
    known = gguf_metadata.read_metadata(path)
    file = FileRow(
        path=str(path),
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        metadata=gguf_metadata.to_json(known),
        read_at=time.time(),
    )
    models.write_file(store, file)
    return known


def file_key(spec: ModelSpec) -> str:
    """Return what names a file's content without reading it: path, size and mtime of all parts.

    Raises MetadataError where one is not there.
    """
    try:
        stats = [(str(part), os.stat(part)) for part in spec.parts]
    except OSError as error:
        raise MetadataError(f"{error.filename}: {error.strerror}") from None
    return _digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def options_key(spec: ModelSpec, loaded: Loaded, build: str) -> str:
    """Return what names all that memory depends on besides the layout: file, build, settings."""
    facts = [
        *(file_key(spec), build, asdict(loaded.options), asdict(loaded.draft_options)),
        *(str(spec.mmproj), str(spec.draft_model), loaded.draft and loaded.draft.file_bytes),
        # what the launcher passes on as it stands, and the environment, may change memory too
        *(read_args(spec.args).rest, sorted(spec.env.items())),
    ]
    return _digest(facts)


def settings_key(options: str, layout: Layout) -> str:
    """Return what measurements are kept under: an `options_key`, and the layout."""
    return _digest([options, asdict(layout)])


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
