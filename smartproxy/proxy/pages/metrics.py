"""/metrics: the state file as Prometheus' text. Reads only; every worker gives the same.

The names stand in deploy/grafana.json and must not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from smartproxy.gpus.types import GpuState
from smartproxy.state import counts
from smartproxy.state import gpus as gpu_rows
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments, reserved_bytes
from smartproxy.state.demands import waiting_requests
from smartproxy.state.manager_row import manager_row
from smartproxy.state.server_row import LiveServer
from smartproxy.state.store import Store

#: the server or GPU that stands for main memory
HOST = "host"


def text(store: Store) -> bytes:
    """Return the exposition, format 0.0.4; raises StateError."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once([*gpus(store), *servers(store), *totals(store), *manager(store)]))
    return generate_latest(registry)


class _Once(Collector):
    """Metrics already made, as the library wants them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def gpus(store: Store) -> Iterator[Metric]:
    """Yield the GPUs; of one in error only that it is, and what is promised of it."""
    up = GaugeMetricFamily(
        "smartproxy_gpu_up", "1 while NVML can read the GPU, else 0.", labels=["gpu", "uuid"]
    )
    memory = GaugeMetricFamily(
        "smartproxy_gpu_memory_bytes",
        "Memory of a GPU: total, used and free as NVML sees it; reserved is promised to servers.",
        labels=["gpu", "uuid", "kind"],
    )
    readings = {
        "utilization_percent": "Utilisation, 0 to 100.",
        "temperature_celsius": "Temperature, where the card has a sensor.",
        "power_watts": "Power draw, where the card tells.",
    }
    families = [
        GaugeMetricFamily(f"smartproxy_gpu_{name}", meaning, labels=["gpu", "uuid"])
        for name, meaning in readings.items()
    ]
    reserved = reserved_bytes(store)
    for row in gpu_rows.gpus(store):
        labels = [str(row.gpu_index), row.uuid]
        healthy = row.state != GpuState.ERROR
        up.add_metric(labels, healthy)
        memory.add_metric([*labels, "reserved"], reserved.get(row.uuid, 0))
        if not healthy:
            continue
        memory.add_metric([*labels, "total"], row.total_bytes)
        memory.add_metric([*labels, "used"], row.used_bytes)
        memory.add_metric([*labels, "free"], row.free_bytes)
        figures = (row.utilization, row.temperature_c, row.power_w)
        for family, figure in zip(families, figures, strict=True):
            if figure is not None:
                family.add_metric(labels, figure)
    yield from (up, memory, *families)


def servers(store: Store) -> Iterator[Metric]:
    """Yield the live servers, by model: a model has one at most."""
    memory = GaugeMetricFamily(
        "smartproxy_server_memory_bytes",
        "Memory of a loaded model per GPU, and of main memory (gpu=host).",
        labels=["model", "gpu", "kind"],
    )
    processing = GaugeMetricFamily(
        "smartproxy_server_requests_processing",
        "Requests that the server of a model works on.",
        labels=["model"],
    )
    slots = GaugeMetricFamily(
        "smartproxy_server_slots", "Slots of a loaded model.", labels=["model", "kind"]
    )
    shares = assignments(store)
    for row in server_rows.live_servers(store):
        model = row.model_id
        for gpu, size in _parts(row, shares.get(row.id, [])):
            for kind, value in size.items():
                if value is not None:
                    memory.add_metric([model, gpu, kind], value)
        if row.slots_total is not None:
            processing.add_metric([model], row.requests_processing or 0)
            slots.add_metric([model, "total"], row.slots_total)
            slots.add_metric([model, "busy"], row.slots_busy or 0)
    yield from (memory, processing, slots)


def _parts(
    row: LiveServer, shares: list[AssignmentRow]
) -> Iterator[tuple[str, dict[str, int | None]]]:
    """Yield where a server has memory, and the bytes estimated and measured there."""
    for share in shares:
        yield (
            str(share.gpu_index),
            {"estimated": share.estimated_bytes, "measured": share.measured_bytes},
        )
    yield (
        HOST,
        {"estimated": row.host_estimated_bytes, "measured": row.host_measured_bytes},
    )


def totals(store: Store) -> Iterator[Metric]:
    """Yield what is counted since the state file was made."""
    requests = CounterMetricFamily(
        "smartproxy_requests",
        "Requests by model and HTTP code; code=nginx: left to nginx, which knows the code.",
        labels=["model", "code"],
    )
    loads = CounterMetricFamily(
        "smartproxy_loads",
        "Loads by how they ended: ready, or the error's code.",
        labels=["model", "outcome"],
    )
    tokens = CounterMetricFamily(
        "smartproxy_server_tokens",
        "Tokens that servers read (prompt) and wrote (predicted).",
        labels=["model", "kind"],
    )
    families = {"requests": requests, "loads": loads, "tokens": tokens}
    evictions = 0.0
    for count in counts.totals(store):
        if count.name == "evictions":
            evictions += count.value
        else:
            families[count.name].add_metric([count.model_id, count.label], count.value)
    yield from families.values()
    yield CounterMetricFamily(
        "smartproxy_evictions", "Models unloaded to make room for another.", value=evictions
    )


def manager(store: Store) -> Iterator[Metric]:
    """Yield what the manager does: how long loads take, and who waits for one."""
    load_s = GaugeMetricFamily(
        "smartproxy_load_seconds",
        "Seconds from start to ready of a model's last load.",
        labels=["model"],
    )
    for model_id, seconds in server_rows.last_load_s(store).items():
        load_s.add_metric([model_id], seconds)
    yield load_s
    yield GaugeMetricFamily(
        "smartproxy_queue_length",
        "Requests that wait for a model to load.",
        value=waiting_requests(store),
    )
    decided = manager_row(store).decision_s
    if decided is not None:
        yield GaugeMetricFamily(
            "smartproxy_decision_seconds",
            "Seconds that the manager's last decision took: to look at the books and to plan.",
            value=decided,
        )
