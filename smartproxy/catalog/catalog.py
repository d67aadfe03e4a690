"""Names -> models: ids, aliases, what lies under models_dir, user/repo:VARIANT.

Input: settings and the disk. Output: a frozen catalogue in which every model has the settings
that hold for it, the general ones merged in. Starts nothing, opens no model.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from smartproxy.catalog.scan import FoundModel, files_problem, find_variant, scan
from smartproxy.config.settings import ModelSettings, Settings
from smartproxy.errors import ConfigError, ModelNotFound
from smartproxy.model_file.parts import parts_of
from smartproxy.planner.types import Strategy
from smartproxy.types import GIB

T = TypeVar("T")

#: what user/repo means without a variant, as for llama-server's own -hf
DEFAULT_VARIANT = "Q4_K_M"
CACHE_TYPE_BY_BITS = {16: "f16", 8: "q8_0", 4: "q4_0"}
#: of a name that a client sent: longer ones name nothing, and comparing them would take long
_MAX_NAME_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model with everything the configuration says about it."""

    id: str
    aliases: tuple[str, ...]
    #: first file; None where there is none yet
    path: Path | None
    #: all files, the first one first
    parts: tuple[Path, ...]
    repo: str | None
    variant: str | None
    mmproj: Path | None
    draft_model: Path | None
    #: tokens of the server, all slots together; None = as many as fit
    context_size: int | None
    parallel: int
    kv_unified: bool
    #: None = all
    gpu_layers: int | None
    cache_type_k: str
    cache_type_v: str
    args: tuple[str, ...]
    env: Mapping[str, str]
    #: None = never unloaded for being idle
    ttl_s: float | None
    pinned: bool
    preload: bool
    #: instead of an estimate; None = estimate
    estimated_vram_bytes: int | None
    embeddings: bool
    strategy: Strategy
    #: None = all
    max_gpus: int | None
    #: numbers or uuids it may use; None = any
    gpus: tuple[int | str, ...] | None
    partial_offload: bool
    cpu_fallback: bool
    force_cpu: bool
    load_timeout_s: float
    #: why it can't be loaded ("file not found: ..."); None = nothing known against it
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All models and all their names."""

    #: by id, in listing order: as configured, then those of models_dir by id
    models: Mapping[str, ModelSpec]
    #: id of the model of requests that name none
    default: str | None
    #: one line each, for the log of who starts
    warnings: tuple[str, ...]
    #: ids and aliases -> id
    names: Mapping[str, str]
    #: user/repo:variant, the variant case-folded -> id
    repo_names: Mapping[str, str]
    #: the names of keys that are limited to some models -> ids of those
    models_of_keys: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def resolve(self, name: str) -> ModelSpec:
        """Return the model of this name; raises ModelNotFound with the nearest names."""
        spec = self._find(name.strip())
        if spec is None:
            raise ModelNotFound(self._not_found(name.strip()))
        return spec

    def split_path(self, rest: str) -> tuple[ModelSpec, str] | None:
        """Return the model whose name starts `a/b/c/props`, the longest one, and what follows.

        What follows has no leading slash. None: no name starts it.
        """
        segments = rest.split("/")
        deepest = max((name.count("/") + 1 for name in (*self.names, *self.repo_names)), default=0)
        for count in range(min(deepest, len(segments)), 0, -1):
            spec = self._find("/".join(segments[:count]))
            if spec is not None:
                return spec, "/".join(segments[count:])
        return None

    def _find(self, name: str) -> ModelSpec | None:
        model_id = self.names.get(name)
        if model_id is None:
            model_id = self.repo_names.get(_repo_name(*name.partition(":")[::2]))
        return None if model_id is None else self.models[model_id]

    def _not_found(self, name: str) -> str:
        shown = name[:_MAX_NAME_CHARACTERS]
        folded = {known.casefold(): known for known in self._known_names()}
        near = difflib.get_close_matches(shown.casefold(), folded, n=3, cutoff=0.5)
        if near:
            nearest = ", ".join(f'"{folded[each]}"' for each in near)
            return f'model "{shown}" not found; nearest: {nearest}'
        return f'model "{shown}" not found; GET /v1/models lists those there are'

    def _known_names(self) -> Iterable[str]:
        yield from self.names
        for spec in self.models.values():
            if spec.repo is not None:
                yield f"{spec.repo}:{spec.variant or DEFAULT_VARIANT}"


def build_catalog(settings: Settings) -> Catalog:
    """Return every model there is; reads the folders that the settings name.

    A model whose files are missing is in it, with its problem. Raises ConfigError if
    default_model or a key's `models` names none.
    """
    specs = [_listed(settings, model_id) for model_id in settings.models]
    warnings: list[str] = []
    if settings.models_dir is not None:
        found = scan(settings.models_dir)
        warnings += found.warnings
        specs += _scanned(settings, specs, found.models, warnings)
    warnings += [f'model "{spec.id}": {spec.problem}' for spec in specs if spec.problem]
    if not specs:
        warnings.append('there are no models: list one under "models", or name a "models_dir"')
    catalog = Catalog(
        models={spec.id: spec for spec in specs},
        default=None,
        warnings=tuple(warnings),
        names={name: spec.id for spec in specs for name in (spec.id, *spec.aliases)},
        repo_names=_repo_names(specs),
    )
    catalog = replace(catalog, models_of_keys=_models_of_keys(catalog, settings))
    return catalog if settings.default_model is None else _with_default(catalog, settings)


def _models_of_keys(catalog: Catalog, settings: Settings) -> dict[str, frozenset[str]]:
    found = {}
    for key in (*settings.api_keys, *settings.admin_keys):
        if key.models is None:
            continue
        try:
            ids = frozenset(catalog.resolve(name).id for name in key.models)
        except ModelNotFound as error:
            raise ConfigError(
                f'{settings.config_path}: models of the API key "{key.name}": {error}'
            ) from None
        found[key.name or ""] = ids
    return found


def _with_default(catalog: Catalog, settings: Settings) -> Catalog:
    try:
        default = catalog.resolve(settings.default_model or "").id
    except ModelNotFound as error:
        raise ConfigError(f"{settings.config_path}: default_model: {error}") from None
    return replace(catalog, default=default)


def _listed(settings: Settings, model_id: str) -> ModelSpec:
    model = settings.models[model_id]
    parts = _parts(settings, model)
    extras = [path for path in (model.mmproj, model.draft_model) if path is not None]
    problem = files_problem((*parts, *extras))
    if not parts:
        problem = "downloads are not available yet; give a path"
    return _spec(settings, model, model_id=model_id, parts=parts, problem=problem)


def _parts(settings: Settings, model: ModelSettings) -> tuple[Path, ...]:
    """Return the model's files; of one with a repo only, those kept under models_dir."""
    if model.path is not None:
        return parts_of(model.path)
    if settings.models_dir is None or model.repo is None:
        return ()
    folder = settings.models_dir / model.repo
    return find_variant(folder, model.variant or DEFAULT_VARIANT) or ()


