"""Crowded machines for `bench.decision`: 8 GPUs, 200 models with real estimates, 50 of them loaded.

Cards have the sizes that are sold; strangers hold what our servers leave, but for the slack that a
case wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from smartproxy.gpus.cuda import default_overhead_bytes
from smartproxy.gpus.types import Gpu
from smartproxy.memory.estimate import Loaded, make_need
from smartproxy.memory.types import EstimateOptions, Layout
from smartproxy.model_file.metadata import read_metadata
from smartproxy.model_file.types import ModelMetadata
from smartproxy.planner.types import (
    PlacePolicy,
    PlanSettings,
    Promise,
    RunningServer,
    Snapshot,
    WaitingLoad,
)
from smartproxy.types import GIB, MIB, ServerState
from tests.support import gguf_files, gguf_models

NOW = 1_000_000.0
GPUS, MODELS, LOADED = 8, 200, 50
CARDS_GB = (16, 24, 32, 48, 80, 96, 141, 192)
HEADROOM_BYTES = 256 * MIB
CONTEXTS = (4096, 8192, 16384, 32768)
CACHE_TYPES = ("f16", "q8_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A model of the configuration."""

    model_id: str
    metadata: ModelMetadata
    options: EstimateOptions
    context_size: int
    #: on one GPU, without overhead
    bytes: int


def catalogue(random: Random) -> list[Listed]:
    """Return 200 models, smallest first: the shapes of the measured cases, settings drawn."""
    with TemporaryDirectory() as folder:
        shapes = [
            read_metadata(gguf_files.write(shape(), Path(folder)))
            for shape in gguf_models.MODELS.values()
        ]
    models = [_listed(f"m{n}", shapes[n % len(shapes)], random) for n in range(MODELS)]
    return sorted(models, key=lambda model: model.bytes)


def _listed(name: str, metadata: ModelMetadata, random: Random) -> Listed:
    cache, context = random.choice(CACHE_TYPES), random.choice(CONTEXTS)
    options = EstimateOptions(cache_type_k=cache, cache_type_v=cache)
    need = make_need(Loaded(metadata=metadata, options=options), context_size=context)
    context = need.context_size or context
    whole = Layout(tensor_split=(1.0,), gpu_layers=need.layer_count, context_size=context)
    return Listed(
        model_id=name,
        metadata=metadata,
        options=options,
        context_size=context,
        bytes=need.estimate(whole).total_bytes,
    )


def machine(
    random: Random, loaded: Sequence[Listed], slack_gb: Callable[[], float], *, busy: float
) -> Snapshot:
    """Return GPUs with these models on them, nothing waiting.

    slack_gb: free memory of each GPU. busy: part of the servers that have requests.
    """
    held = [0] * GPUS
    servers = []
    for number, model in enumerate(loaded):
        on = min(range(GPUS), key=lambda position: held[position])
        size = model.bytes + 420 * MIB
        held[on] += size
        servers.append(_server(random, number, model.model_id, (f"GPU-{on}", size), busy))
    gpus = tuple(_gpu(index, size, slack_gb()) for index, size in enumerate(held))
    return Snapshot(
        now=NOW,
        gpus=gpus,
        servers=tuple(servers),
        loads=(),
        settings=PlanSettings(
            pool_size=2 * LOADED,
            headroom_bytes=HEADROOM_BYTES,
            gpu_util_threshold=50.0,
            gpu_mem_threshold=0.5,
            min_residency_s=5.0,
            queue_timeout_s=300.0,
        ),
        overhead_bytes={gpu.uuid: default_overhead_bytes(gpu.total_bytes) for gpu in gpus},
    )


def _server(
    random: Random, number: int, model_id: str, hold: tuple[str, int], busy: float
) -> RunningServer:
    uuid, size = hold
    return RunningServer(
        server_id=number,
        model_id=model_id,
        state=ServerState.READY,
        holds={uuid: Promise(reserved_bytes=size, visible_bytes=size)},
        busy=random.randint(1, 4) if random.random() < busy else 0,
        pinned=False,
        created_at=NOW - 5000,
        ready_at=NOW - 4990,
        last_used_at=NOW - random.expovariate(1 / 600),
        load_s=1 + size / GIB,
        recent_requests=random.expovariate(1 / 5),
        recent_tokens=random.expovariate(1 / 4000),
    )


def _gpu(index: int, held: int, slack_gb: float) -> Gpu:
    free = int(slack_gb * GIB) + HEADROOM_BYTES
    total = next(size * GIB for size in CARDS_GB if size * GIB >= held + free)
    return Gpu(
        index=index,
        uuid=f"GPU-{index}",
        name=f"Card {total // GIB}",
        pci_bus_id=f"0000:{index:02x}:00.0",
        total_bytes=total,
        free_bytes=free,
        used_bytes=total - free,
    )


def waiting(
    models: Sequence[Listed], *, auto_context: bool = False, asked_s: float = 1.0
) -> tuple[WaitingLoad, ...]:
    """Return loads that wait, oldest first; their needs remember nothing from another world."""
    return tuple(
        WaitingLoad(
            model_id=model.model_id,
            asked_at=NOW - asked_s,
            requests=1,
            need=make_need(
                Loaded(metadata=model.metadata, options=model.options),
                context_size=None if auto_context else model.context_size,
            ),
            policy=PlacePolicy(),
        )
        for model in models
    )


def with_loads(world: Snapshot, loads: Sequence[WaitingLoad]) -> Snapshot:
    """Return the machine with these loads waiting."""
    return replace(world, loads=tuple(loads))
