"""Worlds for the planner: GPUs, servers and loads, hand-made or generated.

The estimator here is synthetic but has the real one's structure: layers go to devices by the rule
of llama.cpp, each layer has weights and cache, every GPU in use pays a compute buffer, the first of
several pays more, the output layer is bigger than the others, experts can stay on the host.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from hypothesis import strategies as st

from smartproxy.gpus.types import Gpu
from smartproxy.memory.types import DeviceBytes, Estimate, Layout, Need
from smartproxy.planner.types import (
    PlacePolicy,
    PlanSettings,
    Promise,
    RunningServer,
    Snapshot,
    Strategy,
    WaitingLoad,
)
from smartproxy.types import GIB, MIB, ServerState

NOW = 1_000_000.0
OVERHEAD_BYTES = 300 * MIB


@dataclass(frozen=True)
class Sketch:
    """A model as the synthetic estimator knows it."""

    #: the output layer counted
    layers: int = 8
    layer_bytes: int = 512 * MIB
    output_bytes: int = 768 * MIB
    expert_bytes: int = 0
    cache_bytes_per_token_and_layer: int = 4096
    compute_bytes: int = 200 * MIB
    #: what the first GPU of several pays beside
    first_extra_bytes: int = 64 * MIB

    @lru_cache(maxsize=4096)  # noqa: B019 - sketches are few and live as long as the tests
    def estimate(self, layout: Layout) -> Estimate:
        count = len(layout.tensor_split)
        weights, caches = [0] * count, [0] * count
        host = 0
        for layer, device in enumerate(layer_devices(self.layers, layout)):
            size = self.output_bytes if layer == self.layers - 1 else self.layer_bytes
            if layer < layout.cpu_moe_layers:
                size -= self.expert_bytes
                host += self.expert_bytes
            if device is None:
                host += size
                continue
            weights[device] += size
            caches[device] += self.cache_bytes_per_token_and_layer * layout.context_size
        devices = tuple(
            DeviceBytes(
                weights_bytes=weights[device],
                kv_cache_bytes=caches[device],
                compute_bytes=self.compute_bytes
                + (self.first_extra_bytes if device == 0 and count > 1 else 0),
            )
            for device in range(count)
        )
        return Estimate(layout=layout, devices=devices, host=DeviceBytes(weights_bytes=host))

    def need(self, context_size: int | None = 8192, max_context_size: int = 131072) -> Need:
        return Need(
            layer_count=self.layers,
            moe_layer_count=self.layers - 1 if self.expert_bytes else 0,
            context_size=context_size,
            max_context_size=max_context_size,
            estimate=self.estimate,
        )


def layer_devices(layers: int, layout: Layout) -> list[int | None]:
    """Return each layer's device, None = host: llama-model.cpp load_tensors (b11434)."""
    offloaded = min(layout.gpu_layers, layers)
    if not layout.tensor_split:
        return [None] * layers
    total = sum(layout.tensor_split)
    bounds = [part / total for part in accumulate(layout.tensor_split)]
    first = layers - offloaded
    return [
        None if layer < first else bisect_right(bounds, (layer - first) / offloaded)
        for layer in range(layers)
    ]


def sketch_of(size_bytes: int, layers: int = 16) -> Sketch:
    """Return a model that takes this many bytes on one GPU, overhead included, at 8192 tokens."""
    compute = min(200 * MIB, size_bytes // 8)
    body = size_bytes - OVERHEAD_BYTES - compute
    cache = body // 10 // layers // 8192
    layer = (body - cache * 8192 * layers) // layers
    rest = body - cache * 8192 * layers - layer * (layers - 1)
    return Sketch(
        layers=layers,
        layer_bytes=layer,
        output_bytes=rest,
        cache_bytes_per_token_and_layer=cache,
        compute_bytes=compute,
        first_extra_bytes=compute // 4,
    )


# --- hand-made -------------------------------------------------------------------------------


def gpu(index: int, total_gb: float = 24, strangers_gb: float = 0, **more: object) -> Gpu:
    """Return a GPU with nothing of ours on it; `with_servers` adds what they hold."""
    total, used = int(total_gb * GIB), int(strangers_gb * GIB)
    values = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": f"Card {total_gb:g}",
        "pci_bus_id": f"0000:{index:02x}:00.0",
        "total_bytes": total,
        "used_bytes": used,
        "free_bytes": total - used,
    }
    return Gpu(**{**values, **more})  # type: ignore[arg-type]


def server(
    server_id: int, model_id: str, held_gb: dict[str, float], **more: object
) -> RunningServer:
    """Return a ready, idle, old server. held_gb: by GPU uuid, all of it visible."""
    values = {
        "server_id": server_id,
        "model_id": model_id,
        "state": ServerState.READY,
        "holds": {
            uuid: Promise(reserved_bytes=int(size * GIB), visible_bytes=int(size * GIB))
            for uuid, size in held_gb.items()
        },
        "busy": 0,
        "pinned": False,
        "created_at": NOW - 1000,
        "ready_at": NOW - 990,
        "last_used_at": NOW - 500,
        "load_s": 10.0,
    }
    return RunningServer(**{**values, **more})  # type: ignore[arg-type]


