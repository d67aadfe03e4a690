"""Rows of the state file as what users see: servers, GPUs, models, reasons. Reads only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from smartproxy.catalog.catalog import Catalog, ModelSpec
from smartproxy.config.known_holes import build_problems
from smartproxy.config.settings import Settings
from smartproxy.entities import (
    GPU,
    GPUAssignment,
    GPUPoolStatus,
    GPUProcess,
    Model,
    Server,
    pool_status,
    status_of,
)
from smartproxy.gpus.types import GpuState
from smartproxy.state import gpus as gpu_rows
from smartproxy.state import models
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import UNKNOWN_INDEX, AssignmentRow, assignments, models_by_gpu
from smartproxy.state.gpus import GpuProcessRow, GpuRow
from smartproxy.state.manager_row import HEARTBEAT_STALE_S, manager_row
from smartproxy.state.models import ModelRow
from smartproxy.state.server_row import ServerRow
from smartproxy.state.store import Store
from smartproxy.types import GIB, ServerState

#: a model's status in /v1/models, by its server's state; without a server: unloaded
MODEL_STATUS = {
    "starting": "loading",
    "ready": "ready",
    "draining": "draining",
    "stopping": "draining",
    "failed": "failed",
}


def servers(store: Store, *, now: float) -> list[Server]:
    """Return the listed servers (live ones, and failed ones for a while)."""
    promised = assignments(store)
    return [
        server(row, promised.get(row.id, [])) for row in server_rows.listed_servers(store, now=now)
    ]


def server(row: ServerRow, shares: list[AssignmentRow]) -> Server:
    """Return one server with its assignment; without GPUs it has none.

    An adopted server's GPUs have no number before they were looked at: until then it has none too.
    """
    state = row.state
    shares = [share for share in shares if share.gpu_index != UNKNOWN_INDEX]
    measured = row.measured_bytes
    split = [float(share) for share in (row.tensor_split or "").split(",") if share]
    parts = [share.measured_bytes for share in shares]
    free = [share.free_bytes for share in shares]
    assignment = GPUAssignment(
        gpu_ids=[share.gpu_index for share in shares],
        gpu_uuids=[share.gpu_uuid for share in shares],
        gpu_free_bytes=free if None not in free else [],
        gpu_estimated_bytes=[share.estimated_bytes for share in shares],
        gpu_measured_bytes=parts if None not in parts else [],
        estimated_vram_required=(row.estimated_bytes or 0) / GIB,
        actual_vram_used=measured / GIB if measured is not None else None,
        tensor_split=split if len(split) == len(shares) else [],
        gpu_layers=row.gpu_layers,
    )
    return Server(
        id=str(row.id),
        host=row.host,
        port=row.port,
        model_id=row.model_id,
        status=status_of(state),
        process=row.pid if state not in (ServerState.FAILED, ServerState.STOPPED) else None,
        gpu_assignment=assignment if shares else None,
        state=state,
        reason=row.reason,
    )


def pool(store: Store, settings: Settings) -> GPUPoolStatus:
    """Return the GPUs as last seen; zeros and an empty list without any."""
    placed = models_by_gpu(store)
    processes: dict[str, list[GPUProcess]] = {}
    for process in gpu_rows.processes(store):
        processes.setdefault(process.gpu_uuid, []).append(_process(process))
    gpus = [
        _gpu(row, placed.get(row.uuid, []), processes.get(row.uuid, []))
        for row in gpu_rows.gpus(store)
    ]
    row = manager_row(store)
    return pool_status(
        gpus,
        settings.gpu_allocation_strategy,
        observed_at=row.observed_at,
        gpu_monitoring_enabled=settings.enable_gpu_monitoring,
        driver_version=row.driver_version,
    )


def _process(row: GpuProcessRow) -> GPUProcess:
    return GPUProcess(
        pid=row.pid,
        name=row.name,
        used_memory=row.used_bytes / GIB if row.used_bytes is not None else None,
        ours=row.server_id is not None,
        model_id=row.model_id,
    )


def _gpu(row: GpuRow, placed: list[str], processes: list[GPUProcess]) -> GPU:
    # the file's own state is as of the last look; a model may have been placed since
    held = GpuState.ASSIGNED if placed else GpuState.AVAILABLE
    return GPU(
        id=row.gpu_index,
        name=row.name,
        total_memory=row.total_bytes / GIB,
        free_memory=row.free_bytes / GIB,
        used_memory=row.used_bytes / GIB,
        utilization=row.utilization,
        temperature=row.temperature_c,
        power_usage=row.power_w,
        assigned_models=placed,
        compute_capability=row.compute_capability,
        uuid=row.uuid,
        pci_bus_id=row.pci_bus_id or None,
        mig=row.mig,
        state=GpuState.ERROR if row.state == GpuState.ERROR else held,
        error=row.error,
        processes=processes,
    )


#: what can be said of the manager without a state file
UNKNOWN_MANAGER: dict[str, Any] = {
    "pid": None,
    "alive": False,
    "heartbeat_age": None,
    "started_at": None,
    "pass_age": None,
    "stopping": False,
    "paused_at": None,
    "llama_server": None,
    "build": None,
    "build_problems": [],
}


def manager(store: Store, *, now: float) -> dict[str, Any]:
    """Return what is known of the manager; alive = it gave a sign lately."""
    row = manager_row(store)
    age_s = now - row.heartbeat_at if row.heartbeat_at else None
    return {
        "pid": row.pid,
        "alive": row.alive(now),
        "heartbeat_age": round(age_s, 3) if age_s is not None else None,
        "started_at": row.started_at,
        "pass_age": round(row.pass_age_s, 3) if row.pass_age_s is not None else None,
        "stopping": row.ending(),
        "paused_at": row.paused_at,
        "llama_server": row.llama_server,
        "build": row.build,
        "build_problems": build_problems(row.build),
    }


def reasons(listed: list[Server], gpus: GPUPoolStatus, boss: dict[str, Any]) -> list[str]:
    """Return why the whole is degraded; empty when it is not."""
    found = []
    if boss["heartbeat_age"] is None:
        found.append("the manager is not running")
    elif not boss["alive"]:
        found.append(f"the manager gave no sign for {boss['heartbeat_age']:.0f} s")
    elif (boss["pass_age"] or 0) > HEARTBEAT_STALE_S:
        found.append(f"the manager gives signs, but its loop stands for {boss['pass_age']:.0f} s")
    if boss["paused_at"] is not None:
        since = datetime.fromtimestamp(boss["paused_at"], UTC).isoformat(" ", "seconds")
        found.append(f"paused since {since}: new requests queue until `smartproxy resume`")
    found += [f"gpu {gpu.id}: {gpu.error}" for gpu in gpus.gpu_list if gpu.error]
    found += [s.reason or f"{s.model_id} failed" for s in listed if s.state == ServerState.FAILED]
    return found


def health(store: Store, settings: Settings) -> dict[str, Any]:
    """Return the body of /health."""
    now = store.now()
    listed, gpus, boss = servers(store, now=now), pool(store, settings), manager(store, now=now)
    why = reasons(listed, gpus, boss)
    row = manager_row(store)
    body: dict[str, Any] = {
        "status": "degraded" if why else "ok",
        "mode": row.mode or "cpu",
        "servers": [entry.model_dump(mode="json") for entry in listed],
        "gpu_pool_status": gpus.model_dump(mode="json"),
        "manager": boss,
        "observed_at": row.observed_at,
        "observed_age": round(now - row.observed_at, 3) if row.observed_at else None,
    }
    if why:
        body["reasons"] = why
    if row.mode_reason:
        body["mode_reason"] = row.mode_reason
    return body


def model_list(store: Store, catalog: Catalog) -> list[dict[str, Any]]:
    """Return the catalogue in OpenAI's shape, each with what we know under `smartproxy`."""
    known = models.models(store)
    by_model = {row.model_id: row for row in server_rows.listed_servers(store, now=store.now())}
    return [
        _model(spec, known.get(spec.id), by_model.get(spec.id)) for spec in catalog.models.values()
    ]


def _model(spec: ModelSpec, known: ModelRow | None, live: ServerRow | None) -> dict[str, Any]:
    facts = known or ModelRow(id=spec.id)
    estimated = facts.estimated_bytes
    entity = Model(
        id=spec.id,
        repo=spec.repo,
        variant=spec.variant,
        estimated_vram=estimated / GIB if estimated else None,
        parameters=facts.parameters,
        quantization=facts.quantization,
        path=str(spec.path) if spec.path else None,
        aliases=list(spec.aliases),
    )
    problem = facts.problem or spec.problem
    status = MODEL_STATUS[live.state] if live else "unloaded"
    return {
        "id": spec.id,
        "object": "model",
        "created": int(facts.updated_at),
        "owned_by": "llama.cpp",
        "status": "failed" if problem and not live else status,
        "smartproxy": {
            **entity.model_dump(mode="json"),
            "problem": problem,
            "architecture": facts.architecture,
            "context_size": live.context_size if live else facts.context_size,
            "trained_context": facts.trained_context,
            "server": str(live.id) if live else None,
            "state": live.state if live else None,
            "reason": live.reason if live else None,
        },
    }
