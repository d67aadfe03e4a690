"""SPEC 1's entities: field names that may not change, and rules that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from smartproxy.entities import (
    GPU,
    GPUAssignment,
    GPUPoolStatus,
    Model,
    Server,
    ServerStatus,
    pool_status,
    status_of,
)
from smartproxy.gpus.types import GpuState
from smartproxy.planner.types import Strategy
from smartproxy.types import GIB, ServerState

VALID: dict[type[BaseModel], dict[str, Any]] = {
    GPUAssignment: {"gpu_ids": [0, 1], "estimated_vram_required": 2.5},
    Server: {"id": "7", "host": "127.0.0.1", "port": 8080, "model_id": "m", "status": "running"},
    GPU: {
        "id": 0,
        "name": "RTX",
        "total_memory": 16,
        "free_memory": 10,
        "used_memory": 6,
        "utilization": 15.2,
    },
    Model: {"id": "m", "repo": "user/name", "backend": "llama.cpp"},
    GPUPoolStatus: {
        "total_gpus": 1,
        "available_gpus": 1,
        "total_vram": 16,
        "available_vram": 10,
        "gpu_list": [],
        "allocation_strategy": "distribute",
    },
}


@pytest.mark.parametrize(
    ("entity", "fields"),
    [
        (GPUAssignment, "gpu_ids estimated_vram_required actual_vram_used"),
        (Server, "id host port model_id status process gpu_assignment"),
        (
            GPU,
            "id name total_memory free_memory used_memory utilization temperature power_usage "
            "assigned_models compute_capability",
        ),
        (Model, "id repo variant backend estimated_vram parameters quantization"),
        (
            GPUPoolStatus,
            "total_gpus available_gpus total_vram available_vram gpu_list allocation_strategy",
        ),
    ],
)
def test_field_names_of_the_spec_appear_in_json(entity: type[BaseModel], fields: str) -> None:
    shown = json.loads(entity.model_validate(VALID[entity]).model_dump_json())
    assert shown.keys() >= set(fields.split())


@pytest.mark.parametrize("entity", VALID)
def test_json_reads_back_as_the_same_entity(entity: type[BaseModel]) -> None:
    one = entity.model_validate(VALID[entity])
    assert entity.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize(
    ("entity", "field", "value"),
    [
        (GPUAssignment, "gpu_ids", [-1]),
        (GPUAssignment, "gpu_ids", [0, 0]),
        (GPUAssignment, "estimated_vram_required", -1),
        (GPUAssignment, "estimated_vram_required", float("nan")),
        (GPUAssignment, "actual_vram_used", -0.1),
        (GPUAssignment, "tensor_split", [1.0]),
        (GPUAssignment, "gpu_uuids", ["GPU-1"]),
        (GPUAssignment, "gpu_layers", -1),
        (Server, "id", ""),
        (Server, "port", 0),
        (Server, "port", 65536),
        (Server, "model_id", ""),
        (Server, "status", "loading"),
        (Server, "process", 0),
        (Server, "state", "failed"),
        (GPU, "id", -1),
        (GPU, "total_memory", 0),
        (GPU, "free_memory", -1),
        (GPU, "used_memory", -1),
        (GPU, "free_memory", 17),
        (GPU, "utilization", 100.5),
        (GPU, "utilization", -1),
        (GPU, "power_usage", -1),
        (GPU, "state", "busy"),
        (Model, "id", ""),
        (Model, "repo", "name"),
        (Model, "repo", "user/na me"),
        (Model, "repo", "user/name/more"),
        (Model, "repo", "user/name\n"),
        (Model, "backend", "vllm"),
        (Model, "estimated_vram", 0),
        (GPUPoolStatus, "total_gpus", -1),
        (GPUPoolStatus, "available_gpus", 2),
        (GPUPoolStatus, "allocation_strategy", "spread"),
    ],
)
def test_broken_rule_names_the_field(entity: type[BaseModel], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        entity.model_validate({**VALID[entity], field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("entity", "changes"),
    [
        (GPUAssignment, {"gpu_ids": []}),
        (GPU, {"free_memory": 0, "used_memory": 0, "utilization": 100}),
        (Server, {"port": 65535, "state": "draining"}),
        (Model, {"repo": "user-1/real.name_2.5"}),
        (Model, {"repo": None, "path": "/srv/a.gguf"}),
        (Model, {"parameters": "7B"}),
        (Model, {"parameters": 7_000_000_000}),
    ],
)
def test_what_is_allowed_is_accepted(entity: type[BaseModel], changes: dict[str, Any]) -> None:
    entity.model_validate({**VALID[entity], **changes})


def test_model_has_a_path_or_a_repo() -> None:
    with pytest.raises(ValidationError) as caught:
        Model(id="m")
    assert caught.value.errors()[0]["loc"] == ("path",)


def test_assignment_never_asks_a_gpu_for_more_than_it_has_free() -> None:
    fits = {"gpu_ids": [0, 3], "estimated_vram_required": 2, "gpu_free_bytes": [GIB, GIB]}
    GPUAssignment.model_validate({**fits, "gpu_estimated_bytes": [GIB, GIB]})
    with pytest.raises(ValidationError, match="asks GPU 3 for") as caught:
        GPUAssignment.model_validate({**fits, "gpu_estimated_bytes": [GIB, GIB + 1]})
    assert caught.value.errors()[0]["loc"] == ("gpu_estimated_bytes",)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (ServerState.STARTING, ServerStatus.RUNNING),
        (ServerState.READY, ServerStatus.RUNNING),
        (ServerState.DRAINING, ServerStatus.RUNNING),
        (ServerState.STOPPING, ServerStatus.RUNNING),
        (ServerState.STOPPED, ServerStatus.STOPPED),
        (ServerState.FAILED, ServerStatus.ERROR),
    ],
)
def test_every_state_shows_as_one_of_three(state: ServerState, status: ServerStatus) -> None:
    assert status_of(state) is status


def gpu(index: int, **changes: Any) -> GPU:
    values: dict[str, Any] = {
        "id": index,
        "name": "RTX",
        "total_memory": 16,
        "free_memory": 12,
        "used_memory": 4,
        "utilization": 10.0 * index,
    }
    return GPU(**{**values, **changes})


def test_pool_counts_only_healthy_gpus_as_room() -> None:
    gpus = [
        gpu(0),
        gpu(1, assigned_models=["m"], state=GpuState.ASSIGNED),
        gpu(2, state=GpuState.ERROR, error="fell off the bus"),
    ]
    pool = pool_status(gpus, Strategy.PACKED, observed_at=5.0)
    assert (pool.total_gpus, pool.available_gpus) == (3, 1)
    assert (pool.total_vram, pool.available_vram) == (48, 24)


def test_pool_carries_the_previous_generations_names() -> None:
    shown = pool_status([gpu(2)], Strategy.DISTRIBUTE).model_dump()
    assert shown["gpus"] == shown["gpu_list"]
    assert (shown["total_memory"], shown["used_memory"], shown["free_memory"]) == (16, 4, 12)
    assert (shown["utilization_average"], shown["gpu_available"]) == (20, True)


def test_pool_without_gpus_is_zeros_and_an_empty_list() -> None:
    shown = pool_status([], Strategy.SINGLE_GPU_PREFERRED).model_dump()
    for key in ("total_gpus", "available_gpus", "total_vram", "available_vram", "total_memory"):
        assert shown[key] == 0
    assert (shown["gpu_list"], shown["gpus"], shown["gpu_available"]) == ([], [], False)
    assert shown["utilization_average"] == 0