def load(
    model_id: str,
    size_gb: float | None = None,
    *,
    sketch: Sketch | None = None,
    asked_at: float = NOW,
    context_size: int | None = 8192,
    max_context_size: int = 131072,
    **policy: object,
) -> WaitingLoad:
    """Return a waiting load of a model of this many GB on one GPU, or of this sketch."""
    sketch = sketch or sketch_of(int((size_gb or 1) * GIB))
    return WaitingLoad(
        model_id=model_id,
        asked_at=asked_at,
        requests=1,
        need=sketch.need(context_size, max_context_size),
        policy=PlacePolicy(**policy),  # type: ignore[arg-type]
    )


def snapshot(
    gpus: Sequence[Gpu] | None,
    servers: Sequence[RunningServer] = (),
    loads: Sequence[WaitingLoad] = (),
    **settings: object,
) -> Snapshot:
    """Return a snapshot in which the GPUs show what the servers hold."""
    values = {
        "pool_size": 100,
        "headroom_bytes": 0,
        "gpu_util_threshold": 50.0,
        "gpu_mem_threshold": 0.5,
        "min_residency_s": 5.0,
        "queue_timeout_s": 300.0,
    }
    return Snapshot(
        now=NOW,
        gpus=None if gpus is None else with_servers(gpus, servers),
        servers=tuple(servers),
        loads=tuple(loads),
        settings=PlanSettings(**{**values, **settings}),  # type: ignore[arg-type]
        overhead_bytes={one.uuid: OVERHEAD_BYTES for one in gpus or ()},
    )


def with_servers(gpus: Sequence[Gpu], servers: Sequence[RunningServer]) -> tuple[Gpu, ...]:
    """Return the GPUs with the visible bytes of the servers in NVML's numbers."""
    shown = []
    for one in gpus:
        held = sum(s.holds[one.uuid].visible_bytes for s in servers if one.uuid in s.holds)
        shown.append(
            replace(one, used_bytes=one.used_bytes + held, free_bytes=one.free_bytes - held)
        )
    return tuple(shown)


# --- generated -------------------------------------------------------------------------------

sizes_gb = st.integers(min_value=4, max_value=60).map(lambda quarters: quarters / 4)
gpu_sizes_gb = st.sampled_from([4, 6, 8, 12, 16, 24])


@st.composite
def gpus(draw: st.DrawFn, min_size: int = 1, max_size: int = 4) -> tuple[Gpu, ...]:
    """Generate GPUs of mixed size, some with strangers on them, some busy, few in error."""
    made = []
    for index in range(draw(st.integers(min_size, max_size))):
        total = draw(gpu_sizes_gb)
        strangers = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]))
        made.append(
            gpu(
                index,
                total,
                strangers,
                utilization=draw(st.sampled_from([0.0, 10.0, 90.0])),
                error=draw(st.sampled_from([None] * 9 + ["lost"])),
                mig=draw(st.sampled_from([False] * 6 + [True])),
            )
        )
    return tuple(made)


@st.composite
def running(draw: st.DrawFn, on: Sequence[Gpu], server_id: int) -> RunningServer | None:
    """Generate a server that has room beside what `on` shows as used, or None."""
    free = {one.uuid: one.free_bytes for one in on}
    state = draw(
        st.sampled_from(
            [ServerState.READY] * 7
            + [ServerState.STARTING, ServerState.DRAINING, ServerState.STOPPING]
        )
    )
    wanted = draw(st.lists(st.sampled_from(sorted(free)), min_size=0, max_size=2, unique=True))
    holds = {}
    for uuid in wanted:
        reserved = int(draw(st.integers(1, 32)) / 4 * GIB)
        if reserved > free[uuid]:
            return None
        # a driver that tells at all shows something of whatever has loaded
        quarters = draw(st.sampled_from([4, 4, 4, 3, 1]))
        visible = reserved * (0 if state is ServerState.STARTING else quarters) // 4
        holds[uuid] = Promise(reserved_bytes=reserved, visible_bytes=visible)
    age = draw(st.sampled_from([1.0, 4.0, 60.0, 3600.0]))
    started = state is ServerState.STARTING
    return server(
        server_id,
        f"loaded-{server_id}",
        {},
        holds=holds,
        state=state,
        busy=0 if started else draw(st.sampled_from([0, 0, 0, 1, 3])),
        pinned=draw(st.sampled_from([False, False, False, False, True])),
        created_at=NOW - age - 10,
        ready_at=None if started else NOW - age,
        last_used_at=NOW - draw(st.floats(0.0, age)),
        load_s=draw(st.sampled_from([0.0, 3.0, 20.0])),
        recent_requests=draw(st.sampled_from([0.0, 1.0, 10.0])),
        on_cpu_for_want_of_gpu=not holds and draw(st.booleans()),
    )