def _scanned(
    settings: Settings,
    listed: list[ModelSpec],
    found: Iterable[FoundModel],
    warnings: list[str],
) -> list[ModelSpec]:
    """Return the models of models_dir that are not listed; their file names are aliases."""
    taken = {name for spec in listed for name in (spec.id, *spec.aliases)}
    files = {os.path.realpath(part) for spec in listed for part in spec.parts}
    free = [model for model in found if os.path.realpath(model.parts[0]) not in files]
    for model in free:
        if model.id in taken:
            warnings.append(f"models_dir: {model.parts[0]} is hidden by the listed {model.id!r}")
    free = [model for model in free if model.id not in taken]
    stems = Counter(_last(model.id) for model in free)
    taken |= {model.id for model in free}
    specs = []
    for model in free:
        stem = _last(model.id)
        aliases = (stem,) if stems[stem] == 1 and stem not in taken else ()
        own = ModelSettings(path=model.parts[0], mmproj=model.mmproj, aliases=aliases)
        problem = files_problem(model.parts)
        specs.append(_spec(settings, own, model_id=model.id, parts=model.parts, problem=problem))
    return specs


def _last(model_id: str) -> str:
    return model_id.rsplit("/", 1)[-1]


def _spec(
    settings: Settings,
    model: ModelSettings,
    *,
    model_id: str,
    parts: tuple[Path, ...],
    problem: str | None,
) -> ModelSpec:
    """Merge what holds for all models into one."""
    context_size = _first(model.ctx_size, settings.ctx_size)
    gpu_layers = _first(model.gpu_layers, settings.gpu_layers)
    vram = model.estimated_vram
    return ModelSpec(
        id=model_id,
        aliases=model.aliases,
        path=parts[0] if parts else None,
        parts=parts,
        repo=model.repo,
        variant=model.variant,
        mmproj=model.mmproj,
        draft_model=model.draft_model,
        context_size=None if context_size == "auto" else context_size,
        parallel=_first(model.parallel, settings.parallel),
        kv_unified=model.kv_unified,
        gpu_layers=None if gpu_layers == -1 else gpu_layers,
        cache_type_k=_cache_type(settings, model, model.cache_type_k, settings.cache_type_k),
        cache_type_v=_cache_type(settings, model, model.cache_type_v, settings.cache_type_v),
        args=model.args,
        env=dict(model.env),
        ttl_s=_first(model.ttl, settings.ttl) or None,
        pinned=model.pinned,
        preload=model.preload,
        estimated_vram_bytes=None if vram is None else round(vram * GIB),
        embeddings=model.embeddings,
        strategy=_first(model.strategy, settings.gpu_allocation_strategy),
        max_gpus=model.max_gpus,
        gpus=model.gpus,
        partial_offload=_first(model.partial_offload, settings.partial_offload),
        cpu_fallback=_first(model.cpu_fallback, settings.cpu_fallback),
        force_cpu=model.cpu,
        load_timeout_s=_first(model.load_timeout, settings.load_timeout),
        problem=problem,
    )


def _cache_type(
    settings: Settings, model: ModelSettings, own: str | None, general: str | None
) -> str:
    """Return the type: the nearer setting wins, and within one the named type over the bits."""
    if own is None and model.cache_type_bits is not None:
        return CACHE_TYPE_BY_BITS[model.cache_type_bits]
    return own or general or CACHE_TYPE_BY_BITS[settings.cache_type_bits]


def _first(own: T | None, general: T) -> T:
    return general if own is None else own


def _repo_name(repo: str, variant: str) -> str:
    return f"{repo}:{(variant or DEFAULT_VARIANT).casefold()}"


def _repo_names(specs: Iterable[ModelSpec]) -> dict[str, str]:
    """Return the names that come from repos; of two models of one variant the first has it."""
    names: dict[str, str] = {}
    for spec in specs:
        if spec.repo is not None:
            names.setdefault(_repo_name(spec.repo, spec.variant or ""), spec.id)
    return names
