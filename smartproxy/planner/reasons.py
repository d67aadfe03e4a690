"""Decisions in words and numbers. Pure; every text names the model, the bytes and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smartproxy.gpus.types import Gpu
from smartproxy.planner.place import Fit, PlaceQuery
from smartproxy.planner.types import RunningServer
from smartproxy.types import GIB, ServerState


def gb(size: int) -> str:
    """Return bytes as users count them (GB = 2^30)."""
    return f"{size / GIB:.1f} GB"


def placed(model_id: str, query: PlaceQuery, fit: Fit, room: Sequence[int]) -> str:
    """Return why a model goes on these GPUs. room: free bytes by position."""
    parts = [
        f"GPU {site.gpu.index} ({site.gpu.name}): {gb(size)} of {gb(room[site.position])} free"
        for site, (_, size) in zip(fit.sites, fit.shares(), strict=True)
    ]
    text = f"model '{model_id}' on " + "; ".join(parts)
    layout, need = fit.estimate.layout, query.sizes.need
    if len(fit.sites) > 1:
        counts = ",".join(f"{share:g}" for share in layout.tensor_split)
        text += f"; layers {counts}: {_why_several(query, room)}"
    if layout.gpu_layers < need.layer_count:
        text += f"; {layout.gpu_layers} of {need.layer_count} layers on the GPU"
    if layout.cpu_moe_layers:
        text += f"; experts of {layout.cpu_moe_layers} layers on the host"
    if need.context_size is None:
        text += f"; the largest context that fits has {layout.context_size} tokens"
    return f"{text} ({query.strategy.value})"


def _why_several(query: PlaceQuery, room: Sequence[int]) -> str:
    if query.strategy.value == "distribute":
        return "spread on purpose"
    overhead = min(site.overhead_bytes for site in query.sites)
    needed = query.sizes.single_bytes(query.shape) + overhead
    most = max(room[site.position] for site in query.sites)
    return f"on one GPU it needs {gb(needed)}, and at most {gb(most)} is free"


def on_cpu(model_id: str, why: str) -> str:
    """Return why a model runs on the CPU."""
    return f"model '{model_id}' on the CPU: {why}"


def coming(model_id: str, leaving: Iterable[RunningServer]) -> str:
    """Return that what is on its way out suffices."""
    named = ", ".join(_on_its_way(server) for server in leaving)
    return (
        f"model '{model_id}' waits for room that is being freed: {named or 'older loads go first'}"
    )


def _on_its_way(server: RunningServer) -> str:
    if server.state is ServerState.DRAINING and server.busy:
        return f"'{server.model_id}' finishes {_requests(server.busy)}"
    return f"'{server.model_id}' is {server.state.value}"


def evicted(victim: RunningServer, model_id: str, now: float) -> str:
    """Return why this server has to go."""
    held = sum(hold.reserved_bytes for hold in victim.holds.values())
    freed = f"frees {gb(held)}" if held else "frees a place in the pool"
    if victim.busy:
        use = f"finishes {_requests(victim.busy)} first; '{model_id}' has waited long"
    else:
        use = f"idle for {max(0.0, now - victim.last_used_at):.0f} s"
    return f"model '{victim.model_id}' makes room for '{model_id}': {freed}, {use}"


def making_room(model_id: str, victims: Iterable[RunningServer]) -> str:
    """Return that victims were chosen and the load waits for them."""
    named = ", ".join(f"'{victim.model_id}'" for victim in victims)
    return f"model '{model_id}' waits for {named} to make room"


def fresh(model_id: str, victims: Iterable[RunningServer], wait_s: float) -> str:
    """Return that a victim was loaded too short a time ago."""
    named = ", ".join(f"'{victim.model_id}'" for victim in victims)
    return (
        f"model '{model_id}' waits {max(0.0, wait_s):.1f} s for {named}:"
        " it was loaded less than min_residency ago"
    )


def in_the_way(model_id: str, victims: Iterable[RunningServer]) -> str:
    """Return which servers, busy or still starting, hold what a load needs."""
    named = ", ".join(_use(victim) for victim in victims)
    return f"model '{model_id}' waits for {named}"


def _use(server: RunningServer) -> str:
    if server.state is ServerState.STARTING:
        return f"'{server.model_id}' (starting)"
    use = _requests(server.busy) if server.busy else "idle"
    return f"'{server.model_id}' ({use})"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def blocked(model_id: str, needed: int, gpus: Sequence[str], pinned: Sequence[str]) -> str:
    """Return why nothing that we may end makes room."""
    text = f"model '{model_id}' needs {gb(needed)}; if all idle servers were stopped, " + ", ".join(
        gpus
    )
    if pinned:
        text += "; pinned: " + ", ".join(f"'{other}'" for other in pinned)
    return text


def pool_pinned(model_id: str, pool_size: int, pinned: Sequence[str]) -> str:
    """Return that pinned servers hold every place."""
    named = ", ".join(f"'{other}'" for other in pinned)
    return (
        f"model '{model_id}' waits for a place in the pool: all {pool_size}"
        f" (server_pool.size) are pinned: {named}"
    )


def behind_others(model_id: str) -> str:
    """Return that older loads have what there is."""
    return f"model '{model_id}' waits behind older loads"


def gpu_state(gpu: Gpu, free_bytes: int) -> str:
    """Return one GPU's part of a text about why nothing fits."""
    if gpu.error is not None:
        return f"GPU {gpu.index} is in error ({gpu.error})"
    return f"GPU {gpu.index} has {gb(max(0, free_bytes))} of {gb(gpu.total_bytes)} free"


def too_big(model_id: str, needed: int, available: int, count: int) -> str:
    """Return why a model can never fit, and what to change."""
    if not count:
        return (
            f"model '{model_id}' needs {gb(needed)}, largest set of GPUs has {gb(0)}: none of the"
            " GPUs it may use (`gpus`) is in this machine"
        )
    gpus = "1 GPU" if count == 1 else f"{count} GPUs"
    text = (
        f"model '{model_id}' needs {gb(needed)}, largest set of GPUs has {gb(available)}"
        f" ({gpus}, headroom taken off)"
    )
    if needed <= available:
        text += ", but a layer can't be divided, and no division of the layers fits on every GPU"
    return (
        f"{text}; lower ctx_size, take a smaller quantization, allow more GPUs, or set"
        " partial_offload or cpu_fallback"
    )