@st.composite
def loads(draw: st.DrawFn, name: str, max_gpus: int = 4) -> WaitingLoad:
    """Generate a waiting load of any kind."""
    sketch = draw(sketches())
    return load(
        name,
        sketch=sketch,
        asked_at=NOW - draw(st.sampled_from([0.0, 2.0, 30.0])),
        context_size=draw(st.sampled_from([8192, 8192, 8192, 2048, None])),
        max_context_size=draw(st.sampled_from([8192, 32768])),
        strategy=draw(st.sampled_from([Strategy.SINGLE_GPU_PREFERRED] * 3 + list(Strategy))),
        max_gpus=draw(st.sampled_from([None, None, None, 1, 2, max_gpus])),
        allowed_uuids=draw(
            st.sampled_from([None, None, None, frozenset({"GPU-0"}), frozenset({"GPU-0", "GPU-1"})])
        ),
        gpu_layers=draw(st.sampled_from([None] * 6 + [0, 3])),
        partial_offload=draw(st.sampled_from([False, False, True])),
        cpu_fallback=draw(st.sampled_from([False, False, True])),
        force_cpu=draw(st.sampled_from([False] * 9 + [True])),
    )


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    layers = draw(st.integers(2, 9))
    layer = draw(st.integers(1, 16)) * 128 * MIB
    return Sketch(
        layers=layers,
        layer_bytes=layer,
        output_bytes=draw(st.integers(1, 8)) * 256 * MIB,
        expert_bytes=draw(st.sampled_from([0, 0, layer * 3 // 4])),
        cache_bytes_per_token_and_layer=draw(st.sampled_from([512, 4096, 16384])),
        compute_bytes=draw(st.sampled_from([16, 100, 300])) * MIB,
        first_extra_bytes=draw(st.sampled_from([0, 64])) * MIB,
    )


@st.composite
def worlds(draw: st.DrawFn, max_loads: int = 3, crowded: bool = False) -> Snapshot:
    """Generate a consistent machine: nothing is oversubscribed before the planner acts.

    crowded: several servers, most of them idle and old, and room for more only in the pool.
    """
    bare = draw(gpus())
    servers: list[RunningServer] = []
    for server_id in range(1, 1 + draw(st.integers(3 if crowded else 0, 6))):
        promised = _with_promises(bare, servers)
        one = draw(running(promised, server_id))
        if one is not None:
            keep = not crowded or draw(st.integers(0, 5)) == 0
            servers.append(one if keep else _idle(one))
    waiting = [draw(loads(f"m{number}")) for number in range(draw(st.integers(1, max_loads)))]
    waiting.sort(key=lambda one: one.asked_at)
    return snapshot(
        bare,
        servers,
        waiting,
        pool_size=100 if crowded else draw(st.sampled_from([1, 2, 4, 100])),
        headroom_bytes=draw(st.sampled_from([0, 256 * MIB])),
    )


@st.composite
def split_worlds(draw: st.DrawFn) -> Snapshot:
    """Generate a machine and one model that is likely to need several of its GPUs."""
    bare = tuple(replace(one, error=None) for one in draw(gpus(min_size=2)))
    sketch = replace(draw(sketches()), expert_bytes=0)
    room = sum(one.free_bytes for one in bare) * draw(st.integers(4, 9)) // 10
    layer = max(64 * MIB, (room - sketch.output_bytes) // sketch.layers)
    waiting = load(
        "m",
        sketch=replace(sketch, layer_bytes=layer, cache_bytes_per_token_and_layer=512),
        strategy=draw(st.sampled_from([Strategy.SINGLE_GPU_PREFERRED, Strategy.PACKED])),
        gpu_layers=draw(st.sampled_from([None, None, 3])),
    )
    return snapshot(bare, [], [waiting])


def _idle(one: RunningServer) -> RunningServer:
    holds = {
        uuid: Promise(reserved_bytes=hold.reserved_bytes, visible_bytes=hold.reserved_bytes)
        for uuid, hold in one.holds.items()
    }
    return replace(
        one,
        state=ServerState.READY,
        busy=0,
        pinned=False,
        ready_at=NOW - 60,
        holds=holds,
    )


def _with_promises(bare: Sequence[Gpu], servers: Sequence[RunningServer]) -> tuple[Gpu, ...]:
    """Return the GPUs with all that is promised shown as used."""
    whole = [
        replace(
            one,
            holds={
                uuid: Promise(reserved_bytes=hold.reserved_bytes, visible_bytes=hold.reserved_bytes)
                for uuid, hold in one.holds.items()
            },
        )
        for one in servers
    ]
    return with_servers(bare, whole)
